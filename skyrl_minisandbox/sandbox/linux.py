"""The kernel's words: constants under their header names and one thin wrapper per system call.

The only module that knows numbers. Every wrapper raises `OSError` that carries the path. Numbers are from the
uapi headers of Linux 6.18; the system calls of 424 and up have one number on every architecture.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import signal
import socket
import struct

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_INTO_CGROUP = 0x200000000

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 0x00000001
MOUNT_ATTR_NOSUID = 0x00000002
MOUNT_ATTR_NODEV = 0x00000004
MOUNT_ATTR_IDMAP = 0x00100000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x00000004

# linux/fcntl.h
AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
# linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_GET_SECCOMP = 21
PR_SET_SECCOMP = 22
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
SECBIT_NO_SETUID_FIXUP = 4
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

# linux/capability.h
CAP_CHOWN = 0
CAP_DAC_OVERRIDE = 1
CAP_FOWNER = 3
CAP_FSETID = 4
CAP_KILL = 5
CAP_SETGID = 6
CAP_SETUID = 7
CAP_SETPCAP = 8
CAP_NET_BIND_SERVICE = 10
CAP_SETFCAP = 31
CAP_LAST_CAP = 63
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

# linux/sockios.h, linux/if.h
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1

# asm/unistd.h: 424 and up are the same everywhere
SYS_open_tree = 428
SYS_move_mount = 429
SYS_clone3 = 435
SYS_close_range = 436
SYS_openat2 = 437
SYS_mount_setattr = 442
SYS_pivot_root = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine, 41)
SYS_capget = {"x86_64": 125, "aarch64": 90}.get(os.uname().machine, 90)
SYS_capset = {"x86_64": 126, "aarch64": 91}.get(os.uname().machine, 91)

_libc = ctypes.CDLL(None, use_errno=True)
# PyDLL keeps the GIL: the child of clone3 must go on as the only thread, in a consistent interpreter.
_pylibc = ctypes.PyDLL(None, use_errno=True)
# Told once, as each init calls them dozens of times.
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


def _check(result: int, call: str, path: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", path)
    return result


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else os.fsencode(value)


def mount(source: str | None, target: str, fstype: str | None, flags: int, data: str | None = None) -> None:
    """mount(2). `data` is at most one page (4 KiB)."""
    result = _libc.mount(_bytes(source), _bytes(target), _bytes(fstype), flags, _bytes(data))
    _check(result, f"mount {fstype or 'bind'}", target)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    _check(_libc.umount2(_bytes(target), flags), "umount2", target)


def pivot_root(new_root: str, put_old: str) -> None:
    result = _libc.syscall(ctypes.c_long(SYS_pivot_root), _bytes(new_root), _bytes(put_old))
    _check(result, "pivot_root", new_root)


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def open_tree(path: str, flags: int = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC) -> int:
    """A detached copy of the mount at `path` (not of mounts below it), as a file descriptor. Linux 5.2."""
    result = _libc.syscall(ctypes.c_long(SYS_open_tree), AT_FDCWD, _bytes(path), ctypes.c_uint(flags))
    return _check(int(result), "open_tree", path)


def move_mount(from_fd: int, target: str) -> None:
    """Attach a detached mount. Linux 5.2."""
    result = _libc.syscall(
        ctypes.c_long(SYS_move_mount), from_fd, b"", AT_FDCWD, _bytes(target),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )
    _check(int(result), "move_mount", target)


def mount_setattr(fd: int, attr_set: int, userns_fd: int = 0) -> None:
    """Set attributes of the mount behind `fd`. Linux 5.12."""
    # struct mount_attr: attr_set, attr_clr, propagation, userns_fd
    attr = struct.pack("QQQQ", attr_set, 0, 0, userns_fd)
    result = _libc.syscall(
        ctypes.c_long(SYS_mount_setattr), fd, b"", ctypes.c_uint(AT_EMPTY_PATH), attr, ctypes.c_size_t(len(attr))
    )
    _check(int(result), "mount_setattr")


def clone3_as(uid: int, flags: int, cgroup: int = -1) -> tuple[int, int]:
    """clone3 for root, with `uid` as the owner of the new user namespace.

    The kernel charges what has a limit per user (128 inotify instances, queued signals, locked memory) to the owner of
    each namespace on the way up: as root's, one sandbox would use up what the machine's own programs and the other
    sandboxes need.
    """
    prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP)  # capabilities stay; a new user namespace starts without it
    os.setresuid(-1, uid, 0)
    pid = -1
    try:
        prctl(PR_SET_DUMPABLE, 1)  # lost with the id; init opens files of its own below /proc
        pid, pidfd = clone3(flags, cgroup)
    finally:
        if pid != 0:
            os.setresuid(-1, 0, 0)
            prctl(PR_SET_SECUREBITS, 0)
            prctl(PR_SET_DUMPABLE, 1)
    return pid, pidfd


def clone3(flags: int, cgroup: int = -1) -> tuple[int, int]:
    """Fork into new namespaces: (pid, pidfd) in the parent, (0, -1) in the child.

    cgroup: a descriptor of the cgroup (v2) that the child is to be in. The interpreter is told before and after, as
    os.fork does; the caller must be single-threaded.
    """
    pidfd = ctypes.c_int(-1)
    # struct clone_args, first version: 8 fields of 64 bits; the third has 11
    fields = [flags | CLONE_PIDFD, ctypes.addressof(pidfd), 0, 0, signal.SIGCHLD, 0, 0, 0]
    if cgroup >= 0:
        fields[0] |= CLONE_INTO_CGROUP
        fields += [0, 0, cgroup]
    arguments = struct.pack(f"{len(fields)}Q", *fields)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = _pylibc.syscall(ctypes.c_long(SYS_clone3), arguments, ctypes.c_size_t(len(arguments)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, f"clone3: {os.strerror(number)}")
    os.set_inheritable(pidfd.value, False)
    return pid, pidfd.value


def close_range(first: int, last: int = (1 << 32) - 1) -> None:
    """Close every descriptor from `first` to `last`. Linux 5.9."""
    if first <= last:
        _check(_libc.syscall(ctypes.c_long(SYS_close_range), ctypes.c_uint(first), ctypes.c_uint(last), 0),
               "close_range")


def open_below(directory: int, path: str, flags: int) -> int:
    """Open what lies below a directory, without following any link on the way or crossing a mount. Linux 5.6."""
    # struct open_how: flags, mode, resolve
    resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, 0, resolve)
    result = _libc.syscall(
        ctypes.c_long(SYS_openat2), directory, os.fsencode(path) or b".", how, ctypes.c_size_t(len(how))
    )
    return _check(int(result), "openat2", path)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> None:
    _check(_libc.prctl(option, arg2, arg3, arg4, arg5), f"prctl({option})")


def no_new_privs() -> bool:
    return bool(_libc.prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1)


def seccomp_mode() -> int:
    return int(_libc.prctl(PR_GET_SECCOMP, 0, 0, 0, 0))


def set_name(name: str) -> None:
    """The name that `ps` shows, at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def bound_capabilities(keep: tuple[int, ...]) -> None:
    """Drop everything but `keep` from the bounding set."""
    for capability in range(CAP_LAST_CAP + 1):
        if capability not in keep:
            try:
                prctl(PR_CAPBSET_DROP, capability)
            except OSError:
                break  # EINVAL: beyond this kernel's last capability


def set_capabilities(keep: tuple[int, ...]) -> None:
    """Drop everything but `keep` from the effective and permitted sets; inheritable and ambient to none."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    mask = sum(1 << capability for capability in keep)
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    # struct __user_cap_data_struct twice: effective, permitted, inheritable of bits 0-31, then of 32-63
    low, high = mask & 0xFFFFFFFF, mask >> 32
    data = struct.pack("IIIIII", low, low, 0, high, high, 0)
    _check(_libc.syscall(ctypes.c_long(SYS_capset), header, data), "capset")


def keep_capabilities() -> None:
    """Have every permitted capability after the next exec too, whatever the user id: inheritable and ambient."""
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.syscall(ctypes.c_long(SYS_capget), header, data), "capget")
    effective, permitted, _, effective_high, permitted_high, _ = struct.unpack("IIIIII", data.raw)
    told = struct.pack("IIIIII", effective, permitted, permitted, effective_high, permitted_high, permitted_high)
    _check(_libc.syscall(ctypes.c_long(SYS_capset), header, told), "capset")
    for capability in range(CAP_LAST_CAP + 1):
        if (permitted | permitted_high << 32) >> capability & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def capabilities() -> dict[str, int]:
    """The sets that are in force, as bit masks: effective, permitted, inheritable, bounding."""
    header = struct.pack("Ii", _LINUX_CAPABILITY_VERSION_3, 0)
    data = ctypes.create_string_buffer(24)
    _check(_libc.syscall(ctypes.c_long(SYS_capget), header, data), "capget")
    words = struct.unpack("IIIIII", data.raw)
    names = ("effective", "permitted", "inheritable")
    found = {name: words[index] | words[index + 3] << 32 for index, name in enumerate(names)}
    found["bounding"] = sum(
        1 << capability for capability in range(CAP_LAST_CAP + 1)
        if _libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1  # -1: beyond this kernel's last one
    )
    return found


def set_seccomp(program: bytes) -> None:
    """Install a BPF program (array of struct sock_filter) for this process and its children."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: unsigned short len; struct sock_filter *filter
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    holder = ctypes.create_string_buffer(fprog, len(fprog))
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(holder))


def receive_fds(sock: socket.socket, size: int, most: int) -> tuple[bytes, list[int], int]:
    """A message with its descriptors, which no exec inherits, and the flags of recvmsg(2). `socket.recv_fds` does the
    same, but loses the flag that closes them on exec (Python 3.11)."""
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(4 * most), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags


def read_small(path: str, most: int = 1 << 16) -> bytes:
    """A file of the kernel's, which one read gives whole. `open` takes five times as long, and commands wait for it."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, most)
    finally:
        os.close(fd)


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # struct ifreq: name, flags
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
