"""What a sandbox's root differs in from its layers. Runs in a child of the launcher, over directories an agent filled.

Three views of the same names: the uppers, which say where a difference may be; the root as it is; and the layers alone.
No name is ever followed: every directory is opened by its path with RESOLVE_NO_SYMLINKS, every file is looked at after
opening. Directories are opened one at a time, as a tree may be thousands of levels deep.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from skyrl_minisandbox.sandbox import linux

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_PATH_MAX = 4096  # linux/limits.h
_LARGEST_LIST = 256 << 20
_BLOCK = 1 << 18


class Entry:
    """A path that an upper mentions. `now` is None where it was removed, `before` where the layers have nothing.

    parent: a descriptor of its directory in the root as it is, -1 for none; before_parent: in the layers. Both are
    closed when the next directory's turn comes.
    """

    # No dataclass: it costs every comparison some 8 ms, for what Python has to load in a child of the launcher.
    def __init__(
        self,
        path: str,
        name: str,
        parent: int,
        before_parent: int,
        now: os.stat_result | None,
        before: os.stat_result | None,
    ) -> None:
        self.path, self.name, self.parent, self.before_parent = path, name, parent, before_parent
        self.now, self.before = now, before


class Difference:
    """uppers: what was written, the newest first. root: all of it over the layers. base: the layers alone."""

    def __init__(self, uppers: list[int], root: int, base: int, opaque: str) -> None:
        self._uppers, self._root, self._base, self._opaque = uppers, root, base, opaque

    def entries(self, prefix: str = "") -> Iterator[Entry]:
        """Every entry below a directory, sorted, parents first; a path that is too long for any program to name
        (PATH_MAX) is left out. A removed directory stands for all that was in it."""
        hidden = False
        start: list[int] = self._uppers
        path = ""
        for part in [part for part in prefix.split("/") if part]:
            path = f"{path}/{part}" if path else part
            hidden = hidden or self._hides(start, os.path.dirname(path))
            start = self._with(start, path)
        # One level of the tree a turn: its names are held, its descriptors only while its turn lasts.
        stack = [self._level(path, start, hidden)]
        while stack:
            path, uppers, hidden, names = stack[-1]
            below: tuple[str, list[int], bool] | None = None
            with self._opened(path) as (parent, before_parent):
                for name in names:
                    full = f"{path}/{name}" if path else name
                    if len(os.fsencode(full)) >= _PATH_MAX:
                        continue
                    entry = Entry(full, name, parent, before_parent, _stat(parent, name), _stat(before_parent, name))
                    if entry.now is None and entry.before is None:
                        continue
                    yield entry
                    if entry.now is not None and stat.S_ISDIR(entry.now.st_mode):
                        below = full, self._with(uppers, full), hidden
                        break
                else:
                    stack.pop()
            if below is not None:
                stack.append(self._level(*below))

    def _level(self, path: str, uppers: list[int], hidden: bool) -> tuple[str, list[int], bool, Iterator[str]]:
        """The names of one directory at which something may differ."""
        hidden = hidden or self._hides(uppers, path)
        names: set[str] = set()
        for upper in uppers:
            names |= _names(upper, path)
        if hidden:
            names |= _names(self._base, path)
        return path, uppers, hidden, iter(sorted(names))

    def _with(self, uppers: list[int], path: str) -> list[int]:
        """Those uppers that have a directory there."""
        found = []
        for upper in uppers:
            with contextlib.suppress(OSError):
                os.close(linux.open_below(upper, path, _DIRECTORY))
                found.append(upper)
        return found

    def _hides(self, uppers: list[int], path: str) -> bool:
        """Whether names of the layers in that directory, or below it, may be hidden without a mark of their own."""
        for upper in self._uppers:
            if upper not in uppers:
                if path and _is_something(upper, path):
                    return True  # a whiteout or a file, over which a newer upper has a directory
                continue
            with contextlib.suppress(OSError):
                fd = linux.open_below(upper, path, _DIRECTORY)
                try:
                    if os.getxattr(fd, self._opaque) == b"y":
                        return True
                finally:
                    os.close(fd)
        return False

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[tuple[int, int]]:
        fds = []
        try:
            for view in (self._root, self._base):
                try:
                    fds.append(linux.open_below(view, path, _DIRECTORY))
                except OSError as error:
                    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                        raise
                    fds.append(-1)
            yield fds[0], fds[1]
        finally:
            for fd in fds:
                if fd >= 0:
                    os.close(fd)

    def replaced(self, path: str) -> bool:
        """Whether there is no directory any more where the layers have something."""
        with contextlib.suppress(OSError):
            os.close(linux.open_below(self._root, path, _DIRECTORY))
            return False
        with contextlib.suppress(OSError):
            os.close(linux.open_below(self._base, path, os.O_PATH | os.O_NOFOLLOW))
            return True
        return False

    def write_list(self, out: int, limit: int) -> None:
        """Write one letter (Added, Modified, Removed) and the path of each true difference, each ended by a NUL.
        Raises `OSError(EFBIG)` beyond `limit` of them."""
        size = 0
        with open(out, "wb", closefd=False) as file:
            for entry in self.entries():
                if entry.now is None:
                    letter = b"R"
                elif entry.before is None:
                    letter = b"A"
                elif differs(entry):
                    letter = b"M"
                else:
                    continue
                line = letter + os.fsencode(entry.path) + b"\0"
                limit -= 1
                size += len(line)
                if limit < 0 or size > _LARGEST_LIST:
                    raise OSError(errno.EFBIG, "more differs from the layers than was allowed")
                file.write(line)


def differs(entry: Entry) -> bool:
    """Whether kind, mode, owner or content are others than before; times are not looked at."""
    now, before = entry.now, entry.before
    if now is None or before is None:
        return now is not before
    if (now.st_mode, now.st_uid, now.st_gid) != (before.st_mode, before.st_uid, before.st_gid):
        return True
    try:
        if stat.S_ISLNK(now.st_mode):
            return os.readlink(entry.name, dir_fd=entry.parent) != os.readlink(entry.name, dir_fd=entry.before_parent)
        if stat.S_ISREG(now.st_mode):
            return now.st_size != before.st_size or not _same_content(entry)
    except FileNotFoundError:
        return True  # it goes on changing
    return False


def _same_content(entry: Entry) -> bool:
    with contextlib.ExitStack() as stack:
        files = []
        for parent in (entry.parent, entry.before_parent):
            fd = os.open(entry.name, _FILE | os.O_CLOEXEC, dir_fd=parent)
            files.append(stack.enter_context(open(fd, "rb", buffering=0)))
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
        while True:
            ours, theirs = files[0].read(_BLOCK), files[1].read(_BLOCK)
            if ours != theirs:
                return False
            if not ours:
                return True


def _stat(parent: int, name: str) -> os.stat_result | None:
    if parent < 0:
        return None
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _names(view: int, path: str) -> set[str]:
    try:
        fd = linux.open_below(view, path, _DIRECTORY)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        return set()
    try:
        return set(os.listdir(fd))
    finally:
        os.close(fd)


def _is_something(view: int, path: str) -> bool:
    """Whether a view has anything but a directory at a path."""
    above, _, name = path.rpartition("/")
    try:
        fd = linux.open_below(view, above, _DIRECTORY)
    except OSError:
        return False
    try:
        status = _stat(fd, name)
    finally:
        os.close(fd)
    return status is not None and not stat.S_ISDIR(status.st_mode)
