"""Tiers, needs, and a session that leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import machine, support


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tier",
        choices=("fast", "ci", "night", "all"),
        default="all",
        help="fast: unmarked tests; ci: those and `ci`; night: those and `night`; default: whatever is named",
    )
    parser.addoption("--no-fast", action="store_true", help="leave out the unmarked tests of the tier")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tier = config.getoption("--tier")
    if tier == "all":
        return
    wanted = set() if config.getoption("--no-fast") else {"fast"}
    wanted.add(tier)
    kept, left = [], []
    for item in items:
        own = next((name for name in ("night", "ci") if item.get_closest_marker(name)), "fast")
        (kept if own in wanted else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        support.require(*mark.args)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Stop what the session shares, then look for processes, mounts, cgroups and directories of ours.

    Processes are told by descent; orphans are found by tests/orphans.py, under which `scripts/test` runs
    pytest. Where others run our package at the same time the rest cannot be told apart, so it only fails
    where MINISANDBOX_MUST_RUN has `clean`.
    """
    before = machine.Leftovers()
    yield
    _stop_shared()
    deadline = time.monotonic() + 5
    while (processes := machine.descendants(os.getpid())) and time.monotonic() < deadline:
        time.sleep(0.05)
    rest = machine.Leftovers() - before
    with contextlib.suppress(OSError):
        shutil.rmtree(support.shared_directory(), ignore_errors=True)
    lines = [f"process {line}" for line in processes] + rest
    if lines:
        text = "left behind by this test session:\n  " + "\n  ".join(lines)
        if processes or "clean" in support.must_run():
            pytest.fail(text, pytrace=False)
        print(text)


def _stop_shared() -> None:
    """The shared sandbox launcher, and a Ray that a test left connected."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
    if "skyrl_minisandbox.sandbox" in sys.modules:
        from skyrl_minisandbox.sandbox import shutdown_launcher

        shutdown_launcher()


@pytest.fixture(scope="session")
def session_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images of this session live. MINISANDBOX_TEST_CACHE keeps them from one session to the next."""
    kept = os.environ.get("MINISANDBOX_TEST_CACHE")
    path = Path(kept) if kept else tmp_path_factory.mktemp("images")
    path.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(scope="session")
def store_directory(session_directory: Path) -> Path:
    """The image store that tests share, so that an image is built once per session."""
    path = session_directory / "store"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def cache_directory(session_directory: Path) -> Path:
    """The node cache that tests share."""
    path = session_directory / "cache"
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="session")
def user() -> Iterator[support.OrdinaryUser]:
    """An ordinary user for the whole session; its home is shared by the tests that ask for it."""
    with support.ordinary_user() as account:
        yield account


@pytest.fixture(scope="session")
def wheel() -> Path:
    """The wheel of this checkout, where every user can read it."""
    support.require("build", "network")
    out = support.shared_directory() / "dist"
    build = [sys.executable, "-m", "build", "--outdir", str(out), "."]
    done = subprocess.run(build, cwd=support.REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    (found,) = out.glob("*.whl")
    found.chmod(0o644)
    return found
