"""scripts/bench/rewards --quick runs, and its rows have the shape that others read. No speed is judged here."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.bench.test_sandbox import ROW
from tests.support import REPOSITORY, needs

pytestmark = [pytest.mark.night, needs("userns", "overlay", "git", "network")]


def test_each_task_has_a_row_and_all_together_have_the_bar(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    done = subprocess.run(
        [REPOSITORY / "scripts/bench/rewards", "--quick", "--json", file],
        capture_output=True, text=True, timeout=600, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    data = json.loads(file.read_text())
    assert data["benchmark"] == "rewards"
    assert all(set(row) == ROW for row in data["rows"])
    assert all(row["ours"] > 0 for row in data["rows"])
    whole = next(row for row in data["rows"] if row["bar"])
    assert whole["bar"] == "≤ 1.15x official"
    assert whole["peers"]["official"] == pytest.approx(
        sum(row["peers"]["official"] for row in data["rows"] if row is not whole and row["peers"]), rel=0.01
    )
    assert done.returncode == 0, done.stderr
