"""The filter as a program: run by a small BPF interpreter, for both architectures."""

from __future__ import annotations

import errno
import struct

import pytest

from skyrl_minisandbox.sandbox.seccomp import AUDIT_ARCH, RET_ALLOW, RET_ERRNO, RET_KILL_PROCESS, build_filter
from skyrl_minisandbox.sandbox.syscalls import ALLOWED, FILTERED

COLUMN = {"x86_64": 0, "aarch64": 1}


def judge(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """What the kernel would answer: interpret the program over a struct seccomp_data."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, AUDIT_ARCH[machine], 0, *[a & (1 << 64) - 1 for a in padded])
    code = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = word = 0
    while True:
        op, true, false, k = code[at]
        at += 1
        if op == 0x20:
            (word,) = struct.unpack_from("<I", data, k)
        elif op == 0x06:
            return k
        else:
            holds = {0x15: word == k, 0x25: word > k, 0x35: word >= k, 0x45: bool(word & k)}[op]
            at += true if holds else false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("single_id", [False, True])
def test_every_number_is_judged_by_the_table(machine: str, single_id: bool) -> None:
    program = build_filter(machine, single_id=single_id)
    special = set(FILTERED) | ({"chown", "lchown", "fchown", "fchownat", "setgroups"} if single_id else set())
    allowed = {n[COLUMN[machine]] for name, n in ALLOWED.items() if name not in special}
    judged = {n[COLUMN[machine]] for name, n in ALLOWED.items() if name in special}
    for number in range(470):
        if number in judged:
            continue
        expected = RET_ALLOW if number in allowed else RET_ERRNO | errno.EPERM
        assert judge(program, machine, number) == expected, number
    assert judge(program, machine, 600) == RET_ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_arguments_decide_where_they_must(machine: str) -> None:
    program = build_filter(machine, single_id=False)

    def number(name: str) -> int:
        found = ALLOWED[name][COLUMN[machine]]
        assert found is not None
        return found

    refused = RET_ERRNO | errno.EPERM
    assert judge(program, machine, number("clone"), 0x1200011) == RET_ALLOW
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert judge(program, machine, number("clone"), flag | 17) == refused
    assert judge(program, machine, number("clone3")) == RET_ERRNO | errno.ENOSYS
    assert judge(program, machine, number("ioctl"), 0, 0x5412) == refused
    assert judge(program, machine, number("ioctl"), 0, 0x5412 | 1 << 40) == refused
    assert judge(program, machine, number("ioctl"), 0, 0x5401) == RET_ALLOW
    for other in (0, 7):
        assert judge(program, machine, number("prlimit64"), other) == RET_ALLOW
    for init in (1, 1 | 1 << 40):
        assert judge(program, machine, number("prlimit64"), init) == refused
    assert judge(program, machine, number("ptrace"), 0) == RET_ALLOW
    assert judge(program, machine, number("ptrace"), 16) == refused
    assert judge(program, machine, number("ptrace"), 0x4206) == refused
    for family, protocol, verdict in ((1, 0, True), (2, 0, True), (10, 0, True), (16, 0, True), (16, 12, False),
                                      (17, 0, False), (40, 0, False), (38, 0, False)):
        assert (judge(program, machine, number("socket"), family, 3, protocol) == RET_ALLOW) is verdict, family
    assert judge(program, machine, number("personality"), 0x40000) == RET_ALLOW
    assert judge(program, machine, number("personality"), 0x400000) == refused


def test_another_architecture_is_killed_and_x32_is_refused() -> None:
    program = build_filter("x86_64", single_id=False)
    data_arch = {"x86_64": "aarch64", "aarch64": "x86_64"}
    for machine, other in data_arch.items():
        assert judge(build_filter(machine, single_id=False), other, 0) == RET_KILL_PROCESS
    assert judge(program, "x86_64", 0x40000000 + 39) == RET_ERRNO | errno.ENOSYS


def test_a_single_id_map_answers_chown_to_others_as_done() -> None:
    program = build_filter("x86_64", single_id=True)
    chown, fchownat = ALLOWED["chown"][0], ALLOWED["fchownat"][0]
    assert chown is not None and fchownat is not None
    assert judge(program, "x86_64", chown, 1, 1000, 1000) == RET_ERRNO
    assert judge(program, "x86_64", chown, 1, 0, 0) == RET_ALLOW
    assert judge(program, "x86_64", chown, 1, 0xFFFFFFFF, 0) == RET_ALLOW
    assert judge(program, "x86_64", chown, 1, 0, 5) == RET_ERRNO
    assert judge(program, "x86_64", fchownat, 1, 1, 0, 0) == RET_ALLOW
    assert judge(program, "x86_64", fchownat, 1, 1, 33, 33) == RET_ERRNO
