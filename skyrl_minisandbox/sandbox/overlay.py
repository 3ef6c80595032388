"""Layers, uppers and the overlay over them, in the launcher's mount namespace and with its rights.

`/l/N` are layers, each mounted once under a path of a few bytes, as a mount takes 4 KiB of options (id-mapped where the
kernel and the file system can); `/s` is where an upper is put together; `/x` is where an overlay is mounted until it
has been cloned. What leaves this module are detached mounts.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from skyrl_minisandbox.sandbox import linux
from skyrl_minisandbox.sandbox.limits import tmpfs_size
from skyrl_minisandbox.sandbox.mounts import HOST
from skyrl_minisandbox.sandbox.watch import measure

# Users and groups of a sandbox, as the host sees them: the last 65,536 of the range that systemd documents for
# containers (systemd.io/UIDS-GIDS), so that no account of the machine is among them.
RANGE_BASE = 0x6FFF0000
RANGE_SIZE = 65536


class LauncherError(Exception):
    """Told to the owner: what failed, errno, and the name of what the machine lacks ("" when it is something else)."""

    def __init__(self, message: str, number: int = 0, lacks: str = "") -> None:
        super().__init__(message)
        self.number, self.lacks = number, lacks


class Ids:
    """Which of the machine's ids a sandbox has: a range from `base`, or one user and group (`own`) as its root."""

    def __init__(self, base: int | None, own: tuple[int, int]) -> None:
        self.base, self.own = base, own

    def root(self) -> tuple[int, int]:
        """Owner and group that are root inside, as the machine sees them."""
        return (self.base, self.base) if self.base is not None else self.own

    def write_maps(self, pid: int) -> None:
        """Give the user namespace of a new process its maps."""
        for name, own in zip(("uid_map", "gid_map"), self.own, strict=True):
            with open(f"{HOST}/proc/{pid}/{name}", "w") as file:
                file.write(f"0 {self.base} {RANGE_SIZE}" if self.base is not None else f"0 {own} 1")


def map_base() -> int | None:
    """The first id of our range, within what this process's own user namespace maps; None for a single id."""
    best = None
    with open("/proc/self/uid_map") as file:
        for line in file:
            inside, _, count = (int(field) for field in line.split())
            if inside <= RANGE_BASE and inside + count >= RANGE_BASE + RANGE_SIZE:
                return RANGE_BASE
            if count >= 2 * RANGE_SIZE:
                best = inside + count - RANGE_SIZE
    return best


class Mounted:
    """The overlay of one sandbox, as detached mounts.

    root: for the sandbox, which puts its /proc and /dev on it. view: the same for us, without these. upper: what is
    written. lowers: short paths of the layers, the lowest first.
    """

    def __init__(self, root: int, view: int, upper: int, lowers: list[str], on_tmpfs: bool) -> None:
        self.root, self.view, self.upper, self.lowers, self.on_tmpfs = root, view, upper, lowers, on_tmpfs

    def close(self) -> None:
        """Let go of all but the root, which is the sandbox's."""
        os.close(self.view)
        os.close(self.upper)


class Overlays:
    """idmap_fd: a user namespace with the sandboxes' map, to id-map mounts by; -1 for a plain user.
    root_mode: whether the launcher is root on the machine, and not only in a namespace of its own.
    """

    def __init__(self, ids: Ids, idmap_fd: int, root_mode: bool) -> None:
        self.ids, self.idmap_fd, self.root_mode = ids, idmap_fd, root_mode
        self._lowers: dict[str, tuple[str, tuple[int, int]]] = {}  # path -> short path, device and inode
        self._frozen: dict[int, str] = {}  # number -> short path
        self._mounted = 0
        self._shifts: dict[int, int] = {}  # device -> what `owner_shift` found

    def lower(self, path: str) -> str:
        """The short path of a layer, mounted below /l (id-mapped as root); once per layer."""
        try:
            status = os.stat(HOST + path)
            identity = status.st_dev, status.st_ino
            known = self._lowers.get(path)
            if known is not None:
                if known[1] == identity:
                    return known[0]
                # Removed and made anew meanwhile: what is mounted is the old one. The sandboxes that use it keep it.
                linux.umount(f"/{known[0]}")
                del self._lowers[path]
            # Before Linux 5.19 mounts are id-mapped, but no overlay stands on them: such layers were unpacked shifted.
            if status.st_dev not in self._shifts:
                self._shifts[status.st_dev] = self.owner_shift(path)
            fd = self.tree(path, linux.MOUNT_ATTR_RDONLY, idmapped=self._shifts[status.st_dev] == 0)
            try:
                target, _ = self._attach(fd)
            finally:
                os.close(fd)
        except OSError as error:
            why = error.strerror or ""
            if error.errno == errno.ENOENT:
                why += " (if it is there, its file system was mounted after this process started)"
            raise LauncherError(f"layer {path}: {why}", error.errno or 0) from error
        self._lowers[path] = target, identity
        return target

    def _attach(self, fd: int) -> tuple[str, int]:
        """Mount a detached tree below /l: (short path, its number)."""
        number = self._mounted
        self._mounted += 1
        os.mkdir(f"/l/{number}")
        linux.move_mount(fd, f"/l/{number}")
        return f"l/{number}", number

    def keep(self, upper_fd: int, on_tmpfs: bool) -> dict[str, int]:
        """Make a layer of an upper whose sandbox has ended: its number, and the bytes and inodes that it takes."""
        path, number = self._attach(upper_fd)
        self._frozen[number] = path
        if not on_tmpfs:  # what is used there is the whole file system's
            top = os.open(f"/{path}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                size, count = measure(top)
            finally:
                os.close(top)
            return {"layer": number, "bytes": size, "inodes": count}
        used = os.statvfs(f"/{path}")
        return {
            "layer": number, "bytes": (used.f_blocks - used.f_bfree) * used.f_frsize,
            "inodes": used.f_files - used.f_ffree,
        }

    def release(self, numbers: list[int]) -> None:
        """Drop layers that were kept. Sandboxes that use them still have them."""
        for number in numbers:
            path = self._frozen.pop(number, None)
            if path is not None:
                linux.umount(f"/{path}")
                os.rmdir(f"/{path}")

    def short_path(self, layer: str | int) -> str:
        """Where a layer is mounted: one of a path, or one that was kept. Raises `LauncherError`."""
        if isinstance(layer, str):
            return self.lower(layer)
        if layer not in self._frozen:
            raise LauncherError(f"there is no frozen layer {layer}")
        return self._frozen[layer]

    def base_view(self, lowers: list[str]) -> int:
        """A descriptor of the root that a sandbox's own layers (the lowest first) make, read-only.

        Called in a child of the launcher: what it mounts goes with that.
        """
        path = f"/{lowers[0]}"
        if len(lowers) > 1:
            linux.unshare(linux.CLONE_NEWNS)
            options = [f"lowerdir={':'.join(reversed(lowers))}"]
            options.append("redirect_dir=off" if self.root_mode else "userxattr")
            linux.mount("overlay", "/x", "overlay", linux.MS_RDONLY, ",".join(options))
            path = "/x"
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def tree(self, path: str, attributes: int, *, idmapped: bool = True) -> int:
        """A detached copy of the host's mount at `path`, id-mapped where that is wanted and can be."""
        fd = linux.open_tree(HOST + path)
        try:
            if idmapped and self.idmap_fd >= 0:
                try:
                    linux.mount_setattr(fd, attributes | linux.MOUNT_ATTR_IDMAP, self.idmap_fd)
                    return fd
                except OSError as error:
                    # EINVAL: this file system has no id-mapped mounts (a pod's own overlayfs); it stays unmapped,
                    # owned by nobody. Layers for such a place were unpacked with shifted owners.
                    if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
            linux.mount_setattr(fd, attributes)
            return fd
        except BaseException:
            os.close(fd)
            raise

    def owner_shift(self, directory: str) -> int:
        """How far the owners of layers below a directory must be shifted: 0 where an overlay can stand on an
        id-mapped mount of it (Linux 5.19, and a file system that has them), else the base of our range."""
        shift = 0
        if self.idmap_fd >= 0:
            fd = linux.open_tree(HOST + directory)
            staged = attached = mounted = False
            try:
                linux.mount("tmpfs", "/s", "tmpfs", 0, "mode=755,size=1m")
                staged = True
                for name in ("lower", "upper", "work"):
                    os.mkdir(f"/s/{name}")
                linux.mount_setattr(fd, linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_IDMAP, self.idmap_fd)
                linux.move_mount(fd, "/s/lower")
                attached = True
                linux.mount("overlay", "/x", "overlay", 0, "lowerdir=s/lower,upperdir=s/upper,workdir=s/work")
                mounted = True
            except OSError:
                shift = self.ids.base or 0
            finally:
                os.close(fd)
                for there, path in ((mounted, "/x"), (attached, "/s/lower"), (staged, "/s")):
                    if there:
                        linux.umount(path)
        return shift

    def mount(self, request: dict[str, Any], name: str) -> Mounted:
        """Mount the overlay of a sandbox."""
        lowers = [self.short_path(layer) for layer in reversed(request["layers"])]
        stage = f"/s/{name}"
        os.mkdir(stage)
        staged = mounted = False
        try:
            flags = linux.MS_NOSUID | linux.MS_NODEV
            if request["upper"] is None:
                size = tmpfs_size(request["limits"], request["limits"]["disk"])
                linux.mount("tmpfs", stage, "tmpfs", flags, f"mode=755,{size}")
            else:
                linux.mount(HOST + request["upper"], stage, None, linux.MS_BIND)
            staged = True
            for directory in ("upper", "work"):
                os.mkdir(f"{stage}/{directory}", 0o755)
                os.chown(f"{stage}/{directory}", *self.ids.root())
            options = [
                f"lowerdir={':'.join(lowers)}", f"upperdir=s/{name}/upper", f"workdir=s/{name}/work",
                # No sync of what is thrown away; no features that make an upper depend on its lowers' inodes.
                "volatile", "index=off", "metacopy=off",
            ]
            options.append("redirect_dir=off" if self.root_mode else "userxattr")
            linux.mount("overlay", "/x", "overlay", flags, ",".join(options))
            mounted = True
            root, view, upper = (linux.open_tree(path) for path in ("/x", "/x", f"{stage}/upper"))
            return Mounted(root, view, upper, lowers[::-1], request["upper"] is None)
        except OSError as error:
            what = f"the upper directory {request['upper']}" if request["upper"] else "an upper on tmpfs"
            raise LauncherError(
                f"an overlay with {what} could not be mounted: {error.strerror}", error.errno or 0, "overlay"
            ) from error
        finally:
            if mounted:
                linux.umount("/x")
            if staged:
                linux.umount(stage)
            os.rmdir(stage)

    def tmpfs_holds_upper(self) -> bool:
        """Whether a plain user's overlay works over a tmpfs upper: on Linux 6.1, removing a lower directory is EIO."""
        linux.mount("tmpfs", "/s", "tmpfs", 0, "mode=755,size=1m")
        mounted = False
        try:
            for name in ("lower/d/e", "upper", "work"):
                os.makedirs(f"/s/{name}")
            linux.mount("overlay", "/x", "overlay", 0, "lowerdir=s/lower,upperdir=s/upper,workdir=s/work,userxattr")
            mounted = True
            os.rmdir("/x/d/e")
            os.rmdir("/x/d")
            os.mkdir("/x/d")
            with open("/x/d/f", "w") as file:
                file.write("x")
            return os.listdir("/x/d") == ["f"]
        except OSError:
            return False
        finally:
            if mounted:
                linux.umount("/x")
            linux.umount("/s")
