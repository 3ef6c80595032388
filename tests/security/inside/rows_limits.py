"""h: what a process was started with; l: limits; r: what a rollout could leave behind or find."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import resource
import signal
import subprocess
import time
from typing import Any

from .common import BAD, INFO, OK, VARIABLE, WEAK, Verdict, in_child, row

_TIOCSTI = 0x5412
_SYS_ADMIN = 1 << 21
_MIB = 1 << 20


def _status(name: str) -> str:
    with open("/proc/self/status") as file:
        return next(line.split(":", 1)[1].strip() for line in file if line.startswith(f"{name}:"))


@row("h01")
def _no_new_privs(facts: dict[str, Any]) -> Verdict:
    value = _status("NoNewPrivs")
    return (OK if value == "1" else WEAK), value


@row("h02")
def _seccomp(facts: dict[str, Any]) -> Verdict:
    value = _status("Seccomp")
    return (OK if value == "2" else WEAK), value


@row("h03")
def _capabilities(facts: dict[str, Any]) -> Verdict:
    effective, bounding = int(_status("CapEff"), 16), int(_status("CapBnd"), 16)
    detail = f"effective {effective:x}, bounding {bounding:x}"
    if not bounding:
        return OK, detail
    return (BAD if effective & _SYS_ADMIN else WEAK), detail


@row("h04")
def _uid(facts: dict[str, Any]) -> Verdict:
    with open("/proc/self/uid_map") as file:
        outside = file.readline().split()[1]
    return (WEAK if outside == "0" and os.getuid() == 0 else OK), f"{os.getuid()} inside, map from {outside}"


@row("h05")
def _descriptors(facts: dict[str, Any]) -> Verdict:
    found = []
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except OSError:
                continue
            if not target.startswith("/proc/"):
                found.append(f"{name}: {target}")
    return (BAD, "; ".join(found)) if found else (OK, "none")


@row("h06")
def _environment(facts: dict[str, Any]) -> Verdict:
    others = [value for key, value in os.environ.items() if key != VARIABLE]
    return (BAD, "the token is there") if any(facts["token"] in value for value in others) else (OK, "absent")


def _push() -> str:
    fd = os.open("/dev/tty", os.O_RDWR)
    fcntl.ioctl(fd, _TIOCSTI, b"\0")
    return "pushed"


@row("h07")
def _tiocsti(facts: dict[str, Any]) -> Verdict:
    def in_a_pty() -> str:
        reading, writing = os.pipe()
        pid, master = pty.fork()
        if pid == 0:
            try:
                os.write(writing, _push().encode())
            except OSError as error:
                os.write(writing, f"error: {errno.errorcode.get(error.errno or 0, '?')}".encode())
            finally:
                os._exit(0)
        os.close(writing)
        text = os.read(reading, 100).decode()
        os.close(master)
        os.waitpid(pid, 0)
        return text

    for attempt in (_push, in_a_pty):
        text, _ = in_child(attempt)
        if text == "pushed":
            return BAD, "the terminal takes it"
    return OK, text


@row("h08")
def _core(facts: dict[str, Any]) -> Verdict:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        with open("/proc/sys/kernel/core_pattern") as file:
            pattern = file.read().strip()
    except OSError:
        pattern = "unreadable"
    return (OK if hard == 0 else WEAK), f"hard limit {hard}, core_pattern {pattern}"


@row("l01")
def _processes(facts: dict[str, Any]) -> Verdict:
    children: list[int] = []
    failed = ""
    try:
        for _ in range(700):
            pid = os.fork()
            if pid == 0:
                try:
                    time.sleep(20)
                finally:
                    os._exit(0)
            children.append(pid)
    except OSError as error:
        failed = errno.errorcode.get(error.errno or 0, "?")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    for pid in children:
        os.waitpid(pid, 0)
    return (OK, f"{failed} after {len(children)}") if failed else (WEAK, "700 alive")


@row("l02")
def _memory(facts: dict[str, Any]) -> Verdict:
    def fill() -> str:
        try:
            held = b"\1" * (700 * _MIB)
        except MemoryError:
            return "error: ENOMEM"
        return f"{len(held) // _MIB} MiB"

    text, status = in_child(fill)
    if os.WIFSIGNALED(status):
        return OK, f"killed by signal {os.WTERMSIG(status)}"
    return (OK if text.startswith("error: ") else WEAK), text


@row("l03")
def _disk(facts: dict[str, Any]) -> Verdict:
    path = "/var/tmp/.fill"
    block = b"\0" * (4 * _MIB)
    written = 0
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(100):
                left = memoryview(block)
                while left:
                    count = file.write(left)
                    left, written = left[count:], written + count
    finally:
        if os.path.exists(path):
            os.unlink(path)
    return WEAK, f"{written // _MIB} MiB written"


@row("l04")
def _rlimits(facts: dict[str, Any]) -> Verdict:
    names = ("NPROC", "NOFILE", "AS", "FSIZE", "CORE", "CPU")
    values = [f"{name} {resource.getrlimit(getattr(resource, f'RLIMIT_{name}'))[0]}" for name in names]
    return INFO, ", ".join(values)


@row("r01")
def _outlive(facts: dict[str, Any]) -> Verdict:
    if os.fork() == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.execv("/bin/sleep", ["sleep", facts["outliver"]])
        finally:
            os._exit(0)
    os.wait()
    return OK, "started; the host looks"


@row("r02")
def _site_packages(facts: dict[str, Any]) -> Verdict:
    with open(f"{facts['site_packages']}/{facts['pth']}", "w") as file:
        file.write("import sys\n")
    return OK, "written; the host looks"


@row("r03")
def _history(facts: dict[str, Any]) -> Verdict:
    counts = []
    for options in (["--all", "--oneline"], ["--oneline"]):
        try:
            done = subprocess.run(
                ["git", "-c", "safe.directory=*", "-C", "/testbed", "log", *options],
                capture_output=True, text=True, check=False,
            )
        except FileNotFoundError:
            return OK, "no git"
        counts.append(len(done.stdout.splitlines()))
    return (OK if counts == [1, 1] else WEAK), f"{counts[0]} of all, {counts[1]} of HEAD"


@row("r04")
def _paths(facts: dict[str, Any]) -> Verdict:
    environment = facts["site_packages"].split("/lib/")[0]
    places = ["/usr/local/bin", "/etc", "/usr/bin", f"{environment}/bin", facts["site_packages"]]
    found = [path for path in places if os.access(path, os.W_OK)]
    return (WEAK, " ".join(found)) if found else (OK, "none")
