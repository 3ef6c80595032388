"""Whatever breaks wherever: `generate()` returns in time, with a row for each that was asked for, and hurts no other.

A cell is a place and a fault, which strikes under one of four rollouts, once or each time that its row comes again.
`faults.py` runs it with SkyRL's own generator loop, real nodes, worker processes and sandboxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.skyrl.environment import VERSIONS
from tests.support import REPOSITORY, needs
from tests.training.conftest import Trainers

machine = needs("userns", "overlay", "git", "network")

PLACES = ("env", "actor", "worker", "launcher", "store", "policy")
FAULTS = ("raises", "hangs", "dies", "slow", "wrong-type")

TRAINED = "trained with its own reward"
MASKED = "masked"
SCORED = "scored 0"
ENDED = "the step ends with the causes"

CANNOT = {
    ("env", "dies"): "the Env is an object of the trainer's process: what kills it kills the job (test_entrypoint.py)",
}
"""Cells that cannot exist."""

ONCE = {
    **{(place, fault): TRAINED for place in PLACES for fault in FAULTS},
    # An engine that hangs has used up `training.time`, and a row is tried again within it.
    ("policy", "hangs"): MASKED,
    ("policy", "dies"): ENDED,
}
"""What becomes of the row when it strikes once: it comes again, and is trained as if nothing had been."""

ALWAYS = {
    ("env", "raises"): MASKED,
    ("env", "wrong-type"): MASKED,
    ("actor", "raises"): MASKED,
    ("actor", "wrong-type"): MASKED,
    ("worker", "raises"): MASKED,
    ("worker", "wrong-type"): MASKED,
    # A row under which a process of ours dies elsewhere too, and alone, did it: see rewards/fault.py.
    ("worker", "dies"): SCORED,
    ("store", "raises"): MASKED,
    ("store", "dies"): MASKED,
    ("store", "wrong-type"): MASKED,
    ("policy", "raises"): MASKED,
    ("policy", "wrong-type"): MASKED,
}
"""The same where it strikes at each try."""

LINGERS = {
    ("launcher", "hangs"): "who asks it for a patch waits for client.PIPE_TIMEOUT, whatever a rollout may take; "
    "its worker gets no new rollouts meanwhile",
}
"""Cells after which a node still holds what was given up, for a while."""

LIMIT = 150.0
"""Seconds for `generate()`: the longest deadline there is, of an Env that hangs, once."""

QUICK = 40.0
"""The same where nothing hangs."""


class Cell(NamedTuple):
    place: str
    fault: str
    times: str
    expected: str
    method: str = "step"

    def __str__(self) -> str:
        method = "" if self.method == "step" else f".{self.method}"
        return f"{self.place}{method}-{self.fault}-{self.times}"


CELLS = [
    *(Cell(*where, "once", ONCE[where]) for where in ONCE if where not in CANNOT),
    *(Cell(*where, "always", expected) for where, expected in ALWAYS.items()),
    *(Cell("env", "raises", "once", TRAINED, method) for method in ("__init__", "init", "close", "get_metrics")),
    *(Cell("env", "wrong-type", "once", TRAINED, method) for method in ("init", "get_metrics")),
    Cell("env", "hangs", "once", TRAINED, "init"),
    Cell("env", "hangs", "once", TRAINED, "close"),
]

CI = {"0.4.0-env-raises-once", "0.4.0-worker-dies-once", "0.4.0-launcher-dies-once", "0.4.0-store-dies-always"} | {
    "0.4.0-policy-wrong-type-always",
    "0.4.0-worker-dies-always",
}
"""What the ci tier has time for."""


def test_every_place_and_fault_has_a_row() -> None:
    assert {(cell.place, cell.fault) for cell in CELLS} | set(CANNOT) == {(p, f) for p in PLACES for f in FAULTS}


def table() -> str:
    """The cells as docs/training.md has them."""

    def cell(place: str, fault: str) -> str:
        if (place, fault) in CANNOT:
            return "cannot be: that is the job's own process"
        once, always = ONCE[place, fault], ALWAYS.get((place, fault))
        return f"{once}; {always} if it does so at each try" if always else once

    head = f"| | {' | '.join(FAULTS)} |\n|---|{'---|' * len(FAULTS)}\n"
    return head + "".join(f"| {place} | {' | '.join(cell(place, fault) for fault in FAULTS)} |\n" for place in PLACES)


def test_the_documentation_has_the_table() -> None:
    assert table() in (REPOSITORY / "docs" / "training.md").read_text()


def cases() -> Iterator[Any]:
    for version in VERSIONS:
        for cell in CELLS:
            name = f"{version}-{cell}"
            yield pytest.param(version, cell, id=name, marks=pytest.mark.ci if name in CI else pytest.mark.night)


@machine
@pytest.mark.parametrize(("version", "cell"), list(cases()))
def test_a_fault_costs_no_row_but_its_own(
    version: str, cell: Cell, trainers: Trainers, small_images: dict[str, str], tmp_path: Path
) -> None:
    found = trainers.call(
        version,
        "tests.training.faults:run",
        timeout=2 * LIMIT,
        place=cell.place,
        fault=cell.fault,
        times=cell.times,
        method=cell.method,
        env={"images": small_images},
        directory=str(tmp_path),
    )
    check(cell, found)


def check(cell: Cell, found: dict[str, Any]) -> None:
    assert found["struck"], "nothing was broken"
    assert found["seconds"] < (LIMIT if cell.fault == "hangs" else QUICK)
    assert not found["not_closed"]
    assert found["open"] == 0 or (cell.place, cell.fault) in LINGERS
    if cell.expected is ENDED:
        assert found["error"].startswith("InfraErrorsError: ") and "Causes: " in found["error"]
        return
    assert not found["error"]
    *live, victim = found["rows"]
    assert [row["session"] for row in live] == ["0_0", "0_1", "1_0"]
    for row in live:
        assert row["reward"] == 1.0 and row["exact"] and not row["masked"], row
    if cell.expected is MASKED:
        # It stands for the mean of its group, which is the other row.
        assert victim["masked"] and victim["tokens"] == 1 and victim["reward"] == 1.0, victim
        assert found["metrics"]["minisandbox/masked_mean"] == 0.25
    else:
        assert victim["exact"] and not victim["masked"], victim
        assert victim["reward"] == (1.0 if cell.expected is TRAINED else 0.0), victim
        assert found["metrics"]["minisandbox/masked_mean"] == 0.0
