"""The bits of sums, means, models and states are the same with whatever the CPU can do, and stay what they were.

``golden.json`` is what ``compute.py`` printed when the arithmetic was settled. It changes only with a change of
the arithmetic itself, which is a new version of the protocol.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent

PLAIN_CPU = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}


def dispatched() -> list[str]:
    """NumPy's optional CPU features that this machine has, best first."""
    return list(np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", []))[::-1]


def compute(form: str, **environment: str) -> dict[str, dict[str, str]]:
    run = subprocess.run(
        [sys.executable, str(HERE / "compute.py"), form],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("form", "environment"),
    [
        pytest.param("numpy", {}, id="numpy"),
        pytest.param("numpy", {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched())}, id="numpy-baseline"),
        pytest.param("numpy", {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched()[:-1])}, id="numpy-one-step-up"),
        pytest.param("numba", {}, id="numba"),
        pytest.param("numba", PLAIN_CPU, id="numba-generic-cpu"),
    ],
)
def test_bits_do_not_depend_on_the_cpu(form, environment):
    assert compute(form, **environment) == json.loads((HERE / "golden.json").read_text())


def test_disabling_features_disables_them():
    if not dispatched():
        pytest.skip("NumPy was built for this CPU's features only")
    code = "import numpy as np; print(np.show_config(mode='dicts')['SIMD Extensions'].get('found'))"
    off = os.environ | {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched())}
    shown = subprocess.run([sys.executable, "-c", code], env=off, capture_output=True, text=True, check=True)
    assert not any(feature in shown.stdout for feature in dispatched())
