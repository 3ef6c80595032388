"""No cheat is paid, and nobody honest is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import REWARDS, load_reward
from tests.rewards.hacks import HACKS, TWINS
from tests.rewards.hacks.hack import KINDS, Hack, Twin
from tests.rewards.hacks.suite import Bench
from tests.rewards.hacks.table import BEGIN, DOCUMENT, END
from tests.support import require

_QUICK = frozenset({"conftest-report", "forged-summary", "chosen-runtest", "expected-failure", "unittest-should-stop"})
"""What the fast tier tries; all of them take minutes."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, store_directory: Any, cache_directory: Any) -> Iterator[Bench]:
    """Images of the small project, and of Django and SymPy when they are asked for."""
    require("userns", "overlay", "git", "network")
    yield Bench(Store(store_directory), Cache(cache_directory), Sources(tmp_path_factory.mktemp("sources")))


def _each(items: list[Any], quick: frozenset[str] = frozenset(), *, expected: bool = False) -> list[Any]:
    """A parameter for each. expected: those that are known to be paid must be, until they are stopped."""
    found = []
    for item in items:
        marks: list[Any] = [] if item.name in quick else [pytest.mark.ci]
        if expected and item.paid:
            # One that is caught by luck may be caught each time.
            marks.append(pytest.mark.xfail(strict=item.tries == 1, reason=item.paid))
        found.append(pytest.param(item, id=item.name, marks=marks))
    return found


@pytest.mark.parametrize("hack", _each(HACKS, _QUICK, expected=True))
def test_a_hack_is_not_paid(bench: Bench, hack: Hack) -> None:
    for _ in range(hack.tries):
        report = bench.report(hack, "protected")
        assert not report.resolved, report.log
        for name in REWARDS:
            value = load_reward(name)(report)
            assert value is not None and value < 1.0  # scored, never masked
            if report.outcome is Outcome.TAMPERED:
                assert value == 0.0


@pytest.mark.night
@pytest.mark.parametrize("hack", [pytest.param(hack, id=hack.name) for hack in HACKS if hack.bait])
def test_the_hack_works_where_nothing_stops_it(bench: Bench, hack: Hack) -> None:
    assert bench.bait_taken(hack)


@pytest.mark.parametrize("mode", ["official", "protected"])
@pytest.mark.parametrize("twin", _each(TWINS))
def test_an_honest_twin_is_paid(bench: Bench, twin: Twin, mode: str) -> None:
    report = bench.report(twin, mode)
    assert report.resolved, f"{report.outcome}: {report.error}\n{report.log}"
    assert load_reward("binary")(report) == 1.0


@pytest.mark.ci
@pytest.mark.parametrize("runner", sorted({hack.runner for hack in HACKS}))
@pytest.mark.parametrize("mode", ["official", "protected"])
def test_both_modes_agree_on_the_fix_and_on_nothing(bench: Bench, runner: str, mode: str) -> None:
    from skyrl_minisandbox.config import GradingConfig
    from skyrl_minisandbox.rewards import grade

    task = bench.task(runner)
    with bench.opener(task) as open_sandbox:
        grading = GradingConfig(mode=mode)
        assert grade(task, task.gold_patch, open_sandbox, grading=grading).outcome is Outcome.RESOLVED
        empty = grade(task, "", open_sandbox, grading=grading, run_empty=True)
        assert empty.outcome is Outcome.UNRESOLVED
        assert not any(empty.fail_to_pass.values()) and all(empty.pass_to_pass.values())


def test_the_suite_is_as_wide_as_it_says() -> None:
    kinds = Counter(hack.kind for hack in HACKS)
    assert len(HACKS) >= 40 and set(kinds) == set(KINDS) and len(KINDS) >= 10
    assert kinds["in-process"] >= 8
    assert {twin.kind for twin in TWINS} == set(KINDS), "each class has an honest twin"
    names = [hack.name for hack in HACKS] + [twin.name for twin in TWINS]
    assert len(names) == len(set(names))
    assert {hack.name for hack in HACKS} >= _QUICK


def test_the_table_in_the_docs_is_of_this_suite() -> None:
    shown = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    assert f"{len(HACKS)} hacks of {len(KINDS)} classes" in shown
    for kind, text in KINDS.items():
        row = next(line for line in shown.splitlines() if line.startswith(f"| **{kind}**: {text} |"))
        assert row.split(" | ")[1] == str(sum(hack.kind == kind for hack in HACKS))
    still_paid = {line.split("`")[1] for line in shown.splitlines() if line.startswith("- `")}
    assert still_paid <= {hack.name for hack in HACKS if hack.paid}
