"""Rules of the rows: how a call is made, what a verdict is, and how an attempt is made in a child."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
from collections.abc import Callable
from typing import Any

OK, WEAK, BAD, INFO, ERR = "OK", "WEAK", "BAD", "INFO", "ERR"
VARIABLE = "MINISANDBOX_PROBE"  # one environment variable holds all that the rows must know
REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)

Verdict = tuple[str, str]
Row = Callable[[dict[str, Any]], Verdict]
ROWS: dict[str, Row] = {}

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
# Of libc's own wrapper the later arguments would be cut to an int.
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

# arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h; 424 and up are the same everywhere.
_NUMBERS = {
    "acct": (163, 89), "add_key": (248, 217), "adjtimex": (159, 171), "bpf": (321, 280), "clone": (56, 220),
    "clone3": (435, 435), "fsopen": (430, 430), "init_module": (175, 105), "io_uring_setup": (425, 425),
    "kexec_load": (246, 104), "keyctl": (250, 219), "mount": (165, 40), "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "perf_event_open": (298, 241), "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pivot_root": (155, 41),
    "process_vm_readv": (310, 270), "reboot": (169, 142), "rt_sigqueueinfo": (129, 138), "setns": (308, 268),
    "swapon": (167, 224), "syslog": (103, 116), "tgkill": (234, 131), "umount2": (166, 39), "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_COLUMN = 0 if platform.machine() == "x86_64" else 1


def number(name: str) -> int:
    return _NUMBERS[name][_COLUMN]


def call(name: str | int, *arguments: Any) -> int:
    """A system call by number. Raises `OSError`."""
    sent = [a if not isinstance(a, int) else ctypes.c_long(a) for a in arguments]
    result = int(libc.syscall(ctypes.c_long(number(name) if isinstance(name, str) else name), *sent))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def check(result: int) -> int:
    """The result of a libc wrapper. Raises `OSError`."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def row(name: str) -> Callable[[Row], Row]:
    """Register a row. A system error that it lets out is OK, any other exception is ERR."""

    def register(function: Row) -> Row:
        ROWS[name] = function
        return function

    return register


def judge(name: str, facts: dict[str, Any]) -> Verdict:
    try:
        return ROWS[name](facts)
    except OSError as error:
        return OK, f"{errno.errorcode.get(error.errno or 0, '?')}: {error.strerror}"
    except Exception as error:
        return ERR, repr(error)


def refused(attempt: Callable[[], int], *, descriptor: bool = False) -> Verdict:
    """OK only where the call is refused (EPERM, EACCES, ENOSYS): every other answer means that the kernel was asked."""
    try:
        result = attempt()
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        return (OK if error.errno in REFUSED else WEAK), name
    if descriptor:
        os.close(result)
    return WEAK, f"returned {result}"


def read(path: str, size: int = 1 << 16) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return os.read(fd, size)
    finally:
        os.close(fd)


def in_child(attempt: Callable[[], str]) -> tuple[str, int]:
    """Run in a forked child: (its text, its wait status). A system error is the text `error: NAME`."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reading)
            try:
                text = attempt()
            except OSError as error:
                text = f"error: {errno.errorcode.get(error.errno or 0, '?')}"
            os.write(writing, text.encode()[:4096])
        finally:
            os._exit(0)
    os.close(writing)
    told = bytearray()
    while chunk := os.read(reading, 4096):
        told += chunk
    os.close(reading)
    _, status = os.waitpid(pid, 0)
    return told.decode(errors="replace"), status


def processes() -> list[int]:
    """The numeric names of /proc but our own."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(os.environ[VARIABLE])
    return found


def report(name: str, verdict: Verdict) -> None:
    """One line a row, at once: what comes later may end us."""
    print(json.dumps([name, *verdict]), flush=True)


def run(names: list[str]) -> None:
    """Do rows in order and print each."""
    known = facts()
    for name in names:
        report(name, judge(name, known))
