"""What `minisandbox doctor` finds: what a machine lacks is said with its cost and what mends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox.features import Feature, features
from tests.support import needs, seconds

pytestmark = needs("userns", "overlay")

BY_CGROUP = {"memory-limit", "process-limit", "cpu-weight"}
PROGRAM = """
import dataclasses, json
from skyrl_minisandbox.sandbox.features import features
print(json.dumps([dataclasses.asdict(feature) for feature in features()]))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Feature]:
    return {feature.name: feature for feature in features()}


def test_everything_that_is_needed_works_here(found: dict[str, Feature]) -> None:
    assert {"kernel", "architecture", "user-namespaces", "sandbox"} <= {f.name for f in found.values() if f.needed}
    assert not [feature for feature in found.values() if feature.needed and not feature.ok]


def test_what_is_weaker_has_a_cost_and_what_works_has_no_fix(found: dict[str, Feature]) -> None:
    for feature in found.values():
        assert feature.what
        assert feature.cost if not feature.ok else not feature.fix, feature


def test_what_hangs_on_a_cgroup_is_named_with_what_gives_one(found: dict[str, Feature]) -> None:
    weaker = BY_CGROUP & set(found)
    assert found["cgroup"].ok == (not weaker)
    if weaker:
        assert all(name in found["cgroup"].cost for name in weaker)
        assert found["cgroup"].fix


def test_an_ordinary_user_has_a_single_id(found: dict[str, Feature]) -> None:
    assert found["id-range"].ok == (os.geteuid() == 0)


@needs("root")
def test_without_a_cgroup_file_system_limits_are_weaker_and_the_sandbox_is_made() -> None:
    hidden = ["unshare", "--mount", "sh", "-c", 'umount -lR /sys/fs/cgroup; exec "$@"', "sh"]
    done = subprocess.run(
        [*hidden, sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=seconds(120), check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr

    here = {row["name"]: row for row in json.loads(done.stdout)}
    assert here["sandbox"]["ok"] and not here["cgroup"]["ok"] and set(here) >= BY_CGROUP
    assert "cgroup" in here["cgroup"]["what"] and "/sys/fs/cgroup" in here["cgroup"]["fix"]
    assert "oom_killed" in here["memory-limit"]["cost"]
