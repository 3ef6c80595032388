"""What `self_check` plants on the machine, so that an attempt from inside has something to find: a file, a process,
servers, shared memory, a variable. All of it is gone afterwards."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skyrl_minisandbox.sandbox.check import attempts

PACKAGE = Path(__file__).resolve().parents[3]
# The inside has the same three files below another directory, and runs this too.
BOOT = "import sys;sys.path.insert(0,sys.argv.pop(1));from skyrl_minisandbox.sandbox.check.attempts import main;main()"
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts")
_IPC_CREAT, _IPC_RMID = 0o1000, 0  # linux/ipc.h
_VARIABLE = "MINISANDBOX_SELF_CHECK_TOKEN"


@contextlib.contextmanager
def planted() -> Iterator[dict[str, Any]]:
    """Set the traps; gives what the attempts must know. What cannot be planted here is in no reach to be tried."""
    with contextlib.ExitStack() as stack:
        token = secrets.token_hex(12)
        directory = Path(stack.enter_context(_shared_directory()))
        known: dict[str, Any] = {
            "secret": f"{directory}/secret", "text": f"secret-{token}", "token": f"token-{token}",
            "argument": f"victim-{token}", "abstract": f"minisandbox-{token}", "socket": f"{directory}/socket",
            "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES},
            "disk": _disk(), "shm": f"/dev/shm/minisandbox-{token}", "key": secrets.randbits(30) + 1,
        }
        Path(known["secret"]).write_text(known["text"])
        os.chmod(known["secret"], 0o644)
        with contextlib.suppress(OSError):  # where there is none, the trap says so
            Path(known["shm"]).write_text(known["text"])
            stack.callback(os.unlink, known["shm"])
        known["victim"] = stack.enter_context(_victim(known["argument"]))
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        known["port"] = tcp.getsockname()[1]
        for address in ("\0" + known["abstract"], known["socket"]):
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.bind(address)
            server.listen()
        os.chmod(known["socket"], 0o666)
        stack.enter_context(_segment(known["key"]))
        # The launcher starts while it is there, as it does from the environment of any owner with a secret in it.
        os.environ[_VARIABLE] = known["token"]
        stack.callback(os.environ.pop, _VARIABLE, None)
        yield known


def sprung(known: dict[str, Any]) -> dict[str, str]:
    """Try the traps on the bare machine: those that do not catch, and why. An attempt at one cannot be judged."""
    from skyrl_minisandbox.sandbox.check import reach, refused  # noqa: F401  they register themselves

    names = [name for name, one in attempts.ATTEMPTS.items() if one.trap]
    path = Path(known["secret"]).with_name("known.json")
    path.write_text(json.dumps({**known, "only": names}))
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", BOOT, str(PACKAGE), str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )
    found = {name: (verdict, detail) for name, verdict, detail in map(json.loads, done.stdout.splitlines())}
    silent = ("", (done.stderr.strip().splitlines() or ["it did not run"])[-1])
    return {
        name: f"its trap catches nothing on the bare machine either: {found.get(name, silent)[1] or 'refused'}"
        for name in names if found.get(name, silent)[0] != attempts.BAD
    }


@contextlib.contextmanager
def _shared_directory() -> Iterator[str]:
    import tempfile

    # The path of a socket has 108 bytes (unix(7)).
    place = "/tmp" if len(tempfile.gettempdir()) > 60 else None
    with tempfile.TemporaryDirectory(prefix="minisandbox-check-", dir=place) as directory:
        os.chmod(directory, 0o755)  # a secret that modes protect is no test of the sandbox
        yield directory


@contextlib.contextmanager
def _victim(argument: str) -> Iterator[int]:
    """A process that ends with its standard input, that is, with us."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", "import sys;sys.stdin.read()", argument], stdin=subprocess.PIPE
    )
    try:
        yield process.pid
    finally:
        process.communicate()


@contextlib.contextmanager
def _segment(key: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    number = libc.shmget(key, ctypes.c_size_t(4096), _IPC_CREAT | 0o666)
    try:
        yield
    finally:
        if number >= 0:
            libc.shmctl(number, _IPC_RMID, None)


def _disk() -> tuple[int, int]:
    """Major and minor number of the disk that holds /, or of the first loop device where that is none."""
    device = os.stat("/").st_dev
    return (os.major(device), os.minor(device)) if os.major(device) else (7, 0)
