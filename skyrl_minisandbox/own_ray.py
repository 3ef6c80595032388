"""A Ray to work with: the one we are in, the one at an address, or a small one of our own.

Our own keeps all its files in one claimed directory (`claims`), below the run directory where the path is
short enough for Ray's sockets, and leaves nothing: not even a token in the home directory.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from skyrl_minisandbox.claims import Claim
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import MachineError

NAMESPACE = "minisandbox"

ENDING = 60.0
"""Seconds that Ray has to answer at its address, and our own to end."""

OBJECT_STORE = 80 << 20
"""Bytes of our own Ray's object store; Ray refuses less than 75 MiB, and our messages do not use it."""

_TOKEN = secrets.token_hex(32)
"""For our own Ray (2.60), which else writes one into ~/.ray; one per process, because Ray reads it only once."""

SOCKET_PATH = 107
RAY_TAIL = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""A unix socket's path has at most 107 bytes (unix(7)); Ray puts this much below its temporary directory."""


class RayConnection:
    """A Ray to work with: the one we are in, the one at an address, or one of our own.

    Our own starts in a thread that lives as long as it does: Ray's processes get PR_SET_PDEATHSIG, which
    follows the *thread* that started them, and env threads end before the run does.
    """

    def __init__(self, config: EnvConfig) -> None:
        import ray

        self._claim: Claim | None = None
        self._ours = not ray.is_initialized()
        self._closing = threading.Event()
        self._keeper: threading.Thread | None = None
        self._saved: dict[str, str | None] = {}
        if not self._ours:
            return
        logging.getLogger("ray").setLevel(logging.ERROR)
        address = config.cluster.address or os.environ.get("RAY_ADDRESS", "")
        if address:
            _expect_ray(address)
        options = {"address": address} if address else self._own(config)
        started: Future[None] = Future()
        self._keeper = threading.Thread(target=self._keep, args=(options, started), name="ray", daemon=True)
        self._keeper.start()
        try:
            started.result()
        except Exception as error:
            self.close()
            why = next(filter(None, str(error).splitlines()), type(error).__name__)
            raise MachineError(
                f"Ray does not start: {why}", hint="minisandbox rollout cluster=local runs without Ray"
            ) from error
        except BaseException:  # Ctrl-C. Ray cannot be stopped half-way up
            started.exception(ENDING)
            self.close()
            raise

    def _own(self, config: EnvConfig) -> dict[str, Any]:
        """Options for a small and quiet Ray of our own, all of it below one claimed directory."""
        cache = Path(config.images.cache)
        self._claim = Claim(cache, *ray_place(Path(config.out) if config.out else cache / "runs"))
        self._saved["PYTHONBREAKPOINT"] = os.environ.get("PYTHONBREAKPOINT")  # Ray (2.60) sets its own
        self._set("RAY_USAGE_STATS_ENABLED", "0")
        self._set("RAY_worker_niceness", "0")  # not 15: tests have time limits
        if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            self._set("RAY_AUTH_TOKEN", _TOKEN)
            self._saved["RAY_AUTH_MODE"] = None  # Ray sets it itself
        return {
            "address": "local",
            "num_cpus": 0,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
            "_temp_dir": str(self._claim.path),
        }

    def _keep(self, options: dict[str, Any], started: Future[None]) -> None:
        import ray

        try:
            ray.init(
                namespace=NAMESPACE,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                **options,
            )
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        self._closing.wait()

    def close(self) -> None:
        """End or leave the Ray that we started or joined. Idempotent."""
        import ray

        if self._ours and ray.is_initialized():
            ray.shutdown()
        self._closing.set()
        if self._keeper is not None:
            self._keeper.join(ENDING)
        for name, value in self._saved.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        self._saved.clear()
        if self._claim is not None:
            self._claim.release()
        self._ours = False

    def _set(self, name: str, value: str) -> None:
        self._saved[name] = os.environ.get(name)
        os.environ[name] = value


def ray_place(wanted: Path) -> tuple[Path, str]:
    """Parent and prefix of our own Ray's directory: `wanted` where Ray's sockets have room below it, else the first
    temporary directory that is short enough; the claim finds it again."""
    places = [(wanted, "ray-")]
    places += [(Path(path), "minisandbox-") for path in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")]
    for parent, prefix in places:
        room = len(f"{parent}/{prefix}12345678".encode()) + RAY_TAIL <= SOCKET_PATH
        if room and (parent is wanted or os.access(parent, os.W_OK)):
            return parent, prefix
    raise MachineError(
        f"Ray's sockets have no room below {wanted} nor in any temporary directory: a path takes {SOCKET_PATH} bytes",
        hint="out=DIR with a short path, or cluster=local, which runs without Ray",
    )


def _expect_ray(address: str) -> None:
    """Ray itself takes minutes to find that nobody is there. Raises `MachineError`."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return  # `auto`, or a proxy: Ray knows where that is
    try:
        socket.create_connection((host, int(port)), timeout=ENDING).close()
    except OSError as error:
        raise MachineError(
            f"no Ray answers at {address}: {error.strerror or error}",
            hint="ray status tells whether it runs; without RAY_ADDRESS and cluster.address one is started",
        ) from error
