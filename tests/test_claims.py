"""A crash hides no directory, and a sweep takes nothing that is not ours or still in use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_minisandbox.claims import MARKER, Claim, sweep

# Claims a directory, has a child hold a file in it, says where, and waits.
_OWNER = """
import subprocess, sys
from pathlib import Path
from skyrl_minisandbox.claims import Claim
claim = Claim(Path(sys.argv[1]), Path(sys.argv[2]), "run-")
with open(claim.path / "log", "w") as log:
    child = subprocess.Popen(["sleep", "600"], stdout=log, start_new_session=True)
print(claim.path, child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path / "cache"), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def claimed(owner: subprocess.Popen[str]) -> tuple[Path, int]:
    assert owner.stdout is not None
    path, pid = owner.stdout.readline().split()
    return Path(path), int(pid)


def test_what_a_killed_owner_left_is_swept_with_the_processes_that_use_it(
    owner: subprocess.Popen[str], tmp_path: Path
) -> None:
    path, child = claimed(owner)
    assert sweep(tmp_path / "cache") == []  # it lives
    assert path.is_dir()
    owner.kill()
    owner.communicate()
    assert sweep(tmp_path / "cache") == [str(path)]
    assert not path.exists()
    assert state(child) in ("Z", "")
    assert sweep(tmp_path / "cache") == []


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_a_released_claim_is_gone_and_releasing_again_is_nothing(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "cache", tmp_path / "deep" / "er", "run-")
    assert claim.path.parent == tmp_path / "deep" / "er"
    assert claim.path.stat().st_mode & 0o077 == 0
    claim.release()
    claim.release()
    assert not claim.path.exists()
    assert list((tmp_path / "cache" / "claims").iterdir()) == []


def test_a_directory_without_our_mark_is_never_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    registry = tmp_path / "cache" / "claims"
    registry.mkdir(parents=True)
    (registry / "0123").write_text(str(precious))
    sweep(tmp_path / "cache")
    assert (precious / "file").read_text() == "kept"
    (registry / "0123").write_text(str(precious))
    (precious / MARKER).write_text("another claim's")
    sweep(tmp_path / "cache")
    assert (precious / "file").read_text() == "kept"


def test_an_owner_that_died_before_its_mark_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cache" / "claims").mkdir(parents=True)
    (tmp_path / "half").mkdir()
    (tmp_path / "cache" / "claims" / "4567").write_text(str(tmp_path / "half"))
    assert sweep(tmp_path / "cache") == [str(tmp_path / "half")]
    assert not (tmp_path / "half").exists()


def test_a_cache_without_claims_is_nothing_to_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nowhere") == []
