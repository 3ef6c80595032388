"""Why a job ended whose process is gone: SkyRL's asynchronous trainer leaves by `os._exit` when a rollout raises."""

from __future__ import annotations

from skyrl_minisandbox.errors import MiniSandboxError, one_line

ANSWER = 30.0
"""Seconds for an actor that does nothing else."""


class Keeper:
    """An actor that keeps the first error that it is told. Imports nothing heavy: it is a process of its own."""

    def __init__(self) -> None:
        self._error: MiniSandboxError | None = None

    def tell(self, error: MiniSandboxError) -> None:
        self._error = self._error or error

    def heard(self) -> MiniSandboxError | None:
        return self._error


class LastWords:
    """A handle to the actor, for the driver and the job."""

    def __init__(self) -> None:
        import ray

        self._actor = ray.remote(Keeper).options(num_cpus=0).remote()

    def tell(self, error: Exception) -> None:
        """Returns once it is kept: this process may end the next moment."""
        import ray

        ours = error if isinstance(error, MiniSandboxError) else MiniSandboxError(one_line(error))
        ray.get(self._actor.tell.remote(ours), timeout=ANSWER)

    def heard(self) -> MiniSandboxError | None:
        """The error, if there was one."""
        import ray

        error: MiniSandboxError | None = ray.get(self._actor.heard.remote(), timeout=ANSWER)
        return error
