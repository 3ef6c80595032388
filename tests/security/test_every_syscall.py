"""Every system call number, tried with junk from inside and judged by the filter's program on both architectures.

Beside it stands the default profile of container engines (Debian's golang-github-containers-common): what that refuses
a container without extra capabilities, ours refuses, but for calls that are newer than the profile.
"""

from __future__ import annotations

import errno
import json
import platform
from collections.abc import Mapping
from typing import Any

import pytest

from skyrl_minisandbox.sandbox.seccomp import RET_ALLOW, build_filter
from skyrl_minisandbox.sandbox.syscalls import ALLOWED
from tests.sandbox.test_seccomp import judge
from tests.security.conftest import Yard
from tests.support import needs, seccomp_profile, seconds

MACHINES = {"x86_64": 0, "aarch64": 1}
HIGHEST = 1024

# Newer than the profile (Debian 12, 2022), harmless by their own kind, and allowed by later releases of it: sizes of
# caches, futexes, attributes by descriptor, a mode without following links, guards on one's own memory.
NEWER = {
    "cachestat", "fchmodat2", "file_getattr", "file_setattr", "futex_requeue", "futex_wait", "futex_waitv",
    "futex_wake", "getxattrat", "listxattrat", "map_shadow_stack", "mseal", "removexattrat", "setxattrat",
}
# Refused whatever a profile says, with their numbers: what reaches deep into the kernel or out of a namespace.
NEVER = {
    "acct": (163, 89), "add_key": (248, 217), "bpf": (321, 280), "chroot": (161, 51), "clock_settime": (227, 112),
    "delete_module": (176, 106), "fanotify_init": (300, 262), "finit_module": (313, 273), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fsopen": (430, 430), "fspick": (433, 433), "init_module": (175, 105),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "io_uring_setup": (425, 425), "ioperm": (173, None),
    "iopl": (172, None), "kcmp": (312, 272), "kexec_file_load": (320, 294), "kexec_load": (246, 104),
    "keyctl": (250, 219), "listmount": (458, 458), "lookup_dcookie": (212, 18), "memfd_secret": (447, 447),
    "mount": (165, 40), "mount_setattr": (442, 442), "move_mount": (429, 429), "move_pages": (279, 239),
    "open_by_handle_at": (304, 265), "open_tree": (428, 428), "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241), "pidfd_getfd": (438, 438), "pivot_root": (155, 41),
    "process_madvise": (440, 440), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "reboot": (169, 142), "request_key": (249, 218),
    "setdomainname": (171, 162), "sethostname": (170, 161), "setns": (308, 268), "settimeofday": (164, 170),
    "statmount": (457, 457), "swapoff": (168, 225), "swapon": (167, 224), "syslog": (103, 116),
    "umount2": (166, 39), "unshare": (272, 97), "userfaultfd": (323, 282), "vhangup": (153, 58),
}
# x86-64's uretprobe and uprobe, which Linux lets past every filter since 6.14 (kernel/seccomp.c): who calls them
# without a probe having put them there gets a signal or ENXIO.
PAST_EVERY_FILTER = {335, 336} if platform.machine() == "x86_64" else set()
# Of these the arguments decide; tests/sandbox/test_seccomp.py has each.
JUDGED = {"clone", "clone3", "ioctl", "personality", "prlimit64", "ptrace", "socket"}


def allowed_by(profile: Mapping[str, Any], machine: str) -> set[str]:
    """Names that the profile allows, with whatever arguments, to a container without a capability."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[machine]
    found: set[str] = set()
    for rule in profile["syscalls"]:
        includes = rule.get("includes") or {}
        if rule["action"] != "SCMP_ACT_ALLOW" or includes.get("caps"):
            continue
        if not includes.get("arches") or architecture in includes["arches"]:
            found |= set(rule["names"])
    return found


@needs("seccomp_json")
@pytest.mark.parametrize("machine", MACHINES)
def test_what_container_engines_refuse_is_refused(machine: str) -> None:
    engines = allowed_by(json.loads(seccomp_profile().read_text()), machine)
    program = build_filter(machine, single_id=False)
    ours = set()
    for name, numbers in ALLOWED.items():
        number = numbers[MACHINES[machine]]
        if number is not None and (name in JUDGED or judge(program, machine, number) == RET_ALLOW):
            ours.add(name)
    assert len(engines) > 300 and len(ours) > 200
    beyond = ours - engines
    print(f"{machine}: {len(ours)} calls are allowed here, {len(engines)} there; only here: {sorted(beyond)}")
    assert beyond <= NEWER, f"allowed here and refused by container engines: {sorted(beyond - NEWER)}"


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("single_id", [False, True])
def test_what_must_never_be_allowed_is_refused_on_every_architecture(machine: str, single_id: bool) -> None:
    program = build_filter(machine, single_id=single_id)
    for name, numbers in NEVER.items():
        number = numbers[MACHINES[machine]]
        assert name not in ALLOWED, name
        if number is not None:
            for argument in (0, 1, (1 << 64) - 1):
                assert judge(program, machine, number, argument, argument, argument) & 0xFFFF0000 == 0x50000, name


def test_every_number_is_refused_or_allowed_as_the_table_says(yard: Yard) -> None:
    """With junk, from inside: the kernel's answer is the filter's wherever the filter refuses."""
    machine = platform.machine()
    if machine not in MACHINES:
        pytest.skip(f"no table for {machine}")
    sandbox = yard.open()
    done = yard.python(sandbox, "inside.every_syscall", "0", str(HIGHEST), timeout=120)
    assert done.exit_code == 0, done.output[-1000:]
    # Not the merged output: a child of vfork may smash the stack that it shares, which libc says on stderr.
    answers: dict[str, int | None] = json.loads(done.stdout)
    assert len(answers) == HIGHEST
    program = build_filter(machine, single_id=bool(yard.launcher.facts["single_id"]))
    junk = (1 << 64) - 4096
    wrong, refused, reached = [], 0, 0
    for number in range(HIGHEST):
        judged = judge(program, machine, number, *[junk] * 6)
        answer = answers[str(number)]
        if judged == RET_ALLOW:
            reached += answer != errno.EPERM
            continue
        refused += 1
        if answer != judged & 0xFFFF and not (number in PAST_EVERY_FILTER and answer in (None, errno.ENXIO)):
            wrong.append(f"{number}: the filter says {judged & 0xFFFF}, the kernel {answer}")
    print(f"{refused} of {HIGHEST} numbers were refused by the filter; {reached} reached the kernel")
    assert not wrong, wrong
    assert reached > 150  # junk did reach the kernel where it may: the refusals are the filter's
    assert sandbox.run("echo on", timeout=seconds(20)).output == "on\n"
