"""What is planted on the machine before the probes run, what is looked at afterwards, and its removal.

Without the traps a sandbox that lets everything through looks safe, so the same rows run on the bare host first
(`test_probes.py`): there they must get through.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

_IPC_CREAT, _IPC_RMID = 0o1000, 0
_libc = ctypes.CDLL(None, use_errno=True)
# Rows that must be BAD for root on the bare host.
ON_THE_HOST = (
    "p01", "p02", "p03", "p04", "p05", "f01", "f02", "f03", "f04", "f05", "n01", "n02", "n03", "n04", "i01", "i02",
    "i03",
)


class Traps:
    """A context: planted on entry, removed on exit. `facts` is what the rows must know.

    `missing`: row -> why its trap could not be set here; such a row proves nothing.
    """

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self.missing: dict[str, str] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Traps:
        with self._stack:
            self._plant()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _plant(self) -> None:
        mark = secrets.token_hex(6)
        self.facts.update(
            secret_text=f"secret-{secrets.token_hex(8)}", token=f"token-{secrets.token_hex(16)}",
            victim=f"100000.{secrets.randbelow(10**9):09d}1", outliver=f"100000.{secrets.randbelow(10**9):09d}2",
            abstract=f"minisandbox-probe-{mark}", tmp_file=f"/tmp/minisandbox-probe-{mark}.written",
            pth=f"probe_{mark}.pth",
            namespaces={n: os.readlink(f"/proc/self/ns/{n}") for n in ("user", "mnt", "pid", "net", "ipc", "uts")},
        )
        self.facts["secret"] = self._file(f"/tmp/minisandbox-probe-{mark}.secret", self.facts["secret_text"])
        self.facts["shm_canary"] = self._file(f"/dev/shm/minisandbox-probe-{mark}", "canary")
        if os.geteuid() == 0:
            self.facts["root_canary"] = self._file(f"/root/.minisandbox-probe-{mark}", "canary")
        else:
            self.facts["root_canary"] = "/root/.minisandbox-probe"
            self.missing["f02"] = "not root: no canary in /root"
        self._stack.callback(self._remove, self.facts["tmp_file"])
        self._shadow(f"mstest{mark[:8]}")
        self._processes()
        self._sockets(mark)
        self._segment()
        self.facts["disk"] = self._root_disk()
        if os.geteuid() == 0 and not os.path.exists("/proc/1/root" + self.facts["secret"]):
            self.missing["p04"] = "/proc/1/root is closed even to root on this machine"

    def _file(self, path: str, text: str) -> str:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self._stack.callback(self._remove, path)
        os.write(fd, text.encode())
        os.fchmod(fd, 0o644)
        os.close(fd)
        return path

    @staticmethod
    def _remove(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def _shadow(self, name: str) -> None:
        self.facts["shadow_user"] = f"{name}:"
        if os.geteuid() != 0 or shutil.which("useradd") is None:
            self.missing["f03"] = "no line in /etc/shadow without root and `useradd`"
            return
        made = subprocess.run(["useradd", "-M", "-s", "/bin/false", name], capture_output=True, timeout=60, check=False)
        if made.returncode:
            self.missing["f03"] = f"`useradd` failed: {made.stderr.decode(errors='replace').strip()}"
            return
        self._stack.callback(subprocess.run, ["userdel", name], capture_output=True, timeout=60, check=False)

    def _processes(self) -> None:
        """The victim, and enough others that a process list of the machine is long."""
        for argument in (self.facts["victim"], *["100001"] * 20):
            process = subprocess.Popen(["sleep", argument], stdin=subprocess.DEVNULL)
            self._stack.callback(process.wait)
            self._stack.callback(process.kill)

    def _sockets(self, mark: str) -> None:
        server = self._stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.facts["port"] = server.getsockname()[1]
        # Not below /tmp's own private directories: whoever may pass the directory may connect.
        self.facts["socket"] = f"/tmp/minisandbox-probe-{mark}.socket"
        for address in (b"\0" + self.facts["abstract"].encode(), self.facts["socket"]):
            listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen(8)
        os.chmod(self.facts["socket"], 0o777)
        self._stack.callback(self._remove, self.facts["socket"])
        if not [n for _, n in socket.if_nameindex() if n != "lo"]:
            self.missing["n04"] = "this machine has no interface besides lo"

    def _segment(self) -> None:
        key = secrets.randbits(30) | 1
        segment = _libc.shmget(key, 4096, _IPC_CREAT | 0o666)
        self.facts["shm_key"] = key
        if segment < 0:
            self.missing["i01"] = "no SysV segment could be made"
        else:
            self._stack.callback(_libc.shmctl, segment, _IPC_RMID, None)

    @staticmethod
    def _root_disk() -> list[int]:
        """major:minor of what / is on; of the first block device where that is no disk of its own."""
        device = os.stat("/").st_dev
        if os.major(device) == 0:
            for entry in sorted(Path("/sys/block").glob("*")):
                return [int(part) for part in (entry / "dev").read_text().split(":")]
        return [os.major(device), os.minor(device)]

    # Afterwards

    def written(self) -> bool:
        """f04: whether the byte is in the machine's /tmp."""
        return os.path.lexists(self.facts["tmp_file"])


def outlived(argument: str, seconds: float = 1.0) -> bool:
    """r01: whether a process with this argument is still there after `seconds`."""
    time.sleep(seconds)
    return any(argument in line for line in command_lines())


def command_lines() -> Iterator[str]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield (Path("/proc") / name / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@contextlib.contextmanager
def planted_files(text: str) -> Iterator[list[str]]:
    """x29: readable files with a secret in the machine's /etc and /usr/local/share; as root only."""
    mark = secrets.token_hex(6)
    paths = [f"/etc/minisandbox-probe-{mark}", f"/usr/local/share/minisandbox-probe-{mark}"]
    if not os.path.exists("/etc/pip.conf"):
        paths.append("/etc/pip.conf")
    made: list[str] = []
    try:
        for path in paths:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            made.append(path)
            os.write(fd, f"# {text}\n".encode())
            os.fchmod(fd, 0o644)
            os.close(fd)
        yield made
    finally:
        for path in made:
            os.unlink(path)


@contextlib.contextmanager
def directory_for_all() -> Iterator[Path]:
    """A directory that every user may enter, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="ms-security-tests-", dir="/tmp"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
