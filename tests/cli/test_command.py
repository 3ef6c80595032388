"""The command itself: help, exit codes, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from skyrl_minisandbox import __version__
from skyrl_minisandbox.cli.main import VERBS, main
from tests.support import REPOSITORY

HEAVY = {"ray", "torch", "skyrl_gym", "hydra", "omegaconf", "pydantic", "rich", "requests", "yaml", "numpy"}


def loaded_after(program: str) -> set[str]:
    """Top-level modules that a program has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys; print('\\n'.join(sorted(sys.modules)), file=sys.stderr)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {name.partition(".")[0] for name in done.stderr.split()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_after("import skyrl_minisandbox") & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["rollout", "-h"], ["rollout", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_after(f"from skyrl_minisandbox.cli.main import main; main({arguments})") & HEAVY


@pytest.mark.parametrize("arguments", [["-h"], *([verb, "-h"] for verb in VERBS)])
def test_short_help_fits_a_screen(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith("usage: minisandbox")
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 100


def test_long_help_has_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "--help"]) == 0
    out = capsys.readouterr().out
    for key in ("seed=0", "images.pythons=[]", "cluster.nodes=0", "policy.base_url=???", "sandbox.memory=4GiB"):
        assert f"  {key}\n      " in out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minisandbox {__version__}\n"


def test_no_verb_prints_the_help_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("skyrl_minisandbox.cli.main._main", interrupted)
    assert main(["rollout"]) == 130
    assert capsys.readouterr().err == "minisandbox: interrupted\n"
