"""Rounds of nvflare's FedAvg under its own simulator, default settings. Runs in nvflare's environment."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare_parts import AddNoise, Clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("clients", "params", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--log", required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nvflare-round-") as folder:
        first = Path(folder) / "first.npy"
        np.save(first, np.random.default_rng(asked.seed).standard_normal(asked.params, dtype=np.float32))
        job = FedJob(name="rounds")
        job.to_server(NPModelPersistor(source_ckpt_file_full_name=str(first)), id="persistor")
        # the clock sees rounds start: one more ends the last that counts
        job.to_server(FedAvg(num_clients=asked.clients, num_rounds=asked.rounds + 1))
        job.to_server(Clock(path=asked.log), id="clock")
        job.to_clients(AddNoise(params=asked.params, seed=asked.seed), tasks=["train"])
        job.simulator_run(str(Path(folder) / "work"), n_clients=asked.clients, threads=asked.clients)


if __name__ == "__main__":
    main()
