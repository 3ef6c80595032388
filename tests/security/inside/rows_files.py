"""f: file systems, mounts and devices; k: what the kernel tells."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from typing import Any

from .common import BAD, OK, REFUSED, WEAK, Verdict, call, check, in_child, libc, read, row

_MNT_DETACH = 2
_SOCKETS = (
    "/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/podman/podman.sock",
)
_DEVICES = ("vda", "mem", "kmem", "port", "loop-control", "kmsg", "fuse", "kvm", "vsock", "nvram")


def _opens(path: str, flags: int = os.O_WRONLY) -> Verdict:
    os.close(os.open(path, flags))
    return BAD, f"{path} opens"


def _has_secret(facts: dict[str, Any], text: bytes) -> Verdict:
    return (BAD, "secret text read") if facts["secret_text"].encode() in text else (OK, "other text")


def _absent(path: str) -> Verdict:
    os.lstat(path)
    return BAD, f"{path} is there"


@row("f01")
def _secret(facts: dict[str, Any]) -> Verdict:
    return _has_secret(facts, read(facts["secret"]))


@row("f02")
def _root_canary(facts: dict[str, Any]) -> Verdict:
    return _absent(facts["root_canary"])


@row("f03")
def _shadow(facts: dict[str, Any]) -> Verdict:
    found = facts["shadow_user"].encode() in read("/etc/shadow", 1 << 20)
    return (BAD, "the planted line is there") if found else (OK, "line absent")


@row("f04")
def _host_tmp(facts: dict[str, Any]) -> Verdict:
    fd = os.open(facts["tmp_file"], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(fd, b"x")
    os.close(fd)
    return OK, "written; the host looks"


@row("f05")
def _state(facts: dict[str, Any]) -> Verdict:
    there = os.path.isdir(facts["state_directory"])
    return (BAD, "is a directory") if there else (OK, "not there")


@row("f06")
def _sockets(facts: dict[str, Any]) -> Verdict:
    found = [path for path in _SOCKETS if os.path.exists(path)]
    return (BAD, ", ".join(found)) if found else (OK, "none")


@row("f07")
def _mount(facts: dict[str, Any]) -> Verdict:
    os.makedirs("/tmp/.mp", exist_ok=True)
    check(libc.mount(b"t", b"/tmp/.mp", b"tmpfs", ctypes.c_ulong(0), None))
    libc.umount2(b"/tmp/.mp", _MNT_DETACH)
    return WEAK, "mounted"


@row("f08")
def _umount(facts: dict[str, Any]) -> Verdict:
    with open("/proc/mounts") as file:
        points = [line.split()[1] for line in file if line.split()[1].startswith("/proc/")]
    if not points:
        return WEAK, "no mount below /proc/"
    check(libc.umount2(os.fsencode(points[-1]), _MNT_DETACH))
    return BAD, f"{points[-1]} unmounted"


@row("f09")
def _mknod(facts: dict[str, Any]) -> Verdict:
    os.mknod("/tmp/.blk", stat.S_IFBLK | 0o600, os.makedev(*facts["disk"]))
    return _opens("/tmp/.blk", os.O_RDONLY)


@row("f10")
def _devices(facts: dict[str, Any]) -> Verdict:
    found = []
    for name in _DEVICES:
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            continue
        found.append(name)
    return (BAD, " ".join(found)) if found else (OK, "none opens")


@row("f11")
def _chroot(facts: dict[str, Any]) -> Verdict:
    def escape() -> str:
        os.makedirs("/tmp/.cr", exist_ok=True)
        fd = os.open("/", os.O_RDONLY)
        os.chroot("/tmp/.cr")
        os.fchdir(fd)
        for _ in range(64):
            os.chdir("..")
        os.chroot(".")
        return read(facts["secret"]).decode(errors="replace")

    text, _ = in_child(escape)
    return _has_secret(facts, text.encode()) if not text.startswith("error: ") else (OK, text)


@row("f12")
def _handle(facts: dict[str, Any]) -> Verdict:
    mount = os.open("/etc/hostname", os.O_RDONLY)
    handle = ctypes.create_string_buffer(struct.pack("Ii8s", 8, 1, b"\2" + b"\0" * 7), 16)
    try:
        os.close(call("open_by_handle_at", mount, handle, os.O_RDONLY))
    except OSError as error:
        name = os.strerror(error.errno or 0)
        return (OK if error.errno in REFUSED else WEAK), name
    finally:
        os.close(mount)
    return BAD, "opened"


@row("f13")
def _sysctl(facts: dict[str, Any]) -> Verdict:
    return _opens("/proc/sys/kernel/core_pattern")


@row("f14")
def _sysrq(facts: dict[str, Any]) -> Verdict:
    return _opens("/proc/sysrq-trigger")


@row("f15")
def _sys(facts: dict[str, Any]) -> Verdict:
    return _opens("/sys/kernel/mm/transparent_hugepage/enabled")


@row("f16")
def _cgroup(facts: dict[str, Any]) -> Verdict:
    for place in ("/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"):
        try:
            os.mkdir(f"{place}/.probe")
            os.rmdir(f"{place}/.probe")
        except OSError:
            continue
        if os.path.ismount(place):
            return BAD, f"made in {place}"
    return OK, "none"


@row("f17")
def _release_agent(facts: dict[str, Any]) -> Verdict:
    for name in os.listdir("/sys/fs/cgroup"):
        try:
            return _opens(f"/sys/fs/cgroup/{name}/release_agent")
        except OSError:
            continue
    return OK, "none opens"


@row("f18")
def _debugfs(facts: dict[str, Any]) -> Verdict:
    found = []
    for name in ("debug", "tracing", "security"):
        try:
            if os.listdir(f"/sys/kernel/{name}"):
                found.append(name)
        except OSError:
            continue
    return (BAD, " ".join(found)) if found else (OK, "none")


def _told(path: str) -> Verdict:
    text = read(path, 4096)
    return (WEAK, f"{len(text)} bytes") if text else (OK, "0 bytes")


def _telling(name: str, path: str) -> None:
    row(name)(lambda facts: _told(path))


for _name, _path in (("k01", "kcore"), ("k03", "keys"), ("k04", "timer_list"), ("k05", "interrupts"), ("k06", "kmsg")):
    _telling(_name, f"/proc/{_path}")


@row("k02")
def _kallsyms(facts: dict[str, Any]) -> Verdict:
    text = read("/proc/kallsyms", 4096)
    if not text or text.startswith(b"0" * 16):
        return OK, f"{len(text)} bytes"
    return WEAK, text[:40].decode(errors="replace")


@row("k07")
def _syslog(facts: dict[str, Any]) -> Verdict:
    buffer = ctypes.create_string_buffer(64)
    return WEAK, f"{call('syslog', 3, buffer, 64)} bytes"
