"""SkyRL's simulated trainer without what needs a GPU or is missing in a release; all else is the product's.

`tests.training.sim.SimExperiment` is a mode of `training.entrypoint.run`.
"""

from __future__ import annotations

import sys
import types
from typing import Any

from skyrl.train import fully_async_trainer_sim
from skyrl.train.dataset import PromptDataset

from skyrl_minisandbox.training import entrypoint
from skyrl_minisandbox.training.experiment import AsyncExperiment

_WORKERS = "skyrl.backends.skyrl_train.workers.fsdp.fsdp_worker"


class SimExperiment(AsyncExperiment):
    def get_train_dataset(self) -> Any:
        """SkyRL filters in eight processes, which take most of a minute to start."""
        longest = self.cfg.trainer.max_prompt_length
        return PromptDataset(self.cfg.data.train_data, self.tokenizer, longest, num_workers=1)

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


def main() -> None:
    """For `trainer.override_entrypoint`, and for `python -m`."""
    entrypoint.main(mode="tests.training.sim.SimExperiment")


if __name__ == "__main__":
    main()
