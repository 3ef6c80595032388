"""scripts/bench/training --quick runs, and what it writes has the shape that others read. No speed is judged here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.bench.test_sandbox import check_rows
from tests.support import REPOSITORY, needs


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [REPOSITORY / "scripts/bench/training", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def traces() -> set[str]:
    return {str(path) for path in Path("/tmp").glob("minisandbox-bench-*")}


@pytest.mark.night
@needs("userns", "overlay", "git", "ray", "network")
def test_a_quick_run_has_a_value_of_ours_in_every_row_and_says_who_is_absent(tmp_path: Path) -> None:
    before = traces()
    file = tmp_path / "rows.json"
    done = bench("--quick", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(file.read_text())
    assert data["not_run"] == {}
    check_rows(data, "training")
    rows = {row["measure"]: row for row in data["rows"]}
    assert all(row["ours"] > 0 for row in rows.values())
    barred = [row for row in rows.values() if row["bar"]]
    assert [row["unit"] for row in barred] == ["ms", "1/s", "1/s", "s", "worker-hours"]
    assert all(row["holds"] in (True, False) for row in barred)
    tax = next(row for row in barred if row["unit"] == "worker-hours")
    assert {"SWE-ReX", "SWE-ReX (measured earlier)"} & set(tax["peers"])
    assert "docker" in data["absent"]
    assert traces() <= before


@pytest.mark.ci
@needs("userns", "overlay")
def test_an_unknown_row_is_refused_with_the_names_of_those_that_are() -> None:
    done = bench("--rows", "steps")
    assert done.returncode == 2
    assert "`steps` is not one of step, ceiling, request, tax" in done.stderr
