"""p: processes of the machine, and of the one who controls us."""

from __future__ import annotations

import os
from typing import Any

from .common import BAD, OK, WEAK, Verdict, check, libc, processes, read, row

_ATTACH, _DETACH, _SEIZE = 16, 17, 0x4206  # linux/ptrace.h


def _victim(facts: dict[str, Any]) -> int:
    """The pid of the machine's process with the unique argument; 0 when it is out of sight."""
    for pid in processes():
        try:
            if facts["victim"].encode() in read(f"/proc/{pid}/cmdline"):
                return pid
        except OSError:
            continue
    return 0


@row("p01")
def _seen(facts: dict[str, Any]) -> Verdict:
    pid = _victim(facts)
    return (BAD, f"pid {pid}") if pid else (OK, "not found")


@row("p02")
def _signal(facts: dict[str, Any]) -> Verdict:
    pid = _victim(facts)
    if not pid:
        return OK, "not visible"
    os.kill(pid, 0)
    return BAD, f"pid {pid}"


@row("p03")
def _ptrace(facts: dict[str, Any]) -> Verdict:
    pid = _victim(facts)
    if not pid:
        return OK, "not visible"
    check(libc.ptrace(_ATTACH, pid, None, None))
    os.waitpid(pid, 0)
    libc.ptrace(_DETACH, pid, None, None)
    return BAD, f"pid {pid}"


@row("p04")
def _root_of_init(facts: dict[str, Any]) -> Verdict:
    text = read("/proc/1/root" + facts["secret"])
    return (BAD, "read") if facts["secret_text"].encode() in text else (OK, "other text")


@row("p05")
def _count(facts: dict[str, Any]) -> Verdict:
    count = len(processes()) + 1
    return (BAD if count >= 20 else OK), f"{count} processes"


@row("p06")
def _memory_of_parent(facts: dict[str, Any]) -> Verdict:
    os.close(os.open(f"/proc/{os.getppid()}/mem", os.O_RDWR))
    return WEAK, "opens"


@row("p07")
def _seize_parent(facts: dict[str, Any]) -> Verdict:
    for request in (_SEIZE, _ATTACH):  # ATTACH beyond what the row asks: seizing was not all
        try:
            check(libc.ptrace(request, os.getppid(), None, None))
        except OSError:
            continue
        return WEAK, f"request {request:#x} returned 0"
    return OK, "refused"
