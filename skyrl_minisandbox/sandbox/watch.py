"""Uppers on disk have no quota, so a process of the launcher's looks at them: what is beyond its limits is told.

It walks by descriptors, so that no name an agent chose leads anywhere, and rests three times as long as a walk took.
What it cannot see: files that were deleted and are still open, and what lies deeper than `_DEEPEST` directories.
This is the one place that polls: a file system tells nobody that a tree has grown.
"""

from __future__ import annotations

import math
import os
import select
import signal
import socket
import stat
import struct
import time
from typing import NoReturn

from skyrl_minisandbox.sandbox import linux

_PAUSE = 1.0  # seconds between two walks, at least
_DEEPEST = 1000  # each level holds a descriptor; no path in use is deeper than PATH_MAX / 2
_BLOCK = 512  # of st_blocks (stat(3type))
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_WATCH = struct.Struct("qqq")  # number, bytes, inodes; a descriptor beside it, or none: forget that number
_OVER = struct.Struct("q")


class Watcher:
    """The launcher's side. The process starts with the first upper and ends with the launcher."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._watched: dict[int, tuple[int, int, int]] = {}  # number -> descriptor, bytes, inodes

    def fileno(self) -> int:
        """Readable when something is beyond its limits; -1 while nothing is watched."""
        return self._sock.fileno() if self._sock is not None else -1

    def watch(self, number: int, upper: int, disk: int, inodes: int) -> None:
        """Look at a directory until `forget`; its descriptor stays the caller's. Raises `OSError`."""
        if self._sock is None:
            self._start()
        self._watched[number] = upper, disk, inodes
        self._tell(number)

    def forget(self, number: int) -> None:
        if self._watched.pop(number, None) is not None:
            self._tell(number)

    def over(self) -> list[int]:
        """What is beyond its limits, each told once. Starts the process anew when it has ended."""
        assert self._sock is not None
        try:
            data = self._sock.recv(_OVER.size)
        except ConnectionResetError:
            data = b""
        if data:
            (number,) = _OVER.unpack(data)
            return [number] if self._watched.pop(number, None) else []
        self._sock.close()
        self._start()
        for number in self._watched:
            self._tell(number)
        return []

    def _tell(self, number: int) -> None:
        assert self._sock is not None
        upper, disk, inodes = self._watched.get(number, (-1, 0, 0))
        try:
            socket.send_fds(self._sock, [_WATCH.pack(number, disk, inodes)], [upper] if upper >= 0 else [])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended: `over` starts it anew, with all there is to watch

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        launcher = os.getpid()
        with theirs:
            if os.fork() == 0:
                _be_watcher(theirs, launcher)
        self._sock = ours


def _be_watcher(sock: socket.socket, launcher: int) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.set_name("minisandbox-w")
        fd = os.dup2(sock.detach(), 0, inheritable=False)
        linux.close_range(1)  # the launcher's sockets above all: their ends are others' lifelines
        if os.getppid() == launcher:
            os.nice(5)
            _loop(socket.socket(fileno=fd))
    finally:
        os._exit(0)


def _loop(sock: socket.socket) -> None:
    places: dict[int, tuple[int, int, int]] = {}
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    due = 0.0
    while True:
        wait = max(due - time.monotonic(), 0) * 1000 if places else None
        if poll.poll(wait):
            data, fds, _ = linux.receive_fds(sock, _WATCH.size, 1)
            if not data:
                return
            number, disk, inodes = _WATCH.unpack(data)
            if number in places:
                os.close(places.pop(number)[0])
            for fd in fds:
                places[number] = os.open(".", _DIRECTORY, dir_fd=fd), disk, inodes
                os.close(fd)
            continue
        began = time.monotonic()
        for number, (fd, disk, inodes) in list(places.items()):
            if is_beyond(fd, disk, inodes):
                os.close(places.pop(number)[0])
                sock.send(_OVER.pack(number))
        now = time.monotonic()
        due = now + max(_PAUSE, 3 * (now - began))


def is_beyond(top: int, disk: int, inodes: int) -> bool:
    """Whether a tree takes more than so many bytes of its disk, or has more than so many entries."""
    size, count = measure(top, disk, inodes)
    return size > disk or count > inodes


def measure(top: int, disk: float = math.inf, inodes: float = math.inf) -> tuple[int, int]:
    """What a tree takes: (bytes of its disk, entries). What is beyond these is not measured further."""
    size, count = 0.0, 0
    # (descriptor, its directories that are still to be opened); depth first, so that few are open at once
    stack: list[tuple[int, list[str]]] = []
    try:
        fd = os.dup(top)
        while True:
            below: list[str] = []
            stack.append((fd, below))
            try:
                with os.scandir(fd) as entries:
                    for entry in entries:
                        status = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                        directory = stat.S_ISDIR(status.st_mode)
                        count += 1
                        # A file of several names is counted in parts: they all lie in this tree.
                        size += status.st_blocks * _BLOCK / (1 if directory else max(status.st_nlink, 1))
                        if size > disk or count > inodes:
                            return math.ceil(size), count
                        if directory and len(stack) < _DEEPEST:
                            below.append(entry.name)
            except OSError:
                pass  # it is going while we look
            fd = -1
            while fd < 0:
                while stack and not stack[-1][1]:
                    os.close(stack.pop()[0])
                if not stack:
                    return math.ceil(size), count
                try:
                    fd = os.open(stack[-1][1].pop(), _DIRECTORY, dir_fd=stack[-1][0])
                except OSError:
                    continue
    finally:
        for held, _ in stack:
            os.close(held)
