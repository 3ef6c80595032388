"""The same attempts in sandboxes that an ordinary user starts, with an interpreter that is his own.

His own, as with pyenv, conda or uv: what is root inside owns that file then.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import OrdinaryUser, needs, seconds


@pytest.mark.ci
@needs("rootless", "overlay")
def test_every_attempt_fails_for_an_ordinary_users_sandbox_too(user: OrdinaryUser) -> None:
    tests = Path(__file__).resolve().parents[1]
    target = user.home / "security"
    target.joinpath("tests/sandbox").mkdir(parents=True)
    for name in ("__init__.py", "machine.py", "support.py", "conftest.py", "orphans.py"):
        shutil.copy(tests / name, target / "tests" / name)
    for name in ("__init__.py", "test_seccomp.py"):
        shutil.copy(tests / "sandbox" / name, target / "tests/sandbox" / name)
    shutil.copytree(tests / "security", target / "tests/security", ignore=shutil.ignore_patterns("__pycache__"))
    (target / "pytest.ini").write_text("[pytest]\nmarkers =\n  ci\n  night\n  needs\n")
    prefix = user.home / "python"
    subprocess.run(["cp", "-a", str(user.python.parent.parent), str(prefix)], check=True, timeout=seconds(300))
    subprocess.run(["chown", "-R", f"{user.uid}:{user.gid}", str(prefix), str(target)], check=True, timeout=60)
    python = prefix / "bin" / user.python.name
    done = user.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tier=ci", "tests/security", "-rs",
         "--ignore=tests/security/test_as_a_user.py"],
        cwd=target, timeout=seconds(600),
    )
    # Thousands of files: `userdel -r` has a minute for the rest.
    for path in (prefix, target, user.home / "tmp"):
        shutil.rmtree(path, ignore_errors=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
