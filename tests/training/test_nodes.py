"""Several Ray nodes: rollouts spread over them, and one that dies costs its rollouts a retry and the batch no row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.skyrl.environment import VERSIONS, trainer_python
from tests.support import needs, told_over_ray

pytestmark = [pytest.mark.night, needs("userns", "overlay", "git", "network")]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_node_killed_mid_step_costs_a_retry_and_no_row(
    version: str, small_images: dict[str, str], tmp_path: Path
) -> None:
    program = [trainer_python(version), "-m", "tests.training.nodes"]
    found = told_over_ray([*program, small_images["store"], small_images["cache"], tmp_path], timeout=600)
    assert found["spread"] == [4, 4, 4]
    assert found["rewards"] == [1.0] * 12 and all(found["exact"])
    assert sorted(found["tries"]) == [1] * 8 + [2] * 4
    # Ray may name the dead node for a moment more, so that a second try goes there as well.
    assert 4 <= found["metrics"]["minisandbox/retries_mean"] * 12 <= 8
    assert found["metrics"]["minisandbox/masked_mean"] == 0
    assert (found["nodes"], found["open"]) == (2, 0)
    assert found["alive"] == []
