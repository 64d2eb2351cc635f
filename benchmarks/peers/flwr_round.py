"""Rounds of flwr's FedAvg under its own simulation engine, default settings. Runs in flwr's environment."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

NOISE: dict[int, np.ndarray] = {}
"""By client: drawn when a worker first meets it, in the first round, which is not counted."""


def client_app(params: int, seed: int) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        site = int(context.node_config["partition-id"])
        if site not in NOISE:
            rng = np.random.default_rng([seed, site])
            NOISE[site] = rng.standard_normal(params, dtype=np.float32) * np.float32(1e-3)
        (array,) = message.content["arrays"].to_numpy_ndarrays()
        content = RecordDict(
            {"arrays": ArrayRecord([array + NOISE[site]]), "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content=content, reply_to=message)

    return app


def server_app(clients: int, params: int, rounds: int, seed: int, log: Path) -> ServerApp:
    app = ServerApp()

    def note(server_round: int, arrays: object) -> None:
        """Called at the server with each new model, first with the initial one."""
        del server_round, arrays
        with log.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"at": time.monotonic()}) + "\n")

    @app.main()
    def main(grid, context):
        del context
        first = np.random.default_rng(seed).standard_normal(params, dtype=np.float32)
        everyone = {"min_train_nodes": clients, "min_available_nodes": clients, "min_evaluate_nodes": 0}
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, **everyone)
        strategy.start(grid, ArrayRecord([first]), num_rounds=rounds, evaluate_fn=note)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("clients", "params", "rounds", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True)
    asked = parser.parse_args()
    asked.log.write_text(json.dumps({"pid": os.getpid()}) + "\n", encoding="utf-8")
    run_simulation(
        server_app(asked.clients, asked.params, asked.rounds, asked.seed, asked.log),
        client_app(asked.params, asked.seed),
        num_supernodes=asked.clients,
    )


if __name__ == "__main__":
    main()
