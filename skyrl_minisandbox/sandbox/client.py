"""The owner's side of the launcher: starts it, asks it, and turns what it lacks into an error with a way out."""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import errno
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from typing import IO, Any, Protocol

from skyrl_minisandbox.errors import MachineError, SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import linux
from skyrl_minisandbox.sandbox.launcher import CONTROL_FD
from skyrl_minisandbox.sandbox.sealed import BOOT

# The launcher answers in milliseconds; a loaded machine may take longer to start a Python. Seconds.
START_TIMEOUT = 60.0
ANSWER_TIMEOUT = 120.0
LAST_MOMENT = 1.0  # from the end of its first sandbox to its own
PIPE_TIMEOUT = 1800.0  # a compiled scientific environment has gigabytes, and its reader compresses them

_PACKAGE_ROOT = str(Path(__file__).resolve().parent.parent.parent)

_HINTS = {
    "userns": "user namespaces are switched off: as root `sysctl -w user.max_user_namespaces=65536`, and where they "
    "exist `kernel.unprivileged_userns_clone=1` and `kernel.apparmor_restrict_unprivileged_userns=0`; in Kubernetes "
    "allow them or run the pod privileged",
    "mounts": "mounting needs CAP_SYS_ADMIN or a user namespace that is allowed to mount; in a pod set "
    "`procMount: Unmasked` or run it privileged",
    "proc": "in a pod set `procMount: Unmasked` or run it privileged; `sandbox.allow_degraded=[proc]` runs with an "
    "empty /proc inside: programs that look there fail, and only a process group, not its tree, is killed at a timeout",
    "overlay": "Linux 5.12 or newer with overlayfs, and a directory whose file system can hold an overlay upper "
    "(ext4, xfs, btrfs, tmpfs; not NFS, FUSE or another overlay): set `images.cache=DIR`",
}


class _Forked(Protocol):
    def forked(self) -> None:
        """Called in a forked child of the owner: let go of what is the owner's, and touch nothing of it."""


class _Box(Protocol):
    def cut(self) -> None:
        """The launcher has ended: let init see its owner's end close."""


# What a forked child of this process must let go of. Its locks may be held by threads that it does not have.
_owned: weakref.WeakSet[_Forked] = weakref.WeakSet()


def explain(message: str, number: int, lacks: str) -> SandboxError | SandboxGone | MachineError:
    """The error for what the launcher told."""
    if number == errno.ENOSPC and lacks == "userns":
        message += " (the limit on namespaces is reached)"
    if lacks == "sandbox":
        return SandboxGone(message)
    if number == errno.EMFILE:
        return SandboxError(message, hint="raise the limit on open files before this starts: `ulimit -n 65536`")
    if lacks:
        return MachineError(message, hint=_HINTS.get(lacks, "run `minisandbox doctor`"))
    return SandboxError(message, hint="run `minisandbox doctor`")


def _disown(future: concurrent.futures.Future[tuple[dict[str, Any], list[int]]]) -> None:
    """An answer that came too late is nobody's: its descriptors are closed, and a sandbox ends."""
    if future.exception() is None:
        for fd in future.result()[1]:
            os.close(fd)


def _launcher_env() -> dict[str, str]:
    """Nothing, but for an interpreter that cannot start without: `module load python` sets where its library lies."""
    path = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": path} if path else {}


class LauncherClient:
    """One launcher process. Thread-safe; a fork of this process cannot use it (see `shared`).

    Raises `MachineError` when the machine cannot make sandboxes, with what mends it.
    """

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise MachineError(f"sandboxes need Linux; this is {sys.platform}", hint="run this on a Linux machine")
        self._lock = threading.Lock()
        self._pending: dict[int, concurrent.futures.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._number = 0
        self._closed = False
        self._silent = False  # it did not answer in time, so that no new sandbox is asked of it
        self._boxes: weakref.WeakSet[_Box] = weakref.WeakSet()
        self._released: collections.deque[int] = collections.deque()  # frozen layers that nobody holds any more
        self._log = tempfile.TemporaryFile()
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.owner_pid = os.getpid()
        keep_from_children(self)
        with theirs:
            self._process = self._start(theirs)
        started: concurrent.futures.Future[tuple[dict[str, Any], list[int]]] = concurrent.futures.Future()
        self._pending[0] = started
        threading.Thread(target=self._receive, name="minisandbox-launcher", daemon=True).start()
        try:
            answer, _ = started.result(START_TIMEOUT)
        except concurrent.futures.TimeoutError:
            self.close()
            raise SandboxError(f"the launcher did not start within {START_TIMEOUT:.0f} s") from None
        if "error" in answer:
            self.close()
            raise explain(answer["error"], answer["errno"], answer["lacks"])
        self.facts: dict[str, Any] = answer["facts"]

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # subprocess can place standard descriptors only: the socket comes as stdin, and the first statement moves it.
        boot = f"import os;os.dup2(0,{CONTROL_FD});os.dup2(os.open(os.devnull,os.O_RDONLY),0);{BOOT}"
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", "-c", boot, _PACKAGE_ROOT],
            stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=self._log, env=_launcher_env(), cwd="/",
            close_fds=True,
        )

    def _receive(self) -> None:
        """Hand answers to those who wait, until the launcher's end closes."""
        while True:
            try:
                data, fds, flags = linux.receive_fds(self._sock, 1 << 20, 8)
            except OSError:
                data, fds, flags = b"", [], 0
            if not data:
                break
            answer = json.loads(data)
            if flags & socket.MSG_CTRUNC:  # the kernel found no number for a descriptor that came along
                text = "no descriptor is free in this process for what the launcher sent"
                answer = {"number": answer["number"], "error": text, "errno": errno.EMFILE, "lacks": ""}
            with self._lock:
                future = self._pending.pop(answer["number"], None)
            if future is not None and "error" not in answer:
                future.set_result((answer, fds))
                continue
            for fd in fds:
                os.close(fd)
            if future is not None:
                future.set_result((answer, []))
        self._process.wait()  # a zombie would keep its cgroup directory from being swept
        with self._lock:
            self._closed = True
            left, self._pending = list(self._pending.values()), {}
            boxes = list(self._boxes)
        for box in boxes:  # an init that was just being made has no lifeline to the launcher yet
            box.cut()
        for future in left:
            future.set_exception(SandboxError(f"the launcher has ended{self._last_words()}"))

    def _last_words(self) -> str:
        try:
            self._log.seek(0)
            lines = self._log.read().decode(errors="replace").strip().splitlines()
        except (OSError, ValueError):
            return ""
        return f": {lines[-1]}" if lines else ""

    def ask(
        self, verb: str, fds: tuple[int, ...] = (), timeout: float | None = None, **request: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Send a request and wait: (answer, descriptors). Raises `SandboxError` or `MachineError`.

        timeout: seconds; None for `ANSWER_TIMEOUT`.
        """
        timeout = ANSWER_TIMEOUT if timeout is None else timeout
        future: concurrent.futures.Future[tuple[dict[str, Any], list[int]]] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise SandboxError(f"the launcher has ended{self._last_words()}")
            self._number += 1
            number = self._number
            self._pending[number] = future
        data = json.dumps({"number": number, "verb": verb, **request}).encode()
        try:
            socket.send_fds(self._sock, [data], fds)
        except OSError as error:
            with self._lock:
                self._pending.pop(number, None)
            raise SandboxError(f"the launcher does not take requests: {error.strerror}{self._last_words()}") from error
        try:
            answer, received = future.result(timeout)
        except BaseException as error:  # Ctrl-C too
            future.add_done_callback(_disown)
            if isinstance(error, concurrent.futures.TimeoutError):
                self._silent = True
                raise SandboxError(f"the launcher did not answer `{verb}` within {timeout:.0f} s") from None
            raise
        if "error" in answer:
            raise explain(answer["error"], answer["errno"], answer["lacks"])
        return answer, received

    def tell(self, verb: str, **request: Any) -> None:
        """Send a request whose answer nobody waits for."""
        with contextlib.suppress(OSError):  # the launcher has ended, which others are told
            self._sock.sendmsg([json.dumps({"number": 0, "verb": verb, **request}).encode()])

    def adopt(self, box: _Box) -> None:
        """Cut its socket when the launcher ends. Raises `SandboxGone` when it has."""
        with self._lock:
            if not self._closed:
                self._boxes.add(box)
                return
        box.cut()
        raise SandboxGone(f"the launcher has ended{self._last_words()}")

    def forked(self) -> None:
        """In a forked child: the launcher and everything it made stay the parent's."""
        self._closed = True
        self._lock = threading.Lock()
        self._sock.close()

    def pipe(self, verb: str, file: IO[bytes], **request: Any) -> int:
        """Have the launcher write into a file of ours; 0, or the errno of what kept it from that.

        Raises as `ask` does, and what writing to `file` raises.
        """
        read, write = os.pipe2(os.O_CLOEXEC)
        failed: list[BaseException] = []

        def copy() -> None:
            try:
                with open(read, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 18)
            except BaseException as error:  # a full disk where it goes: told below
                failed.append(error)

        copier = threading.Thread(target=copy, name=f"minisandbox-{verb}")
        copier.start()
        try:
            with open(write, "wb") as ours:
                # The copier ends at EOF, which comes when the launcher's descriptor and ours are closed.
                answer, _ = self.ask(verb, (ours.fileno(),), PIPE_TIMEOUT, **request)
        finally:
            copier.join()
        if failed:
            raise failed[0]
        return int(answer["code"])

    def release(self, layer: int) -> None:
        """A frozen layer is not needed any more. Called by the garbage collector, so it only takes note."""
        self._released.append(layer)

    def forget_released(self) -> None:
        """Have the launcher drop the layers that were released."""
        layers = []
        with contextlib.suppress(IndexError):
            while True:
                layers.append(self._released.popleft())
        if layers:
            with contextlib.suppress(SandboxError):  # it has ended, and they with it
                self.ask("release", layers=layers)

    @property
    def alive(self) -> bool:
        return not self._closed and self.owner_pid == os.getpid()

    @property
    def answers(self) -> bool:
        """Whether it may be asked for more sandboxes: it lives, and has answered in time so far."""
        return self.alive and not self._silent

    @property
    def pid(self) -> int:
        return self._process.pid

    def has_ended(self) -> bool:
        """Whether it is dead. Its sandboxes may be seen to end a moment before it can be seen itself."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.alive or bool(select.select([process], [], [], LAST_MOMENT)[0])
        finally:
            os.close(process)

    def close(self) -> None:
        """End the launcher and every sandbox it made; waits for it. Idempotent."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


_shared: LauncherClient | None = None
_silent: list[LauncherClient] = []  # shared before; their sandboxes may live on
_shared_lock = threading.Lock()


def keep_from_children(thing: _Forked) -> None:
    """Have `thing.forked` called in every child that this process forks, for as long as it lives."""
    _owned.add(thing)


def _forked() -> None:
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()
    _silent.clear()
    for thing in list(_owned):
        thing.forked()
    _owned.clear()


os.register_at_fork(after_in_child=_forked)


def shared() -> LauncherClient:
    """The launcher of this process, started on first use; anew after a fork, or when it died or does not answer."""
    global _shared
    with _shared_lock:
        if _shared is None or not _shared.answers:
            _silent.extend([_shared] if _shared is not None and _shared.alive else [])
            _shared = None
            _shared = LauncherClient()
        return _shared


def tmpfs_holds_upper() -> bool:
    """Whether a sandbox's upper can be a tmpfs here; without that `SandboxSpec.scratch` is needed (Linux 6.1
    and before, for a plain user). Raises `MachineError` where no sandbox can be made at all."""
    return bool(shared().facts["tmpfs_upper"])


def owner_shift(directory: Path) -> int:
    """What must be added to the owners of layers unpacked below `directory`, so that a sandbox sees them as they are.

    0 where the kernel id-maps mounts of that file system under an overlay, and for a plain user; else the base of our
    range of ids. Raises `MachineError` where no sandbox can be made at all.
    """
    answer, _ = shared().ask("owner_shift", path=os.path.realpath(directory))
    return int(answer["shift"])


def shutdown_launcher() -> None:
    """End what `shared` has given, and with it every sandbox made through it."""
    global _shared
    with _shared_lock:
        clients = [*_silent, *([_shared] if _shared is not None else [])]
        _shared = None
        _silent.clear()
    for client in clients:
        if client.owner_pid == os.getpid():
            client.close()


atexit.register(shutdown_launcher)
