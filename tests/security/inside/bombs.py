"""Things that use up a machine, bounded by the limits that the test gives: `python3 -m inside.bombs NAME [ARGUMENT]`.

Each prints the name of the error that stopped it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator

_MIB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
_PLACES = ("/", "/tmp", "/var/tmp", "/dev/shm")


def _until_an_error(step: Callable[[], object]) -> str:
    try:
        while True:
            step()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")


def fork() -> list[str]:
    """Two children per process, without end. Every process tells once that it could not."""
    told = False
    while True:
        try:
            for _ in range(2):
                os.fork()
        except OSError as error:
            if not told:
                told = True
                os.write(1, f"{errno.errorcode.get(error.errno or 0, '?')}\n".encode())
            time.sleep(0.01)


def children() -> Iterator[str]:
    """64 of them, 32 MiB each, all touched, all alive together."""
    pids = []
    for _ in range(64):
        pid = os.fork()
        if pid == 0:
            try:
                held = b"\1" * (32 * _MIB)
                time.sleep(2)
                del held
            except MemoryError:
                os._exit(1)
            finally:
                os._exit(0)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    yield f"{sum(status != 0 for status in statuses)} of 64 ended early"


def tmpfs() -> Iterator[str]:
    file = open("/dev/shm/bomb", "wb", buffering=0)
    yield _until_an_error(lambda: file.write(b"\1" * _MIB))


def memfd() -> Iterator[str]:
    held = [os.memfd_create(f"bomb{n}") for n in range(16)]
    for _ in range(128):  # 2 GiB at most
        for fd in held:
            try:
                os.write(fd, b"\1" * _MIB)
            except OSError as error:
                yield errno.errorcode.get(error.errno or 0, "?")
                return
    yield "2 GiB"


def sysv() -> Iterator[str]:
    _libc.shmat.restype = ctypes.c_void_p
    for _ in range(32):
        segment = _libc.shmget(0, 64 * _MIB, 0o1666)
        address = _libc.shmat(segment, None, 0) if segment >= 0 else None
        if segment < 0 or address in (None, ctypes.c_void_p(-1).value):
            yield errno.errorcode.get(ctypes.get_errno(), "?")
            return
        ctypes.memset(address, 1, 64 * _MIB)
    yield "2 GiB"


def pipes() -> Iterator[str]:
    held = []

    def step() -> None:
        held.append(os.pipe())
        os.set_blocking(held[-1][1], False)
        try:
            while True:
                os.write(held[-1][1], b"\1" * 65536)
        except BlockingIOError:
            pass

    yield _until_an_error(step)


def disk() -> Iterator[str]:
    """Until an error, in each place: by writing, in many files, by fallocate, and through a sparse mapping."""
    count = 0

    def small(place: str) -> None:
        nonlocal count
        count += 1
        fd = os.open(f"{place}/bomb{count}", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(fd, b"\1" * 65536)
            os.write(fd, b"\1" * 65536)
        finally:
            os.close(fd)

    for place in _PLACES:
        if not os.access(place, os.W_OK):
            yield f"{place}: not writable"
            continue
        fd = os.open(f"{place}/fallocate", os.O_RDWR | os.O_CREAT, 0o644)
        size = 0

        def grow(fd: int = fd) -> None:
            nonlocal size
            os.posix_fallocate(fd, size, 4 * _MIB)
            size += 4 * _MIB

        yield f"{place}: {_until_an_error(grow)} {_until_an_error(lambda place=place: small(place))}"  # type: ignore[misc]
        os.close(fd)
    # A store into a hole that has no room is SIGBUS: in a child.
    pid = os.fork()
    if pid == 0:
        try:
            fd = os.open("/tmp/sparse", os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(fd, 1 << 30)
            view = mmap.mmap(fd, 1 << 30)
            for at in range(0, 1 << 30, 4096):
                view[at] = 1
        except OSError:
            os._exit(1)
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    yield f"sparse: signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"sparse: exit {status >> 8}"


def inodes() -> Iterator[str]:
    """Files, directories, links and hard links until an error, in each place."""
    for place in _PLACES:
        top = f"{place}/inodes"
        try:
            os.mkdir(top)
        except OSError as error:
            yield f"{place}: {errno.errorcode.get(error.errno or 0, '?')}"
            continue
        count = 0

        def step(top: str = top) -> None:
            nonlocal count
            count += 1
            os.close(os.open(f"{top}/f{count}", os.O_WRONLY | os.O_CREAT, 0o644))
            os.mkdir(f"{top}/d{count}")
            os.symlink("x", f"{top}/s{count}")
            os.link(f"{top}/f{count}", f"{top}/h{count}")

        yield f"{place}: {_until_an_error(step)}"


def files(count: int) -> Iterator[str]:
    """That many small files in directories of 1,000, or up to the limit."""
    for at in range(count):
        try:
            if at % 1000 == 0:
                os.makedirs(f"/testbed/many/{at // 1000}", exist_ok=True)
            fd = os.open(f"/testbed/many/{at // 1000}/{at}", os.O_WRONLY | os.O_CREAT, 0o644)
            os.write(fd, b"x")
            os.close(fd)
        except OSError as error:
            yield f"{errno.errorcode.get(error.errno or 0, '?')} after {at}"
            return
    yield f"made {count}"


if __name__ == "__main__":
    for line in globals()[sys.argv[1]](*map(int, sys.argv[2:])):
        print(line, flush=True)
