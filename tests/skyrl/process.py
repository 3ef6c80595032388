"""A process with SkyRL's trainer in it that calls functions by name, so that it is imported once for many tests.

Outside: `TrainerProcess(version).call("tests.training.faults:run", timeout=60, row=…)`. Arguments and result are
JSON; what the function raises comes back as `AssertionError` with its traceback and the end of the process's log.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from typing import Any

from tests.skyrl.environment import trainer_python
from tests.support import REPOSITORY

LOG_SHOWN = 6000
"""Characters of the end of the log that a failure shows."""

START = 180.0
"""Seconds for the imports on a busy machine."""


class TrainerProcess:
    """Raises `CalledProcessError` when the environment cannot be made. Ended by `close`."""

    def __init__(self, version: str) -> None:
        self._log = tempfile.TemporaryFile()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [str(trainer_python(version)), "-m", "tests.skyrl.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                cwd=REPOSITORY,
                start_new_session=True,
            )
        self._socket = ours
        self._lines = ours.makefile("rw")
        self.pid = self._process.pid
        assert self._read(START) == "ready"

    def call(self, function: str, *, timeout: float, **arguments: Any) -> Any:
        """The function's result. A process that does not answer in time is killed."""
        self._lines.write(json.dumps({"function": function, "arguments": arguments}) + "\n")
        self._lines.flush()
        answer = self._read(timeout)
        if "raised" in answer:
            raise AssertionError(f"{answer['raised']}\n{self.log()}")
        return answer["result"]

    def log(self) -> str:
        """The end of what it printed."""
        return f"-- the end of the process's log:\n{_tail(self._log)}"

    def close(self) -> None:
        """End it, and whatever it started."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._kill()
        self._lines.close()
        self._socket.close()
        self._log.close()

    def _read(self, timeout: float) -> Any:
        self._socket.settimeout(timeout)
        try:
            line = self._lines.readline()
        except TimeoutError:
            self._process.send_signal(signal.SIGABRT)  # faulthandler prints where every thread is
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._kill()
            raise AssertionError(f"no answer within {timeout:g} s\n{self.log()}") from None
        finally:
            self._socket.settimeout(None)
        if not line:
            raise AssertionError(f"the process ended: {self._process.wait()}\n{self.log()}")
        return json.loads(line)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def _tail(log: Any) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - LOG_SHOWN))
    return str(log.read().decode(errors="replace"))


def serve(fd: int) -> None:
    """Answer calls until the other end closes."""
    import faulthandler

    faulthandler.enable(all_threads=True)
    # Before any test, as their imports take longest.
    import skyrl.train.generators.skyrl_gym_generator
    import skyrl.train.utils.trainer_utils  # noqa: F401

    with socket.socket(fileno=fd) as connection, connection.makefile("rw") as lines:

        def send(answer: Any) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        send("ready")
        for line in lines:
            asked = json.loads(line)
            try:
                module, _, name = asked["function"].partition(":")
                print(f"== {asked}", flush=True)
                send({"result": getattr(importlib.import_module(module), name)(**asked["arguments"])})
            except Exception:
                send({"raised": traceback.format_exc()})
    sys.stdout.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
    os._exit(0)  # threads that hang on purpose must not keep us
