"""The root of a sandbox, seen from its own mount namespace: a list of steps, each of which can say what it does.

Runs in init, between clone3 and the drop of privileges. The launcher's tmpfs is `/`, the host is below `/host`,
the overlay comes as a detached mount. Every mount point is below NEW_ROOT and is refused when the image made it a link:
nothing of the image may lead a mount elsewhere (CVE-2021-30465).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

from skyrl_minisandbox.sandbox import linux
from skyrl_minisandbox.sandbox.limits import tmpfs_size

NEW_ROOT = "/m"
HOST = "/host"
# A waiting init has a root of its own, a tmpfs with nothing of the machine in it, and there what is ready. Before that
# root is entered, the same is seen below NEW_ROOT.
_PROC, _DEV = "/p", "/d"
_PROC_AHEAD, _DEV_AHEAD = NEW_ROOT + _PROC, NEW_ROOT + _DEV
PRIVATE = "/dev/.minisandbox"  # files of the shell; below our own /dev, so in every image and in no layer

_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
}
# What container runtimes mask (runtime-spec's defaults of runc and podman), and what probes found readable.
_MASKED = (
    "kcore", "keys", "kallsyms", "kmsg", "timer_list", "timer_stats", "sched_debug", "interrupts", "latency_stats",
    "kpagecount", "kpageflags", "kpagecgroup", "slabinfo", "vmallocinfo", "softirqs", "schedstat",
)
_MASKED_DIRECTORIES = ("acpi", "asound", "scsi", "driver", "pressure", "dynamic_debug")
_READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger", "tty")

_FLAGS = linux.MS_NOSUID | linux.MS_NODEV


class Step:
    """One mount operation; `describe` is what a debugging person reads, and what an error names."""

    def __init__(self, describe: str, execute: Callable[[], None]) -> None:
        self.describe = describe
        self.execute = execute


def safe_target(path: str, *, directory: bool = True) -> str:
    """`path` below NEW_ROOT, made if missing; refused if any part of it is a link or of the wrong kind."""
    current = NEW_ROOT
    parts = [part for part in path.split("/") if part]
    for index, part in enumerate(parts):
        current = f"{current}/{part}"
        wants_directory = directory or index < len(parts) - 1
        try:
            mode = os.lstat(current).st_mode
        except FileNotFoundError:
            if wants_directory:
                os.mkdir(current, 0o755)
            else:
                os.close(os.open(current, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            continue
        if stat.S_ISLNK(mode):
            raise OSError(0, f"the image has a link at /{'/'.join(parts[: index + 1])}, where a mount belongs")
        if wants_directory != stat.S_ISDIR(mode):
            raise OSError(0, f"the image has the wrong kind of file at /{'/'.join(parts[: index + 1])}")
    return current


def _attach(fd: int, target: str) -> None:
    linux.move_mount(fd, target)
    os.close(fd)


def _waiting_room() -> None:
    linux.mount("tmpfs", NEW_ROOT, "tmpfs", _FLAGS, "mode=755,size=64k")
    for path in (NEW_ROOT, _PROC, _DEV):
        os.mkdir(NEW_ROOT + path)


def _dev(single_id: bool) -> None:
    linux.mount("tmpfs", _DEV_AHEAD, "tmpfs", linux.MS_NOSUID, "mode=755,size=4m,nr_inodes=4096")
    for name in _DEVICES:
        os.close(os.open(f"{_DEV_AHEAD}/{name}", os.O_CREAT | os.O_CLOEXEC, 0o666))
        linux.mount(f"{HOST}/dev/{name}", f"{_DEV_AHEAD}/{name}", None, linux.MS_BIND)
    for name, target in _LINKS.items():
        os.symlink(target, f"{_DEV_AHEAD}/{name}")
    for name in ("pts", "shm", ".minisandbox"):
        os.mkdir(f"{_DEV_AHEAD}/{name}", 0o755)
    owner = "" if single_id else ",gid=5"
    linux.mount("devpts", f"{_DEV_AHEAD}/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC,
                f"newinstance,ptmxmode=0666,mode=620{owner}")
    linux.mount("tmpfs", f"{_DEV_AHEAD}/.minisandbox", "tmpfs", _FLAGS | linux.MS_NOEXEC,
                "mode=711,size=64m,nr_inodes=1024")


def _mask(name: str) -> None:
    path = f"{_PROC_AHEAD}/{name}"
    if os.path.lexists(path):
        linux.mount(f"{HOST}/dev/null", path, None, linux.MS_BIND)


def _proc() -> None:
    linux.mount("proc", _PROC_AHEAD, "proc", _FLAGS | linux.MS_NOEXEC)
    for name in _MASKED:
        _mask(name)
    for name in _MASKED_DIRECTORIES:
        if os.path.isdir(f"{_PROC_AHEAD}/{name}"):
            linux.mount("tmpfs", f"{_PROC_AHEAD}/{name}", "tmpfs", linux.MS_RDONLY | _FLAGS, "size=0,nr_inodes=1")
    for name in _READ_ONLY:
        path = f"{_PROC_AHEAD}/{name}"
        if os.path.exists(path):
            linux.mount(path, path, None, linux.MS_BIND | linux.MS_REC)
            linux.mount(None, path, None, linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY
                        | _FLAGS | linux.MS_NOEXEC)


def _place_proc(request: dict[str, Any], refused: OSError | None) -> None:
    """A proc of our own pid namespace. The kernel forbids it where a path below the machine's /proc is masked, as in
    a pod without `procMount: Unmasked`; then /proc is empty inside, if `proc` may be lost."""
    request["lost"] = []
    if refused is None:
        linux.mount(_PROC, safe_target("/proc"), None, linux.MS_MOVE)
    elif refused.errno == errno.EPERM and "proc" in request["allow_degraded"]:
        safe_target("/proc")
        request["lost"].append("proc")
    else:
        raise refused


def _binds(request: dict[str, Any], fds: list[int]) -> None:
    kept = {path: linux.open_tree(safe_target(path)) for path in request["keep"]}
    for bind, fd in zip(request["binds"], fds, strict=True):
        _attach(fd, safe_target(bind["target"], directory=bind["directory"]))
    for path, fd in kept.items():
        if os.path.isdir(NEW_ROOT + path):
            _attach(fd, safe_target(path))
        else:
            os.close(fd)


def _private_tmp(limits: dict[str, int]) -> None:
    for path, mode, part in (("/tmp", "1777", 2), ("/run", "755", 16)):
        size = tmpfs_size(limits, min(limits["disk"], limits["memory"] // part))
        linux.mount("tmpfs", safe_target(path), "tmpfs", _FLAGS, f"mode={mode},{size}")


def _shm(request: dict[str, Any]) -> None:
    """/dev/shm, which fills before the memory does, also when a tmpfs upper is full already."""
    limits = request["limits"]
    room = limits["memory"] - (limits["disk"] if request["upper"] is None else 0)
    size = tmpfs_size(limits, min(room // 2, 1 << 30))
    linux.mount("tmpfs", f"{NEW_ROOT}/dev/shm", "tmpfs", _FLAGS, f"mode=1777,{size}")


def _enter() -> None:
    os.chdir(NEW_ROOT)
    linux.pivot_root(".", ".")
    # The old root is stacked on the new one; detaching it leaves no way back.
    linux.umount(".")
    os.chdir("/")


def _cover() -> None:
    """Put the new root over the one that init waited in, and enter it, as an initial RAM disk is left. What is below
    has nothing in it, and takes CAP_SYS_CHROOT to reach. A second pivot_root would be followed by a second unmount, and
    that waits for every processor (a grace period of RCU) while somebody waits for the sandbox."""
    os.chdir(NEW_ROOT)
    linux.mount(".", "/", None, linux.MS_MOVE)
    os.chroot(".")
    os.chdir("/")


def steps_ahead(single_id: bool) -> Iterator[Step]:
    """What is the same in every sandbox, from the launcher's file system to a root to wait in; /proc may be refused."""
    yield Step("a root to wait in", _waiting_room)
    yield Step("proc at /proc", _proc)
    yield Step("tmpfs, devices and devpts at /dev", lambda: _dev(single_id))
    yield Step("pivot_root", _enter)


def root_steps(
    request: dict[str, Any], root_fd: int, bind_fds: list[int], proc_refused: OSError | None
) -> Iterator[Step]:
    """The steps from there to the sandbox's own root, in order."""
    yield Step("overlay at /", lambda: _attach(root_fd, NEW_ROOT))
    yield Step("proc at /proc", lambda: _place_proc(request, proc_refused))
    yield Step("/dev", lambda: linux.mount(_DEV, safe_target("/dev"), None, linux.MS_MOVE))
    yield Step("tmpfs at /dev/shm", lambda: _shm(request))
    if request["private_tmp"]:
        yield Step("tmpfs at /tmp and /run", lambda: _private_tmp(request["limits"]))
    else:
        yield Step("directory at /tmp", lambda: _tmp_directory())
    yield Step("binds", lambda: _binds(request, bind_fds))
    yield Step("root", _cover)


def _tmp_directory() -> None:
    path = safe_target("/tmp")
    if stat.S_IMODE(os.lstat(path).st_mode) != 0o1777:
        os.chmod(path, 0o1777)
