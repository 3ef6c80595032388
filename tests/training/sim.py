"""SkyRL's simulated trainer without what needs a GPU or is missing in a release; all else is the product's.

`tests.training.sim.SimExperiment` is a mode of `training.entrypoint.run`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from skyrl.train import fully_async_trainer_sim

from skyrl_minisandbox.training.experiment import AsyncExperiment

_WORKERS = "skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker"


class SimExperiment(AsyncExperiment):
    def _setup_trainer(self) -> Any:
        if _WORKERS not in sys.modules:  # imports flash_attn and CUDA; a simulation uses none of it
            stub = types.ModuleType(_WORKERS)
            for name in ("CriticWorker", "PolicyWorker", "RefWorker"):
                setattr(stub, name, None)
            sys.modules[_WORKERS] = stub
        dispatch = fully_async_trainer_sim._SimDispatch
        for name in ("finalize_pending_saves", "get_timing_metrics"):  # SkyRL 0.4.0 calls them and has them not
            if not hasattr(dispatch, name):
                setattr(dispatch, name, lambda self, *args, **kwargs: {})
        return super()._setup_trainer()
