"""The same promises, kept for an ordinary user: this directory once more, in a pytest of that user's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import OrdinaryUser, needs, seconds


@pytest.mark.parametrize(
    "tier", [pytest.param(tier, marks=getattr(pytest.mark, when)) for tier, when in (("fast", "ci"), ("all", "night"))]
)
@needs("rootless", "overlay")
def test_every_promise_holds_for_an_ordinary_user(tier: str, user: OrdinaryUser) -> None:
    tests = Path(__file__).resolve().parents[1]
    target = user.home / f"checkout-{tier}"
    for name in ("__init__.py", "machine.py", "support.py", "conftest.py", "orphans.py", "footprint.py"):
        target.joinpath("tests").mkdir(parents=True, exist_ok=True)
        shutil.copy(tests / name, target / "tests" / name)
    shutil.copytree(tests / "sandbox", target / "tests/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "pytest.ini").write_text("[pytest]\nmarkers =\n  ci\n  night\n  needs\n")
    shutil.chown(target, user.uid, user.gid)
    for path in target.rglob("*"):
        shutil.chown(path, user.uid, user.gid)
    done = user.run(
        [user.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--tier={tier}", "tests/sandbox", "-rs"],
        cwd=target, timeout=seconds(900 if tier == "fast" else 3600),
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
