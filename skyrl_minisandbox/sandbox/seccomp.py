"""The seccomp filter: default refusal, an allow list, and a few calls judged by their arguments.

A program is an array of `struct sock_filter` (8 bytes each), built here for one architecture so that both can
be tested on either.
"""

from __future__ import annotations

import errno
import functools
import struct

from skyrl_minisandbox.sandbox import linux
from skyrl_minisandbox.sandbox.syscalls import ALLOWED, FILTERED, LAST_KNOWN

# linux/audit.h
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMN = {"x86_64": 0, "aarch64": 1}
_X32_BIT = 0x40000000

# linux/seccomp.h
RET_KILL_PROCESS = 0x80000000
RET_ERRNO = 0x00050000
RET_ALLOW = 0x7FFF0000

# linux/bpf_common.h
_LD_W_ABS = 0x20
_JEQ = 0x15
_JGT = 0x25
_JGE = 0x35
_JSET = 0x45
_RET = 0x06

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6]
_NR, _ARCH, _ARGS = 0, 4, 16

_NAMESPACES = (
    linux.CLONE_NEWNS | linux.CLONE_NEWCGROUP | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUSER | linux.CLONE_NEWPID | linux.CLONE_NEWNET
)
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C  # asm-generic/ioctls.h: typing into a terminal that is not one's own
_PTRACE_ATTACH, _PTRACE_SEIZE = 16, 0x4206  # linux/ptrace.h; TRACEME stays: gdb and strace start their child
_FAMILIES = (1, 2, 10)  # linux/socket.h: AF_UNIX, AF_INET, AF_INET6
_AF_NETLINK, _NETLINK_ROUTE = 16, 0
# linux/personality.h: PER_LINUX, PER_LINUX32, UNAME26 of both, ADDR_NO_RANDOMIZE (gdb), "tell me"
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)

Instruction = tuple[int, int, int, int]


def _ins(code: int, k: int, jt: int = 0, jf: int = 0) -> Instruction:
    return (code, jt, jf, k)


def _low(argument: int) -> Instruction:
    """Load the low half of an argument; both architectures are little-endian."""
    return _ins(_LD_W_ABS, _ARGS + 8 * argument)


def _refuse(number: int) -> Instruction:
    return _ins(_RET, RET_ERRNO | number)


_ALLOW = _ins(_RET, RET_ALLOW)


def _one_of(values: tuple[int, ...], number: int) -> list[Instruction]:
    """Allow when the loaded word is one of `values`, else refuse with `number`."""
    block: list[Instruction] = []
    for value in values:
        block += [_ins(_JEQ, value, 0, 1), _ALLOW]
    return [*block, _refuse(number)]


def _none_of(values: tuple[int, ...], number: int) -> list[Instruction]:
    block: list[Instruction] = []
    for value in values:
        block += [_ins(_JEQ, value, 0, 1), _refuse(number)]
    return [*block, _ALLOW]


def _owner_block(first: int) -> list[Instruction]:
    """chown with a single-id map: to an id that does not exist here is answered 0, as mkosi does, so that package
    managers go on; 0 and -1 reach the kernel."""
    pretend = _refuse(0)
    block: list[Instruction] = []
    for argument in (first, first + 1):
        block += [_low(argument), _ins(_JEQ, 0, 2, 0), _ins(_JEQ, 0xFFFFFFFF, 1, 0), pretend]
    return [*block, _ALLOW]


def _blocks(single_id: bool) -> dict[str, list[Instruction]]:
    """System call name -> instructions that end in a return on every way."""
    blocks = {
        "clone": [_low(0), _ins(_JSET, _NAMESPACES, 0, 1), _refuse(errno.EPERM), _ALLOW],
        # The flags of clone3 are behind a pointer, out of a filter's sight; libc falls back to clone.
        "clone3": [_refuse(errno.ENOSYS)],
        "ioctl": [_low(1), *_none_of((_TIOCSTI, _TIOCLINUX), errno.EPERM)],
        "personality": [_low(0), *_one_of(_PERSONALITIES, errno.EPERM)],
        # Not init's: it has the same user, and with few descriptors it could start and freeze nothing any more.
        "prlimit64": [_low(0), *_none_of((1,), errno.EPERM)],
        "ptrace": [_low(0), *_none_of((_PTRACE_ATTACH, _PTRACE_SEIZE), errno.EPERM)],
        "socket": [
            _low(0), _ins(_JEQ, _AF_NETLINK, 0, 4), _low(2), _ins(_JEQ, _NETLINK_ROUTE, 0, 1), _ALLOW,
            _refuse(errno.EPROTONOSUPPORT), *_one_of(_FAMILIES, errno.EAFNOSUPPORT),
        ],
    }
    assert set(blocks) == FILTERED
    if single_id:
        blocks.update(
            chown=_owner_block(1), lchown=_owner_block(1), fchown=_owner_block(1), fchownat=_owner_block(2),
            # The kernel refuses it in such a namespace; apt's methods and su call it.
            setgroups=[_refuse(0)],
        )
    return blocks


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


@functools.cache
def build_filter(machine: str, *, single_id: bool) -> bytes:
    """The filter for `machine` (`x86_64` or `aarch64`) as an array of struct sock_filter.

    single_id: only one user id is mapped, so changing owners is answered as done.
    Raises `KeyError` for another architecture.
    """
    column = _COLUMN[machine]
    blocks = _blocks(single_id)
    program = [
        _ins(_LD_W_ABS, _ARCH),
        _ins(_JEQ, AUDIT_ARCH[machine], 1, 0),
        _ins(_RET, RET_KILL_PROCESS),
        _ins(_LD_W_ABS, _NR),
    ]
    if machine == "x86_64":
        program += [_ins(_JGE, _X32_BIT, 0, 1), _refuse(errno.ENOSYS)]
    for name, block in blocks.items():
        number = ALLOWED[name][column]
        if number is not None:
            program += [_ins(_JEQ, number, 0, len(block)), *block]
    plain = [numbers[column] for name, numbers in ALLOWED.items() if name not in blocks]
    # Ascending, so a number below a range and above the one before it belongs to none.
    for first, last in _ranges([number for number in plain if number is not None]):
        program += [
            _ins(_JGT, last, 3, 0), _ins(_JGE, first, 0, 1), _ALLOW, _refuse(errno.EPERM),
        ]
    program += [_ins(_JGT, LAST_KNOWN, 0, 1), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
