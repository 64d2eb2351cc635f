"""Every encoding, over small vectors, in both forms of the kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hierfl import kernels


@pytest.fixture(params=["numpy", "numba"], autouse=True)
def both_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    form = kernels.NUMPY if request.param == "numpy" else kernels.compiled()
    assert form is not None, "numba is part of the test environment"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.FORM, "in_use", form)
        yield
