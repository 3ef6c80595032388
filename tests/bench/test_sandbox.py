"""scripts/bench/sandbox --quick runs, and what it writes has the shape that others read. No speed is judged here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPOSITORY, needs

ROW = {"measure", "ours", "unit", "peers", "ratio", "bar", "holds"}


def bench(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts/bench/sandbox", *arguments],
        capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL,
    )


def traces() -> set[str]:
    """Directories of a benchmark, and cgroups of its floor."""
    places = [*Path("/tmp").glob("minisandbox-bench-*"), *Path("/sys/fs/cgroup").rglob("minisandbox-floor-*")]
    return {str(path) for path in places}


def check_rows(data: dict[str, Any], name: str) -> None:
    assert data["benchmark"] == name
    assert data["header"]["kernel"] == os.uname().release
    assert "ours" in data["header"]["versions"]
    for row in data["rows"]:
        assert set(row) == ROW
        assert isinstance(row["measure"], str) and isinstance(row["unit"], str) and isinstance(row["bar"], str)
        assert row["ours"] is None or isinstance(row["ours"], float)
        assert row["holds"] in (True, False, None)
        for name, ratio in row["ratio"].items():
            assert ratio == pytest.approx(row["ours"] / row["peers"][name], rel=0.01)


@pytest.mark.ci
@needs("root", "userns", "overlay")
def test_a_quick_run_writes_rows_of_the_agreed_shape_and_names_who_is_absent(tmp_path: Path) -> None:
    before = traces()
    file = tmp_path / "rows.json"
    done = bench("--quick", "--rows", "create,shell", "--peers", "floor,nitrobox", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    check_rows(data, "sandbox")
    told = [row["measure"] for row in data["rows"]]
    assert any("create to the first echo" in name for name in told), done.stdout
    assert data["rows"][0]["ours"] > 0, data["not_run"]
    everybody = {"bubblewrap", "crun", "runc", "podman", "docker", "nitrobox", "sandlock", "reference", "floor"}
    assert everybody <= set(data["absent"]) | set(data["header"]["versions"]) | set(data["rows"][0]["peers"])
    assert "docker" in done.stdout  # absent, and said so
    assert traces() <= before


@pytest.mark.ci
@needs("root", "userns", "overlay")
def test_the_floor_is_compiled_and_makes_sandboxes_here(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = bench("--quick", "--rows", "create", "--peers", "floor", "--json", file)
    data = json.loads(file.read_text())
    if "floor" in data["absent"] and data["absent"]["floor"] == "no C compiler":
        pytest.skip("no C compiler")
    assert "floor" not in data["absent"], data["absent"]
    assert data["rows"][0]["ratio"]["floor"] > 0, done.stdout


@needs("userns", "overlay")
def test_an_unknown_row_is_refused_with_the_names_of_those_that_are() -> None:
    done = bench("--rows", "creation")
    assert done.returncode == 2
    assert "`creation` is not one of create," in done.stderr


@pytest.mark.ci
@pytest.mark.parametrize(
    ("rows", "count"), [("create,create-off,pool,rate", 5), ("shell,run,reset,fork", 5), ("live,memory,rate-1", 7)]
)
@needs("root", "userns", "overlay", "cgroup")
def test_every_row_of_a_quick_run_has_a_value_of_ours(tmp_path: Path, rows: str, count: int) -> None:
    file = tmp_path / "rows.json"
    peers = "floor,reference without archive"
    done = bench("--quick", "--rows", rows, "--peers", peers, "--json", file, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    check_rows(data, "sandbox")
    # What the kernel took is no number on a machine that does other things; all else must have run.
    reasons = {name: why for name, why in data["not_run"].items() if "drowned" not in why}
    assert not reasons, reasons
    assert len(data["rows"]) == count
    missing = [row["measure"] for row in data["rows"] if row["ours"] is None and "kernel" not in row["measure"]]
    assert not missing, missing
