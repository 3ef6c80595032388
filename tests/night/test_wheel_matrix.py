"""The wheel where a user installs it: every Python, as root and as an ordinary user, away from the checkout.

The ci tier runs 3.11 once; the night tier everything three times, and compares each test's verdict.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pytest

from tests.support import find_python, needs, ordinary_user, require

pytestmark = needs("userns", "overlay", "network", "build")

MEAN = {"gold": "1.000", "empty": "0.000", "wrong": "0.000"}


class Account(Protocol):
    """Whoever runs the commands."""

    home: Path

    def call(self, argv: Sequence[str | Path], timeout: float) -> str: ...


class Root:
    """Us, with a home of its own so that nothing of ours is used."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def call(self, argv: Sequence[str | Path], timeout: float) -> str:
        hidden = ("PYTHONPATH", "VIRTUAL_ENV", "RAY_ADDRESS")
        env: Mapping[str, str] = {
            **{key: value for key, value in os.environ.items() if key not in hidden},
            "XDG_CACHE_HOME": str(self.home / ".cache"),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.orphans", "10", *map(str, argv)],
            cwd=Path(__file__).parent.parent.parent,
            env={**env, "TOP": str(self.home)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@contextlib.contextmanager
def account(who: str, version: str) -> Iterator[tuple[Account, Path]]:
    """The account and an interpreter of `version` that it can run."""
    prefix = find_python(version)
    assert prefix is not None
    if who == "root":
        home = Path(tempfile.mkdtemp(prefix="ms-root-"))
        try:
            yield Root(home), prefix / "bin" / f"python{version}"
        finally:
            shutil.rmtree(home)
        return
    with ordinary_user(prefix) as user:

        class Ordinary:
            home = user.home

            def call(self, argv: Sequence[str | Path], timeout: float) -> str:
                return user.run(argv, env={"PYTHONPATH": ""}, timeout=timeout, check=True).stdout

        yield Ordinary(), user.python
        assert user.processes() == []


def rollout(who: Account, scaffold: str, number: int) -> dict[str, dict[str, str]]:
    """One run in the account's home; each task's verdicts by test."""
    out = who.home / f"{scaffold}-{number}"
    command = who.home / "venv" / "bin" / "minisandbox"
    arguments = ["rollout", f"scaffold={scaffold}", f"out={out}"]
    printed = who.call(["env", "-C", who.home, command, *arguments], timeout=900)
    assert printed.rstrip().endswith(f"run directory: {out}")
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(results) >= 12
    assert f"mean reward {MEAN[scaffold]} over {len(results)} of {len(results)} rollouts" in printed
    grades = {}
    for result in results:
        data = json.loads((out / "grades" / f"{result['rollout_id']}.json").read_text())
        grades[result["task_id"]] = data["report"]["tests"]
    return grades


def matrix(wheel: Path, version: str, who: str, times: int) -> None:
    require(f"python{version}", *(["rootless"] if who == "user" else ["root"]))
    with account(who, version) as (someone, python):
        venv = someone.home / "venv"
        someone.call([python, "-m", "venv", venv], timeout=120)
        someone.call([venv / "bin" / "python", "-m", "pip", "install", "--quiet", wheel], timeout=600)
        for scaffold in MEAN:
            verdicts = [rollout(someone, scaffold, number) for number in range(times)]
            assert all(one == verdicts[0] for one in verdicts)


@pytest.mark.ci
@pytest.mark.parametrize("who", [pytest.param("root", marks=pytest.mark.night), "user"])
def test_gold_passes_and_empty_and_wrong_fail_on_3_11(wheel: Path, who: str) -> None:
    matrix(wheel, "3.11", who, times=1)


@pytest.mark.night
@pytest.mark.parametrize("who", ["root", "user"])
@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_verdicts_are_the_same_three_times_on_every_python(wheel: Path, version: str, who: str) -> None:
    matrix(wheel, version, who, times=3)
