"""Where a launcher finds room for its cgroups on v2. Runs where v2 has the memory controller: in the 6.1 guest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import needs, seconds

POINT = Path("/sys/fs/cgroup")
NOBODY = 65534
ASK = """
import sys
from skyrl_minisandbox.sandbox.cgroup_places import find_places
sys.stdin.readline()
places, reasons = find_places()
print(*(f"{place.directory} {sorted(place.controllers)}" for place in places), *reasons, sep="\\n")
"""


@pytest.fixture
def top() -> Iterator[Path]:
    """A cgroup of our own at the root, whose children may have limits."""
    controllers = POINT / "cgroup.controllers"
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        pytest.skip("cgroup v2 has no memory controller here")
    if "memory" not in (POINT / "cgroup.subtree_control").read_text().split():
        (POINT / "cgroup.subtree_control").write_text("+memory +pids")
    made = POINT / f"test-places-{os.getpid()}"
    made.mkdir()
    yield made
    for directory in sorted(made.rglob("*"), reverse=True):
        if directory.is_dir():
            directory.rmdir()
    made.rmdir()


def found(cgroup: Path, user: int = 0) -> str:
    """What a process in that cgroup finds. It has ended then."""
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", ASK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        **({"user": user, "group": user, "extra_groups": []} if user else {}),  # type: ignore[call-overload]
    )
    (cgroup / "cgroup.procs").write_text(str(process.pid))
    output, _ = process.communicate("go\n", timeout=seconds(60))
    return str(output)


def delegate(directory: Path) -> None:
    for path in (directory, directory / "cgroup.procs", directory / "cgroup.subtree_control"):
        os.chown(path, NOBODY, NOBODY)


@needs("root")
def test_the_slice_above_a_service_is_taken(top: Path) -> None:
    (top / "service").mkdir()
    assert found(top / "service").startswith(f"{top} ['cpu', 'memory', 'pids']\n") or (
        found(top / "service").startswith(f"{top} ['memory', 'pids']\n")
    )


@needs("root")
def test_no_limit_that_is_set_on_us_is_left_behind(top: Path) -> None:
    (top / "cgroup.subtree_control").write_text("+memory +pids")
    (top / "service").mkdir()
    (top / "service/memory.max").write_text("1G")
    answer = found(top / "service")
    assert "memory.max" in answer and "Move them to a leaf" in answer and not answer.startswith(str(top) + " [")


@needs("root")
def test_a_user_gets_what_was_delegated_and_nothing_above(top: Path) -> None:
    (top / "cgroup.subtree_control").write_text("+memory +pids")
    (top / "service").mkdir()
    assert "systemd-run --user --scope" in found(top / "service", NOBODY)
    delegate(top / "service")
    assert "Move them to a leaf" in found(top / "service", NOBODY)
    (top / "service/own").mkdir()
    delegate(top / "service/own")
    assert found(top / "service/own", NOBODY).startswith(f"{top}/service [")


@needs("root")
def test_a_threaded_cgroup_is_gone_around(top: Path) -> None:
    (top / "domain/threads").mkdir(parents=True)
    (top / "domain/threads/cgroup.type").write_text("threaded")
    assert found(top / "domain/threads").startswith((f"{top} [", f"{POINT} ["))
