"""The patch of a rollout, computed by us from what the agent's sandbox wrote.

The agent's git never runs for us: its `.git` (index, hooks, configuration, commits) may say anything. We
take the frozen upper of its sandbox, drop every `.git` in it, lay the rest over the image in a *fresh*
sandbox, and let the image's own git compare. Everything in the tar is hostile: it is never unpacked on the
host, only read member by member and written on.
"""

from __future__ import annotations

import errno
import posixpath
import tarfile
import tempfile
from collections.abc import Callable
from typing import IO

from skyrl_minisandbox.errors import StoreError
from skyrl_minisandbox.rewards.apply import GIT, GIT_ENV
from skyrl_minisandbox.sandbox import Sandbox

LARGEST_PATCH = 32 << 20
"""Bytes. A larger one is no fix; see `patch_from_upper`."""

LARGEST_TREE = 1 << 30
"""Bytes of everything that differs below the workdir; a sparse file counts with its full size."""

MOST_MEMBERS = 200_000
"""Files and directories that differ below the workdir. A million of them would take minutes, which are nobody's
limit but the driver's, and what runs into that is not scored."""

_SPOOL = 16 << 20
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"

_IGNORED = b"__pycache__/\n*.py[co]\n.pytest_cache/\n.hypothesis/\n"
_IGNORE_FILE = "/tmp/.ignored"
_REMOVE_FILE = "/tmp/.remove"
_PATCH_FILE = "/tmp/.patch"
_TIMEOUT = 300.0


def patch_from_upper(agent_sandbox: Sandbox, open_sandbox: Callable[[], Sandbox], workdir: str) -> str:
    """What the agent changed below `workdir`, as a binary-safe unified diff against the image's HEAD.

    agent_sandbox: frozen by this (`export_layer`): nothing of the agent runs afterwards.
    open_sandbox: makes a fresh sandbox of the same image.

    Untracked byte code and caches are left out. Names and contents that are not UTF-8 come as surrogate escapes,
    which `grade` turns back. When the diff is larger than `LARGEST_PATCH` or does not fit the sandbox, only tracked
    files are compared. When that is too large as well, or the tree is larger than `LARGEST_TREE` or `MOST_MEMBERS` or
    than the sandbox's disk, the patch is empty: what the agent wrote is a value, never an exception.
    """
    prefix = workdir.strip("/")
    with tempfile.SpooledTemporaryFile(_SPOOL) as layer, tempfile.SpooledTemporaryFile(_SPOOL) as tree:
        try:
            agent_sandbox.export_layer(layer, prefix=prefix, max_bytes=LARGEST_TREE, max_members=MOST_MEMBERS)
        except OSError as error:
            if error.errno == errno.EFBIG:
                return ""
            raise
        layer.seek(0)
        gone, cleared = rewrite_layer(layer, tree, prefix)
        tree.seek(0)
        with open_sandbox() as sandbox:
            try:
                sandbox.write_file(_IGNORE_FILE, _IGNORED)
                _lay_over(sandbox, tree, gone, cleared, workdir)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    return ""
                raise
            for every in (True, False):
                patch = _diff(sandbox, workdir, every)
                if patch is not None:
                    return patch.decode("utf-8", "surrogateescape")
    with open_sandbox() as sandbox:  # whose fault is it? The one probe: the same without the agent's tree
        sandbox.write_file(_IGNORE_FILE, _IGNORED)
        if _diff(sandbox, workdir, True) is None:
            raise StoreError(f"the image is damaged on this node: its own repository {workdir} cannot be compared")
    return ""


def rewrite_layer(layer: IO[bytes], tree: IO[bytes], prefix: str) -> tuple[list[str], bool]:
    """Copy the members of an OCI layer that git could see, with names relative to `prefix`.

    Returns the paths that must be removed before the tree is unpacked (deleted ones, and everything that a
    member other than a directory replaces), and whether the whole prefix was emptied first.
    """
    gone: list[str] = []
    cleared = False
    kept: set[str] = set()
    with (
        tarfile.open(fileobj=layer, mode="r|", errors="surrogateescape") as source,
        tarfile.open(fileobj=tree, mode="w|", format=tarfile.GNU_FORMAT, errors="surrogateescape") as target,
    ):
        for member in source:
            for tar in (source, target):  # tarfile remembers every member; a million of them take a gigabyte
                tar.members.clear()  # type: ignore[attr-defined]
            full = posixpath.normpath("/" + member.name).lstrip("/")
            parent, name = posixpath.split(full)
            if full == posixpath.join(posixpath.dirname(prefix), _WHITEOUT + posixpath.basename(prefix)):
                cleared = True
                continue
            path = _below(full, prefix)
            if path is None or ".git" in path.split("/"):
                continue
            if name == _OPAQUE:
                emptied = _below(parent, prefix)
                if emptied == "":
                    cleared = True
                elif emptied is not None:
                    gone.append(emptied)
                continue
            if name.startswith(_WHITEOUT):
                hidden = posixpath.join(posixpath.dirname(path), name.removeprefix(_WHITEOUT))
                if posixpath.basename(hidden) not in ("", ".", "..", ".git"):
                    gone.append(hidden)
                continue
            if path == "":
                if not member.isdir():  # the workdir itself became a file or a link
                    cleared = True
                continue
            if not member.isdir():
                gone.append(path)
            copied = _plain(member, path, prefix, kept)
            if copied is not None:
                kept.add(path)
                target.addfile(copied, source.extractfile(member) if copied.isreg() else None)
    return gone, cleared


def _plain(member: tarfile.TarInfo, path: str, prefix: str, kept: set[str]) -> tarfile.TarInfo | None:
    """The member under its new name, as root's; None for what git does not keep (pipes, sockets, devices)."""
    copied = tarfile.TarInfo(path)
    copied.mode = (member.mode & 0o777) | 0o600  # readable for us, whatever the agent left
    copied.mtime = int(member.mtime)
    if member.isdir():
        copied.type = tarfile.DIRTYPE
        copied.mode |= 0o700
    elif member.issym():
        copied.type = tarfile.SYMTYPE
        copied.linkname = member.linkname
    elif member.islnk():
        other = _below(posixpath.normpath("/" + member.linkname).lstrip("/"), prefix)
        if other is None or other not in kept:
            return None
        copied.type = tarfile.LNKTYPE
        copied.linkname = other
    elif member.isreg():
        copied.type = tarfile.REGTYPE
        copied.size = member.size
    else:
        return None
    return copied


def _below(full: str, prefix: str) -> str | None:
    if full == prefix:
        return ""
    return full[len(prefix) + 1 :] if full.startswith(prefix + "/") else None


def _lay_over(sandbox: Sandbox, tree: IO[bytes], gone: list[str], cleared: bool, workdir: str) -> None:
    """Bring the agent's tree into the fresh sandbox. What does not fit is the agent's loss, not an error."""
    if cleared:
        sandbox.run(
            "find . -mindepth 1 -maxdepth 1 ! -name .git -exec rm -rf -- {} +",
            cwd=workdir,
            timeout=_TIMEOUT,
        )
    if gone:
        names = b"".join(b"./" + name.encode("utf-8", "surrogateescape") + b"\0" for name in gone)
        sandbox.write_file(_REMOVE_FILE, names)
        sandbox.run(f"xargs -0 rm -rf -- < {_REMOVE_FILE}", cwd=workdir, timeout=_TIMEOUT)
    sandbox.run(
        ["tar", "-x", "--no-same-owner", "--delay-directory-restore", "-f", "-"],
        input=tree,
        cwd=workdir,
        timeout=_TIMEOUT,
    )


def _diff(sandbox: Sandbox, workdir: str, every: bool) -> bytes | None:
    """The diff of all files, or only of tracked ones; None when it cannot be had."""
    git = [
        *GIT,
        "-c",
        f"core.excludesFile={_IGNORE_FILE}",
        "-c",
        "core.quotePath=true",
        "-c",
        "core.autocrlf=false",
    ]
    if not every:  # undo what the first attempt added
        sandbox.run([*git, "read-tree", "--reset", "HEAD"], cwd=workdir, env=GIT_ENV, timeout=_TIMEOUT)
    added = sandbox.run(
        [*git, "add", "-A" if every else "-u", "--ignore-errors", "--", "."],
        cwd=workdir,
        env=GIT_ENV,
        timeout=_TIMEOUT,
    )
    if added.timed_out or added.disk_full:
        return None
    diff = sandbox.run(
        [
            *git,
            "diff",
            "--cached",
            "--binary",
            "--full-index",
            "--no-renames",
            "--no-color",
            "--no-ext-diff",
            "--no-textconv",
            "--src-prefix=a/",
            "--dst-prefix=b/",
            f"--output={_PATCH_FILE}",
            "HEAD",
        ],
        cwd=workdir,
        env=GIT_ENV,
        timeout=_TIMEOUT,
    )
    if diff.exit_code != 0 or diff.disk_full:
        return None
    try:
        return sandbox.read_file(_PATCH_FILE, limit=LARGEST_PATCH)
    except OSError:
        return None
