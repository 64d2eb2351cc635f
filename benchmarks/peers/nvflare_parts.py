"""The parts of the nvflare round that its job carries: a trainer that adds noise, and a clock at the server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.app_common.app_event_type import AppEventType


class AddNoise(Executor):
    """Adds seeded normal noise, drawn before the first task arrives, to the model that came."""

    def __init__(self, params: int = 1000, seed: int = 0) -> None:
        super().__init__()
        self.params, self.seed = params, seed
        self._noise = None

    def handle_event(self, event_type, fl_ctx):
        if event_type == "_start_run":
            site = int(fl_ctx.get_identity_name().rpartition("-")[2])
            rng = np.random.default_rng([self.seed, site])
            self._noise = rng.standard_normal(self.params, dtype=np.float32) * np.float32(1e-3)

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        del task_name, fl_ctx, abort_signal
        params = from_shareable(shareable).data
        made = {name: array + self._noise for name, array in params.items()}
        return DXO(DataKind.WEIGHTS, data=made, meta={MetaKey.NUM_STEPS_CURRENT_ROUND: 1}).to_shareable()


class Clock(FLComponent):
    """Notes at the server when each round starts, and its process, in lines of JSON."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path

    def handle_event(self, event_type, fl_ctx):
        del fl_ctx
        if event_type == AppEventType.ROUND_STARTED:
            with Path(self.path).open("a", encoding="utf-8") as log:
                log.write(json.dumps({"pid": os.getpid(), "at": time.monotonic()}) + "\n")
