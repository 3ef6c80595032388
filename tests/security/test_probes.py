"""The 80 isolation probes, from inside, beside which `docs/security.md` shows the peers.

Bar: nothing BAD, and WEAK only what is accepted by name. The same rows get through on the bare host, so a verdict of OK
is the sandbox's doing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.security import table, traps
from tests.security.inside.common import VARIABLE
from tests.security.suite import run_suite
from tests.support import OrdinaryUser, needs, require, seconds


@pytest.fixture(scope="module")
def planted() -> Iterator[traps.Traps]:
    with traps.Traps() as made:
        yield made


@pytest.fixture(scope="module")
def verdicts(planted: traps.Traps) -> dict[str, Any]:
    require("userns", "overlay")
    found = run_suite(planted.facts)
    table.keep(found)
    return found


def hold(found: dict[str, Any]) -> None:
    """Fail with the rows that are not as they must be."""
    wrong = table.unaccepted(found)
    assert not wrong, "\n".join(f"{who} {name}: {verdict} ({detail})" for who, name, verdict, detail in wrong)


@needs("root")
def test_every_trap_is_set(planted: traps.Traps, tmp_path: Path) -> None:
    """As root on the bare host the same rows get through: a sandbox that refuses them refuses something."""
    facts = {**planted.facts, "state_directory": str(tmp_path), "rows": [*traps.ON_THE_HOST]}
    done = subprocess.run(
        [sys.executable, "-m", "inside.probes"], cwd=Path(__file__).parent, capture_output=True, text=True,
        timeout=seconds(60), check=True, env={VARIABLE: json.dumps(facts), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    found = {name: verdict for name, verdict, _ in map(json.loads, done.stdout.splitlines())}
    if os.path.lexists(planted.facts["tmp_file"]):
        found["f04"] = "BAD"
        os.unlink(planted.facts["tmp_file"])
    assert sorted(found) == sorted(traps.ON_THE_HOST)
    missed = {name for name, verdict in found.items() if verdict != "BAD"}
    print(f"no trap here: {planted.missing}")
    assert missed <= set(planted.missing), f"these traps catch nothing: {sorted(missed)}"


def test_nothing_gets_through_and_only_what_is_accepted_is_weak(verdicts: dict[str, Any]) -> None:
    hold(verdicts)


def test_every_row_was_tried(verdicts: dict[str, Any]) -> None:
    for who in ("root", "user"):
        if verdicts[who] is not None:
            assert list(verdicts[who]) == list(table.NAMES), who
    assert (verdicts["user"] is None) == verdicts["machine"]["single_id"]


def test_loopback_works_inside(verdicts: dict[str, Any]) -> None:
    """By the row's own rule an error is OK too."""
    for who in ("root", "user"):
        if verdicts[who] is not None:
            assert verdicts[who]["n07"] == ("OK", "connected")


@pytest.fixture(scope="module")
def user_verdicts(user: OrdinaryUser, planted: traps.Traps) -> dict[str, Any]:
    found = table.as_a_user(user, planted.facts)
    table.keep(found)
    return found


@pytest.mark.ci
@needs("rootless", "overlay")
def test_an_ordinary_users_sandbox_lets_nothing_through_either(user_verdicts: dict[str, Any]) -> None:
    assert user_verdicts["machine"]["uid"] != 0 and user_verdicts["user"] is None
    assert list(user_verdicts["root"]) == list(table.NAMES)
    hold(user_verdicts)


@pytest.mark.ci
@needs("rootless", "overlay")
def test_the_table_in_the_documentation_is_what_was_found(
    verdicts: dict[str, Any], user_verdicts: dict[str, Any]
) -> None:
    shown = table.shown_verdicts(table.DOCUMENT.read_text())
    for column, found in (("root", verdicts), ("user", user_verdicts)):
        for name in table.NAMES:
            # A machine that delegates a memory cgroup to users shows OK where the table has the weaker.
            allowed = {shown[column][name]} | ({"OK", "WEAK"} if name in table.accepted(found) else set())
            assert table.worst(found, name) in allowed, f"{column} {name}: run `python -m tests.security.table`"


def test_counting_takes_the_worse_of_both_and_leaves_information_out() -> None:
    fine = dict.fromkeys(table.NAMES, ("OK", ""))
    found: dict[str, Any] = {"machine": {}, "root": dict(fine), "user": dict(fine)}
    found["user"] |= {"p01": ("BAD", ""), "l04": ("INFO", "")}
    found["root"] |= {"p01": ("WEAK", ""), "h03": ("WEAK", "")}
    assert table.totals(found) == (1, 1)
    assert dataclasses.is_dataclass(table.Peer) and all(len(peer.verdicts) == 80 for peer in table.PEERS)
