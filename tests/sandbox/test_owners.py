"""Owners of layers: id-mapped where the file system can, shifted on disk where it cannot."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, owner_shift, shutdown_launcher
from tests.sandbox.conftest import make_layer
from tests.support import needs


@pytest.fixture
def ramfs(tmp_path: Path) -> Iterator[Path]:
    """A file system without id-mapped mounts. The launcher sees it when it starts later: where `/` is a private mount,
    what is mounted afterwards does not reach it."""
    path = tmp_path / "ramfs"
    path.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(path)], check=True, timeout=30)
    shutdown_launcher()
    yield path
    shutdown_launcher()
    subprocess.run(["umount", "-l", str(path)], check=True, timeout=30)


@needs("root")
def test_owners_of_a_layer_are_seen_as_they_are(spec: SandboxSpec, tmp_path: Path) -> None:
    layer = make_layer(tmp_path / "layer")
    os.chown(layer / "testbed/lower.txt", 1000, 1000)
    if owner_shift(tmp_path):
        pytest.skip("no overlay stands on an id-mapped mount of this file system here")
    with Sandbox(dataclasses.replace(spec, layers=(layer,))) as sandbox:
        assert sandbox.run("stat -c '%U %G' lower.txt src").output == "user user\nroot root\n"
        assert sandbox.run("echo more >> lower.txt && stat -c %U lower.txt").output == "user\n"


@needs("root")
def test_a_file_system_without_id_mapping_holds_shifted_layers(spec: SandboxSpec, ramfs: Path) -> None:
    shift = owner_shift(ramfs)
    assert shift > 1 << 16
    layer = make_layer(ramfs / "layer")
    os.chown(layer / "testbed/lower.txt", 1000, 1000)
    for path in (layer, *layer.rglob("*")):
        found = path.lstat()
        os.chown(path, found.st_uid + shift, found.st_gid + shift, follow_symlinks=False)
    with Sandbox(dataclasses.replace(spec, layers=(layer,))) as sandbox:
        assert sandbox.run("stat -c '%U %G' lower.txt src").output == "user user\nroot root\n"
        assert sandbox.run("echo more >> lower.txt && touch src/new && stat -c %U lower.txt").output == "user\n"


def test_a_plain_user_needs_no_shift(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        assert owner_shift(tmp_path) == 0
    else:
        assert owner_shift(Path("/dev/shm")) in (0, 0x6FFF0000)
