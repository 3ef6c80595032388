"""Attempts on init and on other sandboxes: `python3 -m inside.hostile ROW …`. OK or BAD, as for the probes.

Beyond a row's own attempt nothing here is needed by the test: what the host sees, the test looks at itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from typing import Any

from .common import BAD, OK, Verdict, call, check, libc, processes, read, row, run

_ATTACH, _SEIZE = 16, 0x4206  # linux/ptrace.h
_F_SETSIG = 10
# linux/sched.h: mount, cgroup, uts, ipc, user, pid, net, time
_NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x80)


def _none_works(attempts: dict[str, Callable[[], Any]]) -> Verdict:
    worked = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        worked.append(name)
    return (BAD, "; ".join(worked)) if worked else (OK, f"{len(attempts)} attempts refused")


def _open(path: str, flags: int) -> Callable[[], Any]:
    return lambda: os.open(path, flags)


@row("x01")
def _environ(facts: dict[str, Any]) -> Verdict:
    """Of init, and of every process between fork and exec while the host starts commands: until /tmp/x01.stop."""
    token, looked = "".join(facts["halves"]).encode(), 0  # whole it would be in our own environment
    while True:
        for pid in [1, *processes()]:
            try:
                text = read(f"/proc/{pid}/environ")
            except OSError:
                continue
            looked += 1
            if token in text:
                return BAD, f"token in the environment of process {pid}"
        if not facts.get("spin") or os.path.exists("/tmp/x01.stop"):
            return OK, f"{looked} environments read"


@row("x02")
def _memory(facts: dict[str, Any]) -> Verdict:
    local = ctypes.create_string_buffer(64)
    here = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(local), 64))
    there = ctypes.create_string_buffer(struct.pack("PN", 0x400000, 64))

    def steal() -> None:
        pidfd = call("pidfd_open", 1, 0)
        for fd in range(32):
            try:
                call("pidfd_getfd", pidfd, fd, 0)
            except OSError:
                continue
            return
        raise OSError("none")

    return _none_works({
        "read": _open("/proc/1/mem", os.O_RDONLY), "write": _open("/proc/1/mem", os.O_RDWR),
        "process_vm_readv": lambda: call("process_vm_readv", 1, here, 1, there, 1, 0),
        "attach": lambda: check(libc.ptrace(_ATTACH, 1, None, None)),
        "seize": lambda: check(libc.ptrace(_SEIZE, 1, None, None)), "pidfd_getfd": steal,
    })


@row("x03")
def _descriptors(facts: dict[str, Any]) -> Verdict:
    attempts: dict[str, Callable[[], Any]] = {
        name: lambda name=name: os.listdir(f"/proc/1/{name}") for name in ("fd", "fdinfo")  # type: ignore[misc]
    }
    for fd in range(64):
        attempts[f"readlink {fd}"] = lambda fd=fd: os.readlink(f"/proc/1/fd/{fd}")  # type: ignore[misc]
        for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_NONBLOCK, os.O_PATH):
            attempts[f"open {fd} {flags}"] = _open(f"/proc/1/fd/{fd}", flags)
        attempts[f"fdinfo {fd}"] = _open(f"/proc/1/fdinfo/{fd}", os.O_RDONLY)
    return _none_works(attempts)


@row("x04")
def _program(facts: dict[str, Any]) -> Verdict:
    attempts: dict[str, Callable[[], Any]] = {"readlink": lambda: os.readlink("/proc/1/exe")}
    for flags in (os.O_PATH, os.O_RDONLY, os.O_WRONLY):
        attempts[f"open {flags}"] = _open("/proc/1/exe", flags)
    return _none_works(attempts)


@row("x05")
def _directory(facts: dict[str, Any]) -> Verdict:
    return _none_works({
        "cwd": lambda: os.listdir("/proc/1/cwd"), "root": lambda: os.listdir("/proc/1/root"),
        "chdir": lambda: os.chdir("/proc/1/cwd"),
        "secret": lambda: read("/proc/1/cwd/../../" + facts["secret"]),
        "secret through root": lambda: read("/proc/1/root/../.." + facts["secret"]),
    })


@row("x06")
def _maps(facts: dict[str, Any]) -> Verdict:
    found = []
    for name in ("maps", "smaps", "smaps_rollup", "numa_maps", "auxv", "stack", "syscall", "pagemap", "patch_state"):
        try:
            if read(f"/proc/1/{name}"):
                found.append(name)
        except OSError:
            continue
    try:
        found += os.listdir("/proc/1/map_files")
    except OSError:
        pass
    return (BAD, " ".join(found)) if found else (OK, "nothing told")


@row("x10")
def _sockets(facts: dict[str, Any]) -> Verdict:
    """Whatever descriptors of whatever process can be had: none is a socket of an init."""
    found: list[str] = []
    for pid in [1, *processes()]:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            names = [str(fd) for fd in range(64)]
        for name in names:
            try:
                found.append(os.readlink(f"/proc/{pid}/fd/{name}"))
            except OSError:
                pass
            try:
                os.close(call("pidfd_getfd", call("pidfd_open", pid, 0), int(name), 0))
            except OSError:
                continue
            return BAD, f"descriptor {name} of process {pid} was taken"
    hit = sorted({link for link in found if link in facts.get("sockets", [])})
    return (BAD, " ".join(hit)) if hit else (OK, f"{len(found)} descriptors seen")


@row("x15")
def _core_pattern(facts: dict[str, Any]) -> Verdict:
    def write(path: str) -> Callable[[], Any]:
        def attempt() -> None:
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, b"|/x")

        return attempt

    os.makedirs("/tmp/proc", exist_ok=True)
    libc.mount(b"proc", b"/tmp/proc", b"proc", ctypes.c_ulong(0), None)
    path = "/proc/sys/kernel/core_pattern"
    return _none_works({p: write(p) for p in (path, f"/proc/self/root{path}", f"/proc/1/root{path}",
                                              "/tmp/proc/sys/kernel/core_pattern")})


@row("x22")
def _signals(facts: dict[str, Any]) -> Verdict:
    """Everything that can be sent to init; that it lives is for the test to see."""
    pidfd = call("pidfd_open", 1, 0)
    information = ctypes.create_string_buffer(128)
    # Last the one that init is interrupted by: it kills everybody else inside, us too.
    for number in sorted(range(1, 65), key=lambda one: one == signal.SIGUSR1):
        struct.pack_into("iii", information, 0, number, 0, -1)  # SI_QUEUE
        for attempt in (
            lambda n: os.kill(1, n), lambda n: call("tgkill", 1, 1, n),
            lambda n: call("rt_sigqueueinfo", 1, n, information),
            lambda n: call("pidfd_send_signal", pidfd, n, None, 0),
        ):
            try:
                attempt(number)
            except OSError:
                continue
    for number in (0, signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
        reading, writing = os.pipe()
        try:
            fcntl.fcntl(reading, fcntl.F_SETOWN, 1)
            fcntl.fcntl(reading, _F_SETSIG, number)
            fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
            os.write(writing, b"x")
        except OSError:
            continue
    time.sleep(0.1)
    os.kill(1, 0)
    return OK, "sent"


@row("x23")
def _exhaust(facts: dict[str, Any]) -> Verdict:
    """100,000 attempts at namespaces, each of which must be refused."""
    made, count = [], 0
    inside = os.open("/proc/self/ns/uts", os.O_RDONLY)
    for _ in range(100_000 // (4 * len(_NAMESPACES))):
        for flag in _NAMESPACES:
            arguments = ctypes.create_string_buffer(struct.pack("QQQQQ", flag, 0, 0, 0, signal.SIGCHLD), 64)
            for name, parameters in (
                ("unshare", (flag,)), ("clone", (flag | signal.SIGCHLD, 0, 0, 0, 0)), ("clone3", (arguments, 64)),
                ("setns", (inside, flag)),
            ):
                if name == "clone" and flag == 0x80:
                    continue  # of clone(2) these bits are the signal
                count += 1
                try:
                    pid = call(name, *parameters)
                except OSError:
                    continue
                if pid == 0 and name.startswith("clone"):
                    os._exit(0)
                made.append(f"{name} {flag:#x}")
    return (BAD, "; ".join(sorted(set(made)))) if made else (OK, f"{count} refused")


@row("x26")
def _leaked(facts: dict[str, Any]) -> Verdict:
    """The first code of a command: no descriptor leads out, and the working directory is a place of ours."""
    found = []
    if os.getcwd().startswith("(unreachable)"):
        found.append(os.getcwd())
    for fd in range(256):
        for up in ("", "../../..", "../../../../../../.."):
            try:
                inner = os.open(f"{up}{facts['secret']}".lstrip("/"), os.O_RDONLY, dir_fd=fd)
            except OSError:
                continue
            found.append(f"secret by descriptor {fd}")
            os.close(inner)
    return (BAD, "; ".join(found)) if found else (OK, os.getcwd())


if __name__ == "__main__":
    run(sys.argv[1:])
