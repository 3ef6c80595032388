"""Unified diffs between two source trees, in the form that `git apply` takes.

Written with difflib rather than `git diff --no-index`: the result depends neither on the user's git
configuration nor on git's version, so a task has the same digest on every machine.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

FILE = re.compile(r"^diff --git (?:a/(?P<old>.+) b/(?P<new>.+))$", re.MULTILINE)
"""The line of a git patch that begins a file."""

NO_NEWLINE = "\\ No newline at end of file\n"


@dataclasses.dataclass(frozen=True)
class File:
    """A regular file of a tree: its bytes, and whether it is executable."""

    data: bytes
    executable: bool = False

    @property
    def mode(self) -> str:
        """Git's mode of the file."""
        return "100755" if self.executable else "100644"


def read_sdist(path: Path) -> dict[str, File]:
    """Return the regular files of a `.tar.gz` source distribution, by path below its one top directory.

    Links and special files are left out: no patch of ours speaks of them. Raises `ValueError` when a path
    leaves the top directory, `tarfile.TarError` or `OSError` when the archive cannot be read.
    """
    files: dict[str, File] = {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            if not member.isfile():
                continue
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise ValueError(f"{path.name}: `{member.name}` leaves the archive's directory")
            if len(parts) < 2:
                continue
            stream = archive.extractfile(member)
            assert stream is not None  # a regular file has one
            files["/".join(parts[1:])] = File(stream.read(), bool(member.mode & 0o100))
    return files


def diff_trees(old: Mapping[str, File], new: Mapping[str, File], paths: Iterable[str]) -> str:
    """Return a git-style patch that makes the files `paths` of `old` those of `new`.

    A path missing in `old` is added, one missing in `new` is deleted, one equal in both yields nothing.
    Raises `ValueError` for a path in neither tree and for a file that is not UTF-8 text.
    """
    return "".join(_diff_file(path, old.get(path), new.get(path)) for path in sorted(set(paths)))


def _diff_file(path: str, old: File | None, new: File | None) -> str:
    if old is None and new is None:
        raise ValueError(f"`{path}` is in neither tree")
    if old is not None and new is not None and old.data == new.data:
        return ""
    header = [f"diff --git a/{path} b/{path}\n"]
    if old is None and new is not None:
        header.append(f"new file mode {new.mode}\n")
    if new is None and old is not None:
        header.append(f"deleted file mode {old.mode}\n")
    body = difflib.unified_diff(
        _lines(path, old),
        _lines(path, new),
        "/dev/null" if old is None else f"a/{path}",
        "/dev/null" if new is None else f"b/{path}",
    )
    return "".join(header) + "".join(
        line if line.endswith("\n") else f"{line}\n{NO_NEWLINE}" for line in body
    )


def _lines(path: str, file: File | None) -> list[str]:
    """Lines as git sees them: ended by "\\n" alone, which is kept (form feeds and "\\r" are content)."""
    if file is None:
        return []
    try:
        text = file.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` is not UTF-8 text, so no patch can carry it: {error}") from None
    if "\0" in text:
        raise ValueError(f"`{path}` is a binary file, so no patch can carry it")
    lines = text.split("\n")
    ended = [line + "\n" for line in lines[:-1]]
    return ended + ([lines[-1]] if lines[-1] else [])


def changed_files(patch: str) -> tuple[str, ...]:
    """Every path that a git patch touches, in its order; of a renamed file both."""
    paths = [path for match in FILE.finditer(patch) for path in (match["old"], match["new"])]
    return tuple(dict.fromkeys(paths))
