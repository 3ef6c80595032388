"""What runs inside SkyRL's Ray task: its experiments with our Env registered and our generator.

The task's code must be importable: what is defined in a `__main__` does not run where the task does.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import loguru
from skyrl.backends.skyrl_train.inference_servers.utils import resolve_policy_model_name
from skyrl.train.entrypoints.main_base import BasePPOExp
from skyrl.train.entrypoints.main_generate import EvalOnlyEntrypoint

from skyrl_minisandbox.env import shutdown
from skyrl_minisandbox.plugins import load_plugin
from skyrl_minisandbox.training.config import TrainConfig
from skyrl_minisandbox.training.generator import MiniSandboxGenerator
from skyrl_minisandbox.training.last_words import LastWords
from skyrl_minisandbox.training.order import ResumableOrder

EXPERIMENTS = {
    "sync": f"{__name__}:Experiment",
    "async": f"{__name__}:AsyncExperiment",
    "generate": f"{__name__}:EvalExperiment",
}


class Experiment(BasePPOExp):  # type: ignore[misc]
    """SkyRL's experiment: generate a batch, train on it, again.

    last_words: told why the job ends, where its process may not live to tell.
    """

    last_words: LastWords | None = None

    def get_generator(self, cfg: TrainConfig, tokenizer: Any, inference_engine_client: Any) -> TellingGenerator:
        """Our generator."""
        return TellingGenerator(
            self.last_words,
            generator_cfg=cfg.generator,
            skyrl_gym_cfg=cfg.environment.skyrl_gym,
            inference_engine_client=inference_engine_client,
            tokenizer=tokenizer,
            policy_model_name=resolve_policy_model_name(cfg),
        )

    def get_trainer(self, cfg: TrainConfig, **parts: Any) -> Any:
        """SkyRL's, with data whose order a resumed training keeps."""
        trainer = super().get_trainer(cfg=cfg, **parts)
        if trainer.train_dataloader is not None:
            trainer.train_dataloader = ResumableOrder(trainer.train_dataloader, seed=cfg.trainer.seed)
        return trainer

    def work(self) -> dict[str, Any] | None:
        """All of it."""
        self.run()
        return None


class AsyncExperiment(Experiment):
    """Fully asynchronous: generation goes on while the trainer works. SkyRL asks for `trainer.fully_async.enabled`."""

    def get_trainer(self, cfg: TrainConfig, **parts: Any) -> Any:
        """SkyRL's asynchronous trainer, or its simulation (`trainer.fully_async.simulate_training`)."""
        if cfg.trainer.fully_async.simulate_training:
            from skyrl.train.fully_async_trainer_sim import FullyAsyncTrainerSim

            return FullyAsyncTrainerSim(cfg=cfg, **parts)
        from skyrl.train.fully_async_trainer import FullyAsyncRayPPOTrainer

        return FullyAsyncRayPPOTrainer(cfg=cfg, **parts)


class EvalExperiment(Experiment, EvalOnlyEntrypoint):  # type: ignore[misc]
    """Only the rollouts of `data.val_data` and their figures."""

    def work(self) -> dict[str, Any] | None:
        client = self.get_inference_client()  # outside a loop: it runs one of its own
        figures: dict[str, Any] = asyncio.run(self.run(client))
        return figures


class TellingGenerator(MiniSandboxGenerator):
    """Tells why it ends a job. last_words: None where nobody needs to be."""

    def __init__(self, last_words: LastWords | None, **parts: Any) -> None:
        super().__init__(**parts)
        self._last_words = last_words

    async def generate(self, input_batch: Any, disable_tqdm: bool = False) -> Any:
        """As its base class; SkyRL looks at the names of the parameters."""
        try:
            return await super().generate(input_batch, disable_tqdm)
        except Exception as error:
            if self._last_words is not None:
                self._last_words.tell(error)
            raise


def find_experiment(mode: str) -> Any:
    """The class that runs a mode. Raises `PluginError`."""
    return load_plugin("mode", mode, EXPERIMENTS, export="a subclass of training.experiment.Experiment")


def train(cfg: TrainConfig, mode: str, last_words: LastWords | None = None) -> dict[str, Any] | None:
    """The Ray task. mode: a key of `EXPERIMENTS`, or a dotted path to a subclass of `Experiment`.

    Returns the figures of an evaluation. Every sandbox of the job is gone when it ends, whichever way.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As `nohup` and a shell's `&` leave it to all that they start. Ray cancels a task by this signal.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    experiment = find_experiment(mode)
    _log_as_skyrl()
    try:
        job = experiment(cfg)
        job.last_words = last_words
        figures: dict[str, Any] | None = job.work()
    finally:
        shutdown()
    return figures


class _ToSkyRL(logging.Handler):
    """Our log lines among SkyRL's, in its format and at its level."""

    def emit(self, record: logging.LogRecord) -> None:
        place = {"name": record.name, "function": record.funcName, "line": record.lineno}
        log = loguru.logger.patch(lambda line: line.update(place)).opt(exception=record.exc_info)
        log.log(record.levelname, "{}", record.getMessage())


def _log_as_skyrl() -> None:
    ours = logging.getLogger("skyrl_minisandbox")
    if not any(isinstance(handler, _ToSkyRL) for handler in ours.handlers):
        ours.addHandler(_ToSkyRL())
        ours.setLevel(logging.INFO)
        ours.propagate = False
