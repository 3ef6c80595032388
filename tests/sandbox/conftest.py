"""A layer to stand on: an empty root over which the machine's /usr is bound. The rows run as whoever runs pytest;
test_as_a_user.py runs this directory once more as an ordinary user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec, owner_shift
from skyrl_minisandbox.sandbox.client import LauncherClient
from tests.support import base_binds, require

MIB = 1 << 20


def make_layer(path: Path) -> Path:
    for name in ("usr", "etc", "tmp", "root", "var/tmp", "opt", "testbed/src", "usr/local"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (path / name).symlink_to(f"usr/{name}")
    (path / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/tmp:/bin/bash\n")
    (path / "etc/group").write_text("root:x:0:\nuser:x:1000:\n")
    (path / "testbed/lower.txt").write_text("from the layer\n")
    (path / "testbed/src/module.py").write_text("VALUE = 1\n")
    for directory, _, _ in os.walk(path):
        os.chmod(directory, 0o755)
    return path


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require("userns", "overlay")
    path = make_layer(tmp_path_factory.mktemp("layer"))
    shift = owner_shift(path)  # as the image cache unpacks, where no overlay stands on id-mapped mounts (before 5.19)
    for directory, _, names in os.walk(path):
        for name in (".", *names) if shift else ():
            os.chown(f"{directory}/{name}", shift, shift, follow_symlinks=False)
    return path


@pytest.fixture
def launcher() -> Iterator[LauncherClient]:
    """One of its own, which ends with the test."""
    client = LauncherClient()
    yield client
    client.close()


@pytest.fixture(scope="session")
def spec(layer: Path, tmp_path_factory: pytest.TempPathFactory) -> SandboxSpec:
    require("userns", "overlay")
    limits = Limits(memory=512 * MIB, processes=200, disk=64 * MIB, output=MIB)
    scratch = tmp_path_factory.mktemp("scratch")  # only where a plain user's upper cannot be on tmpfs (Linux 6.1)
    return SandboxSpec(
        (layer,), base_binds(), ("/usr/local",), workdir="/testbed", limits=limits, scratch=scratch
    )


@pytest.fixture
def sandbox(spec: SandboxSpec) -> Iterator[Sandbox]:
    with Sandbox(spec) as made:
        yield made


@pytest.fixture
def open_sandbox(spec: SandboxSpec) -> Iterator[Callable[..., Sandbox]]:
    """A maker of sandboxes that are closed after the test: `open_sandbox(network="host")`."""
    import dataclasses

    made: list[Sandbox] = []

    def open_one(**changes: object) -> Sandbox:
        made.append(Sandbox(dataclasses.replace(spec, **changes)))  # type: ignore[arg-type]
        return made[-1]

    yield open_one
    for one in made:
        one.close()
