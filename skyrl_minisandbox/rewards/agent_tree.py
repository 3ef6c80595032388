"""What an agent changed below its workdir, read from the layer of its frozen sandbox.

The layer is hostile: it is never unpacked on the host, only read member by member. Nothing called `.git` is taken, and
nothing that git does not keep: pipes, devices, empty directories.
"""

from __future__ import annotations

import dataclasses
import posixpath
import tarfile
from collections.abc import Collection, Iterator
from typing import IO

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclasses.dataclass
class AgentTree:
    """Paths are relative to the workdir; surrogate escapes where a name is not UTF-8.

    files: size by path, of every file and link that there is now. directories: those that the layer names.
    gone: what must be removed before the files are laid over the image: deleted ones, and whatever a file replaces.
    cleared: the whole workdir was emptied first. links: hard links, and the file that each is the same as.
    """

    files: dict[str, int] = dataclasses.field(default_factory=dict)
    directories: list[str] = dataclasses.field(default_factory=list)
    gone: list[str] = dataclasses.field(default_factory=list)
    cleared: bool = False
    links: dict[str, str] = dataclasses.field(default_factory=dict)


def read_tree(layer: IO[bytes], prefix: str) -> AgentTree:
    """The tree that an OCI layer tar holds below `prefix` (no slash at either end)."""
    tree = AgentTree()
    above = posixpath.dirname(prefix)
    with tarfile.open(fileobj=layer, mode="r|", errors="surrogateescape") as source:
        for member in _members(source):
            full = posixpath.normpath("/" + member.name).lstrip("/")
            if full == posixpath.join(above, _WHITEOUT + posixpath.basename(prefix)):
                tree.cleared = True
                continue
            path = _below(full, prefix)
            if path is None or _is_git(path):
                continue
            name = posixpath.basename(full)
            if name == _OPAQUE:
                emptied = posixpath.dirname(path)
                if emptied:
                    tree.gone.append(emptied)
                tree.cleared = tree.cleared or not emptied
            elif name.startswith(_WHITEOUT):
                hidden = posixpath.join(posixpath.dirname(path), name.removeprefix(_WHITEOUT))
                if not _is_git(hidden) and posixpath.basename(hidden) not in ("", ".", ".."):
                    tree.gone.append(hidden)
            elif path == "":
                tree.cleared = tree.cleared or not member.isdir()  # the workdir itself became a file or a link
            elif member.isdir():
                tree.directories.append(path)
            else:
                tree.gone.append(path)
                _add(tree, member, path, prefix)
    return tree


def _add(tree: AgentTree, member: tarfile.TarInfo, path: str, prefix: str) -> None:
    if member.isreg():
        tree.files[path] = member.size
    elif member.issym() and posixpath.basename(path).lower() != ".gitmodules":  # git takes no such link
        tree.files[path] = len(member.linkname)
    elif member.islnk():
        other = _below(posixpath.normpath("/" + member.linkname).lstrip("/"), prefix)
        if other in tree.files:
            tree.files[path] = tree.files[other]
            tree.links[path] = other


def write_files(layer: IO[bytes], target: IO[bytes], tree: AgentTree, chosen: Collection[str], prefix: str) -> None:
    """Copy the chosen files of the layer, as root's and readable, into a tar with paths relative to the workdir.

    A file that a chosen hard link needs is written too. Directories are not: whoever unpacks makes them.
    """
    wanted = set(chosen)
    wanted |= {tree.links[path] for path in chosen if path in tree.links}
    with (
        tarfile.open(fileobj=layer, mode="r|", errors="surrogateescape") as source,
        tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT, errors="surrogateescape") as copy,
    ):
        for member in _members(source):
            path = _below(posixpath.normpath("/" + member.name).lstrip("/"), prefix)
            if path is None or path not in wanted or path not in tree.files or member.isdir():
                continue
            info = tarfile.TarInfo(path)
            info.mode = (member.mode & 0o777) | 0o600  # readable for us, whatever the agent left
            if path in tree.links:
                info.type, info.linkname = tarfile.LNKTYPE, tree.links[path]
            elif member.issym():
                info.type, info.linkname = tarfile.SYMTYPE, member.linkname
            else:
                info.type, info.size = tarfile.REGTYPE, member.size
            copy.addfile(info, source.extractfile(member) if info.isreg() else None)
            copy.members.clear()  # type: ignore[attr-defined]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Each member, not remembered: a million of them take a gigabyte."""
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]
        yield member


def _is_git(path: str) -> bool:
    return any(part.lower() == ".git" for part in path.split("/"))


def _below(full: str, prefix: str) -> str | None:
    if full == prefix:
        return ""
    return full[len(prefix) + 1 :] if full.startswith(prefix + "/") else None
