"""The wheel: what it holds, what it brings, and that it works where there is no checkout."""

from __future__ import annotations

import subprocess
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import REPOSITORY, needs

MOST = 42
"""Distributions that a plain install may bring, ours and Ray's included, pip's own not."""


def call(*argv: str | Path, cwd: Path, timeout: float = 600) -> str:
    done = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def plain_environment() -> dict[str, str]:
    """Ours without what would let the checkout be found."""
    import os

    return {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh venv with the wheel and what it needs, nothing else."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=True)
    call(place / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=place)
    return place


@pytest.mark.ci
@needs("build", "network")
def test_the_wheel_holds_configs_tasks_and_scripts_but_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (REPOSITORY / "configs").rglob("*.yaml"):
        assert f"skyrl_minisandbox/configs/{path.relative_to(REPOSITORY / 'configs')}" in names
    package = REPOSITORY / "skyrl_minisandbox"
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert f"skyrl_minisandbox/{path.relative_to(package)}" in names
    assert not {name for name in names if name.startswith("tests")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.ci
@needs("build", "network")
def test_no_url_stands_in_the_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = (one for one in file.namelist() if one.endswith(".dist-info/METADATA"))
        requirements = [line for line in file.read(name).decode().splitlines() if line.startswith("Requires-Dist")]
    assert requirements
    assert not [line for line in requirements if "@" in line]


@pytest.mark.ci
@needs("build", "network")
def test_a_plain_install_stays_small(installed: Path) -> None:
    lines = call(installed / "bin" / "python", "-m", "pip", "list", "--format=freeze", cwd=installed).split()
    brought = [line for line in lines if line.partition("==")[0] not in ("pip", "setuptools", "wheel")]
    assert len(brought) <= MOST, brought


@pytest.mark.ci
@needs("build", "network")
def test_the_command_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "minisandbox"
    assert "usage: minisandbox" in call(command, "--help", cwd=tmp_path)
    assert "seed=0" in call(command, "rollout", "--help", cwd=tmp_path)
    program = (
        "from skyrl_minisandbox.cli.tree import config_directory as d; print(d());"
        "from skyrl_minisandbox.cli.settings import load_settings as l; print(l(['scaffold=gold']).env.scaffold.name)"
    )
    where, name = call(installed / "bin" / "python", "-c", program, cwd=tmp_path).split()
    assert Path(where).is_relative_to(installed)
    assert name == "gold"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
@needs("build", "network")
def test_everything_public_can_be_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = """
import importlib
for name in ("", ".sandbox", ".images", ".tasks", ".scaffolds", ".policies", ".rewards", ".errors", ".env"):
    module = importlib.import_module("skyrl_minisandbox" + name)
    for public in getattr(module, "__all__", []):
        getattr(module, public)
import skyrl_minisandbox, skyrl_gym
skyrl_minisandbox.register(); skyrl_minisandbox.register()
assert "minisandbox" in skyrl_gym.registry
"""
    assert call(installed / "bin" / "python", "-c", program, cwd=tmp_path) == ""
