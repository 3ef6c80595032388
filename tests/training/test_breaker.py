"""The circuit breaker trips when rollouts mostly fail for reasons of ours, and says which."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.errors import InfraErrorsError
from skyrl_minisandbox.training.breaker import Breaker
from skyrl_minisandbox.training.rows import INFRA_ERROR, PROMPT_TOO_LONG, Row


def good(number: int) -> list[Row]:
    return [Row("g") for _ in range(number)]


def bad(number: int, event: str = "node_lost", node: str = "a", error: str = "it is gone") -> list[Row]:
    return [Row("g", cause=INFRA_ERROR, event=event, node=node, error=error) for _ in range(number)]


def run(breaker: Breaker, rows: list[Row], *, alone: bool = True) -> None:
    for row in rows:
        breaker.add(row, len(rows))
    breaker.judge(rows, alone=alone)


def test_a_step_within_the_fraction_goes_on() -> None:
    run(Breaker(0.2), good(80) + bad(20))


def test_a_step_above_it_ends_with_the_causes_and_nodes_counted() -> None:
    rows = good(14) + bad(3) + bad(2, "store_gone", "b") + bad(1, "", "", "RuntimeError: the last")
    with pytest.raises(InfraErrorsError) as caught:
        run(Breaker(0.2), rows)
    assert caught.value.message == (
        "6 of the last 20 rollouts failed for reasons of ours, above training.max_infra_error_fraction=0.2. "
        "Causes: node_lost 3, store_gone 2, unknown 1. Nodes: a 3, b 2, none 1. The last one: RuntimeError: the last"
    )
    assert "minisandbox doctor" in caught.value.hint


def test_it_trips_as_soon_as_the_rest_cannot_make_up_for_it_and_not_before() -> None:
    breaker = Breaker(0.2)
    rows = bad(100)
    for row in rows[:20]:  # those that fail are the first to end
        breaker.add(row, 100)
    with pytest.raises(InfraErrorsError, match=r"^21 of the last 21 "):
        breaker.add(rows[20], 100)


def test_small_calls_are_judged_together() -> None:
    breaker = Breaker(0.2)
    for _ in range(3):
        run(breaker, good(3) + bad(1), alone=False)
    with pytest.raises(InfraErrorsError, match=r"^4 of the last 16 "):
        run(breaker, good(3) + bad(1), alone=False)


def test_only_the_last_rows_count() -> None:
    breaker = Breaker(0.5)
    run(breaker, bad(7) + good(1))
    for _ in range(4):
        run(breaker, good(8))
    run(breaker, good(4) + bad(4))  # 4 of 32


def test_a_small_call_of_which_all_failed_trips_where_no_other_may_know_better() -> None:
    with pytest.raises(InfraErrorsError, match=r"^3 of the last 3 "):
        run(Breaker(0.2), bad(3))
    run(Breaker(0.2), bad(3), alone=False)
    run(Breaker(0.2), bad(3) + good(1))
    run(Breaker(1.0), bad(3))


def test_one_switches_it_off() -> None:
    run(Breaker(1.0), bad(200))


def test_a_prompt_that_is_too_long_is_no_fault_of_ours() -> None:
    run(Breaker(0.2), [Row("g", cause=PROMPT_TOO_LONG) for _ in range(64)])
