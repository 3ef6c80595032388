"""Patches that `git apply` takes, byte for byte."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from skyrl_minisandbox.tasks.diff import File, diff_trees, read_sdist
from tests.support import needs


def write(tree: dict[str, File], where: Path) -> None:
    for path, file in tree.items():
        target = where / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.data)
        target.chmod(0o755 if file.executable else 0o644)


def read(where: Path) -> dict[str, File]:
    return {
        path.relative_to(where).as_posix(): File(path.read_bytes(), os.access(path, os.X_OK))
        for path in where.rglob("*")
        if path.is_file()
    }


def apply(patch: str, where: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"], input=patch.encode(), cwd=where, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{done.stderr.decode()}\n{patch}"


def _numbers(*values: int) -> bytes:
    return b"\n".join(b"%d" % value for value in values)


CASES: dict[str, tuple[bytes | None, bytes | None]] = {
    "changed": (b"a\nb\nc\n", b"a\nB\nc\n"),
    "new": (None, b"a\n"),
    "new and empty": (None, b""),
    "new without a newline at its end": (None, b"a"),
    "deleted": (b"a\nb\n", None),
    "deleted and empty": (b"", None),
    "deleted without a newline at its end": (b"a\nb", None),
    "emptied": (b"a\n", b""),
    "filled": (b"", b"a\n"),
    "loses the newline at its end": (b"a\nb\n", b"a\nb"),
    "gets a newline at its end": (b"a\nb", b"a\nb\n"),
    "never had a newline at its end": (b"a\nb", b"A\nb"),
    "changes its last line, which has no newline": (b"a\nb", b"a\nc"),
    "carriage returns": (b"a\r\nb\r\n", b"a\r\nB\r\n"),
    "line endings change": (b"a\r\nb\r\n", b"a\nb\n"),
    "a form feed is no line end": (b"a\x0cb\x0bc\nd\n", "a\x0cB\x0bc\u0085x\u2028y\nd\n".encode()),
    "two distant hunks": (_numbers(*range(50)), _numbers(7, *range(1, 45), 7, *range(46, 50))),
    "lines that look like headers": (b"--- a\n+++ b\n@@ x\n", b"--- a\n--- c\n+++ b\n@@ y\n\\ No newline\n"),
}


@needs("git")
@pytest.mark.parametrize("old, new", CASES.values(), ids=CASES.keys())
def test_git_apply_makes_the_new_file_of_the_old(tmp_path: Path, old: bytes | None, new: bytes | None) -> None:
    before = {"keep": File(b"k\n")} | ({} if old is None else {"dir/file.txt": File(old)})
    after = {"keep": File(b"k\n")} | ({} if new is None else {"dir/file.txt": File(new)})
    write(before, tmp_path)
    apply(diff_trees(before, after, ["dir/file.txt", "keep"]), tmp_path)
    assert read(tmp_path) == after


@needs("git")
def test_a_new_script_is_executable(tmp_path: Path) -> None:
    after = {"run": File(b"#!/bin/sh\n", executable=True)}
    apply(diff_trees({}, after, ["run"]), tmp_path)
    assert read(tmp_path) == after


def test_only_the_named_paths_are_compared() -> None:
    patch = diff_trees({"a": File(b"1\n"), "b": File(b"1\n")}, {"a": File(b"2\n"), "b": File(b"2\n")}, ["b"])
    assert "a/a" not in patch
    assert "a/b" in patch


def test_equal_files_yield_nothing() -> None:
    assert diff_trees({"a": File(b"1\n")}, {"a": File(b"1\n")}, ["a"]) == ""


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a\0b\n"], ids=["not UTF-8", "with a NUL"])
def test_a_file_that_is_not_text_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"`img\.png`"):
        diff_trees({}, {"img.png": File(data)}, ["img.png"])


def test_a_path_in_neither_tree_is_named() -> None:
    with pytest.raises(ValueError, match="`nowhere` is in neither tree"):
        diff_trees({}, {}, ["nowhere"])


def sdist(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("p-1/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def test_an_sdist_is_read_below_its_top_directory_without_links(tmp_path: Path) -> None:
    path = sdist(tmp_path / "p-1.tar.gz", ("p-1/a/b.py", b"x\n"), ("p-1/PKG-INFO", b"y\n"))
    assert read_sdist(path) == {"a/b.py": File(b"x\n"), "PKG-INFO": File(b"y\n")}


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "p-1/../../evil"])
def test_an_sdist_with_a_path_outside_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leaves the archive"):
        read_sdist(sdist(tmp_path / "p-1.tar.gz", (name, b"")))
