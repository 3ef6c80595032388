"""A training from the command line: SkyRL's command with one key more, or this module in its place.

    python -m skyrl.train.entrypoints.main_base trainer.override_entrypoint=skyrl_minisandbox.training.entrypoint KEYS…
    python -m skyrl_minisandbox.training.entrypoint KEYS…

`entrypoint_async` and `entrypoint_generate` beside it train fully asynchronously and only evaluate. Keys are SkyRL's,
and ours at `environment.skyrl_gym.minisandbox.*`. Nothing of SkyRL or Ray is imported before it is known to be there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from skyrl_minisandbox.errors import InputError, MachineError, MiniSandboxError, one_line

WANTED = "skyrl>=0.3,<0.5"
"""Before 0.3 SkyRL has not the hooks that our generator needs."""

ENDING = 120.0
"""Seconds that an interrupted training has to end its rollouts; what is left then ends with its processes."""

INTERRUPTED = 130

OVERRIDE = "trainer.override_entrypoint="


def main(argv: Sequence[str] | None = None, mode: str = "sync") -> None:
    """Train. argv: `key=value`; those of this process when None. mode: see `run`.

    Leaves with `SystemExit` and DESIGN's exit codes unless all went well; errors of ours are printed without a trace.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    try:
        figures = run([one for one in arguments if not one.startswith(OVERRIDE)], mode)
    except MiniSandboxError as error:
        print(f"minisandbox: {error.render()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("minisandbox: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    for name, value in sorted((figures or {}).items()):
        print(f"{name}: {value}")


def run(given: Any, mode: str = "sync") -> dict[str, Any] | None:
    """Check everything, start or join Ray as SkyRL does, and run the job in a Ray task of it; then leave Ray.

    given: what `training.config.make_train_config` takes. mode: `sync`, which is `async` where
    `trainer.fully_async.enabled` says so; `async`; `generate`: only evaluate; or a dotted path to a subclass of
    `training.experiment.Experiment`.

    Returns the figures of an evaluation. Raises `MiniSandboxError`: of the configuration before Ray starts, or what
    ended the job. What SkyRL raises inside the job comes as Ray's `RayTaskError`.
    """
    expect_skyrl()
    from skyrl_minisandbox.training.config import make_train_config

    cfg = make_train_config(given)
    if mode == "sync" and cfg.trainer.fully_async.enabled:
        mode = "async"
    cfg.trainer.fully_async.enabled |= mode == "async"
    from skyrl_minisandbox.training import preflight

    preflight.check(cfg, mode)
    return _run(cfg, mode)


def _run(cfg: Any, mode: str) -> dict[str, Any] | None:
    import ray
    from skyrl.train.utils import initialize_ray

    from skyrl_minisandbox.training.experiment import train
    from skyrl_minisandbox.training.last_words import LastWords

    if ray.is_initialized():
        raise InputError("Ray runs in this process already; SkyRL starts or joins it itself", hint="ray.shutdown()")
    try:
        initialize_ray(cfg)
        with _interrupted_by_sigterm():
            last_words = LastWords() if cfg.trainer.fully_async.enabled else None
            # No retries: a second run of the whole job would not be what the user started, and would hide why.
            job = ray.remote(num_cpus=1, max_retries=0)(train).remote(cfg, mode, last_words)
            return _result(job, last_words, cfg.trainer.log_path)
    finally:
        ray.shutdown()


def _result(job: Any, last_words: Any, logs: str) -> dict[str, Any] | None:
    """What the job returns, or why it does not."""
    import ray

    try:
        figures: dict[str, Any] | None = ray.get(job)
    except KeyboardInterrupt:
        ray.cancel(job)
        ray.wait([job], timeout=ENDING)
        raise
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, MiniSandboxError):
            raise error.cause from None
        raise  # not ours: with SkyRL's own trace
    except ray.exceptions.RayError as error:
        heard = last_words.heard() if last_words is not None else None
        raise heard or MiniSandboxError(
            f"the process of the job ended by itself: {one_line(error)}",
            hint=f"its last lines are above; those of engines and workers in {logs}",
        ) from None
    return figures


def expect_skyrl() -> None:
    """Raises `MachineError` where no SkyRL is, `InputError` for one that is too old."""
    if importlib.util.find_spec("skyrl") is None:
        if importlib.util.find_spec("skyrl_train") is not None:
            raise InputError(
                f"skyrl-train {importlib.metadata.version('skyrl-train')} is installed, which SkyRL has given up for "
                "`skyrl`: it lacks the hooks by which a failed rollout is kept out of the loss",
                hint=f"pip uninstall skyrl-train && pip install '{WANTED}'",
            )
        raise MachineError(
            "training needs SkyRL, which is not installed", hint="pip install 'skyrl-minisandbox[skyrl]'"
        )
    try:
        from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    except Exception as error:  # pydantic's own, where a model of SkyRL's has a TypedDict and Python is below 3.12
        old = sys.version_info < (3, 12)
        raise MachineError(
            f"SkyRL cannot be imported: {one_line(error)}",
            hint="SkyRL needs Python 3.12" if old else f"pip install '{WANTED}', with SkyRL's extra for its backend",
        ) from error
    if not hasattr(SkyRLGymGenerator, "_post_process_agent_loop_output"):
        raise InputError("this SkyRL is too old for our generator", hint=f"pip install '{WANTED}'")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM, as Slurm and Kubernetes send it, ends the job in order, too; a second one ends it at once.

    Only once Ray runs: it has a handler of its own (2.57), which prints a trace and ends the process.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, which is the caller's
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


if __name__ == "__main__":
    main()
