"""Grading, patches and mini-swe-agent for an ordinary user: the same tests once more, in a pytest of that user's."""

from __future__ import annotations

import shutil

import pytest

from tests.support import REPOSITORY, OrdinaryUser, needs


@pytest.mark.ci
@needs("rootless", "overlay", "git", "mini")
def test_every_promise_holds_for_an_ordinary_user(user: OrdinaryUser) -> None:
    checkout = user.home / "graded"
    ignored = shutil.ignore_patterns("__pycache__", "test_as_a_user.py")
    shutil.copytree(REPOSITORY / "tests", checkout / "tests", ignore=ignored)
    shutil.copytree(REPOSITORY / "docs", checkout / "docs")
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    for path in (checkout, *checkout.rglob("*")):
        shutil.chown(path, user.uid, user.gid)
    argv = ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--tier", "fast"]
    chosen = ["tests/rewards", "tests/scaffolds/test_mini.py", "-k", "not recorded and not never_holds"]
    done = user.run([user.python, *argv, *chosen], cwd=checkout, timeout=300)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
