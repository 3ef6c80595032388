"""Attempts to gain privileges and to call what nobody inside may call; what each process may use."""

from __future__ import annotations

import fcntl
import functools
import os
import platform
import pty
import resource
import signal
from typing import Any

from skyrl_minisandbox.sandbox.check.attempts import REFUSED, Lacking, Outcome, attempt, call, libc, read, status

# What nobody inside may call, by family: name -> (number on x86-64, on arm64, arguments that harm nothing). Numbers of
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_NEWUSER = 0x10000000  # linux/sched.h
CALLS: dict[str, dict[str, tuple[int, int, tuple[Any, ...]]]] = {
    "calls-mounting": {
        "mount": (165, 40, (b"t", b"/tmp", b"tmpfs", 0, None)), "umount2": (166, 39, (b"/proc", 2)),
        "pivot_root": (155, 41, (b"/none", b"/none")), "chroot": (161, 51, (b"/tmp",)),
        "open_tree": (428, 428, (-100, b"/", 1)), "move_mount": (429, 429, (-1, b"", -1, b"", 0)),
        "fsopen": (430, 430, (b"tmpfs", 0)), "fsmount": (432, 432, (-1, 0, 0)),
        "mount_setattr": (442, 442, (-1, b"", 0, None, 0)),
    },
    "calls-namespaces": {
        "unshare": (272, 97, (_NEWUSER,)), "setns": (308, 268, (-1, 0)),
        "clone": (56, 220, (_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)), "clone3": (435, 435, (None, 0)),
    },
    "calls-bpf-and-perf": {
        "bpf": (321, 280, (0, None, 0)), "perf_event_open": (298, 241, (None, 0, -1, -1, 0)),
    },
    "calls-keyrings": {
        "add_key": (248, 217, (b"user", b"x", b"x", 1, -3)), "request_key": (249, 218, (b"user", b"x", None, 0)),
        "keyctl": (250, 219, (0, -3, 0)),
    },
    "calls-io_uring": {
        "io_uring_setup": (425, 425, (1, None)), "io_uring_enter": (426, 426, (-1, 0, 0, 0, None, 0)),
        "io_uring_register": (427, 427, (-1, 0, None, 0)),
    },
    "calls-memory-of-others": {
        "process_vm_readv": (310, 270, (os.getppid(), None, 0, None, 0, 0)), "kcmp": (312, 272, (1, 1, 0, 0, 0)),
        "process_vm_writev": (311, 271, (os.getppid(), None, 0, None, 0, 0)), "pidfd_getfd": (438, 438, (0, 0, 0)),
        "userfaultfd": (323, 282, (1,)),
    },
    "calls-machine": {
        "init_module": (175, 105, (None, 0, b"")), "finit_module": (313, 273, (-1, b"", 0)),
        "kexec_load": (246, 104, (0, 0, None, 0xFFFF)), "reboot": (169, 142, (0, 0, 0, None)),
        "swapon": (167, 224, (b"/nonexist", 0)), "acct": (163, 89, (b"/nonexist",)),
        "clock_settime": (227, 112, (0, None)), "open_by_handle_at": (304, 265, (-1, None, 0)),
        "syslog": (103, 116, (3, None, 0)), "quotactl": (179, 60, (0, None, 0, None)),
    },
}
# capability.h: DAC_READ_SEARCH, NET_ADMIN, NET_RAW, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_ADMIN, SYS_BOOT, SYS_TIME,
# MKNOD, MAC_ADMIN, SYSLOG, PERFMON, BPF, CHECKPOINT_RESTORE
_DANGEROUS = (2, 12, 13, 16, 17, 19, 21, 22, 25, 27, 33, 34, 38, 39, 40)


def _calls(family: str, known: dict[str, Any]) -> Outcome:
    if platform.machine() not in ("x86_64", "aarch64"):
        raise Lacking(f"no table of system calls for {platform.machine()}")
    through = []
    for name, (amd, arm, arguments) in CALLS[family].items():
        pid = os.fork()  # so that what gets through changes nothing for the attempts to come
        if pid == 0:
            try:
                call(amd if platform.machine() == "x86_64" else arm, *arguments)
            except OSError as error:
                os._exit(0 if error.errno in REFUSED else 1)
            os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) > 0:
            through.append(name)
    return f"reached the kernel: {', '.join(through)}" if through else None


for _family, _promise in (
    ("calls-mounting", "nothing can be mounted, unmounted or rooted elsewhere"),
    ("calls-namespaces", "no namespace can be made or entered"),
    ("calls-bpf-and-perf", "no bpf program and no performance counter"),
    ("calls-keyrings", "no keyring of the kernel"),
    ("calls-io_uring", "no io_uring, which no filter sees into"),
    ("calls-memory-of-others", "no call into another process's memory or descriptors"),
    ("calls-machine", "no module, reboot, swap, clock, quota or kernel log"),
):
    attempt(_family, _promise)(functools.partial(_calls, _family))


# Privileges


@attempt("no-new-privs", "no program gains privileges")
def no_new_privs(known: dict[str, Any]) -> Outcome:
    value = libc.prctl(39, 0, 0, 0, 0)  # PR_GET_NO_NEW_PRIVS, linux/prctl.h
    return None if value == 1 else f"it is {value}"


@attempt("filter", "the filter of system calls is in force")
def filter_in_force(known: dict[str, Any]) -> Outcome:
    value = libc.prctl(21, 0, 0, 0, 0)  # PR_GET_SECCOMP
    return None if value == 2 or status()["Seccomp"] == "2" else f"Seccomp is {value}"


@attempt("capabilities", "no dangerous capability can be had")
def capabilities(known: dict[str, Any]) -> Outcome:
    # capget knows nothing of the bounding set; PR_CAPBSET_READ does, and needs no /proc.
    held = [number for number in _DANGEROUS if libc.prctl(23, number, 0, 0, 0) == 1]
    return f"the bounding set holds {held}" if held else None


@attempt("outside-id", "nobody inside is the machine's root")
def outside_id(known: dict[str, Any]) -> Outcome:
    try:
        lines = [line.split() for kind in "ug" for line in read(f"/proc/self/{kind}id_map").splitlines()]
    except OSError as error:
        raise Lacking("/proc is empty inside") from error
    return "an id inside is the machine's 0" if any(int(line[1]) == 0 for line in lines) else None


@attempt("ptrace", "no running process can be attached to")
def ptrace_attach(known: dict[str, Any]) -> Outcome:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # one's own child: no Yama forbids that
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    through = []
    try:
        for name, request in (("ATTACH", 16), ("SEIZE", 0x4206)):
            if libc.ptrace(request, pid, None, None) == 0:
                through.append(name)
                break
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)
    return f"ptrace {through[0]} works" if through else None


@attempt("tiocsti", "nothing is typed into a terminal")
def typing_into_terminals(known: dict[str, Any]) -> Outcome:
    pid, master = pty.fork()
    if pid == 0:
        try:
            fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI, asm-generic/ioctls.h
        except OSError:
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(master)
    return "TIOCSTI works" if code else None


@attempt("x32", "no other system call ABI")
def x32(known: dict[str, Any]) -> Outcome:
    if platform.machine() != "x86_64":
        raise Lacking("x86-64 only")
    return "x32 system calls work" if call(0x40000000 + 39) > 0 else None


# Limits of each process


@attempt("descriptors", "no descriptor is inherited")
def descriptors(known: dict[str, Any]) -> Outcome:
    found = []
    for number in range(3, 256):
        try:
            fcntl.fcntl(number, fcntl.F_GETFD)
            found.append(str(number))
        except OSError:
            continue
    return f"inherited: {', '.join(found)}" if found else None


@attempt("open-files", "the limit on open files is in force", works=True)
def open_files(known: dict[str, Any]) -> Outcome:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if 0 <= hard <= known["open_files"] else f"the hard limit is {hard}"


@attempt("core-size", "the limit on core dumps is in force", works=True)
def core_size(known: dict[str, Any]) -> Outcome:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    return None if 0 <= hard <= known["core"] else f"the hard limit is {hard}"


@attempt("shared-memory", "/dev/shm holds shared memory", works=True)
def shared_memory(known: dict[str, Any]) -> Outcome:
    # After `descriptors`: it leaves one of its own.
    from multiprocessing import shared_memory as module

    block = module.SharedMemory(create=True, size=4096)
    assert block.buf is not None
    block.buf[:5] = b"bytes"
    block.close()
    block.unlink()
    return None
