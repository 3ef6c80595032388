"""Running the command as a user does: in a process of its own, watched for what it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support import REPOSITORY


class Done(NamedTuple):
    """How a command ended. out, err: what it printed, the test's own directory written as DIR."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def minisandbox(tmp_path: Path) -> Command:
    """`minisandbox(*arguments, prefix=(), timeout=120)` in an empty working directory of its own.

    Whatever it is given, it may leave neither a process, nor a file in its temporary directory, nor a default
    store or cache, unless it was told to.
    """
    (tmp_path / "cwd").mkdir()

    def run(*arguments: str, prefix: Sequence[str] = (), timeout: float = 300) -> Done:
        temporary = Path(tempfile.mkdtemp(prefix="tmp-", dir=tmp_path))
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "TMPDIR": str(temporary),
            "XDG_CACHE_HOME": str(tmp_path / "xdg"),
        }
        environment.pop("RAY_ADDRESS", None)
        watched = [sys.executable, "-m", "tests.orphans", "10", *prefix, sys.executable]
        done = subprocess.run(
            [*watched, "-m", "skyrl_minisandbox.cli.main", *arguments],
            cwd=tmp_path / "cwd",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert "left behind" not in done.stderr, done.stderr
        assert not list(temporary.iterdir()), done.stderr
        return Done(done.returncode, *(text.replace(str(tmp_path), "DIR") for text in (done.stdout, done.stderr)))

    return run


@pytest.fixture
def places(store_directory: Path, cache_directory: Path) -> list[str]:
    """Overrides for the store and cache that the session's tests share, and for no Ray."""
    return [f"images.store={store_directory}", f"images.cache={cache_directory}", "cluster=local"]
