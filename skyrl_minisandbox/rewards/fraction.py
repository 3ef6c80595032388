"""A number between 0 and 1: how much of what the task asks for passes."""

from __future__ import annotations

import math

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.report import TestReport

BELOW_ONE = math.nextafter(1.0, 0.0)
"""The most that anything but `resolved` is worth; a sum of weights could round up to 1."""


class Fraction:
    """1 for `resolved`; else the weighted share of the task's tests that pass, and at least one was mended.

    fail_to_pass, pass_to_pass: what each list is worth, above 0; only their ratio counts. They are alike by default:
        mending half of the bug is worth as much as what breaking half of the rest costs. The share is taken within
        each list, because pass-to-pass tests are often a hundred times as many and would drown the bug. Where a task
        has only one of the lists, that one is all.

    A patch under which no fail-to-pass test passes earns 0, however many pass-to-pass tests do: they passed before.
    So does every run whose results nothing vouches for: `tampered`, `tests_timeout` (a patch can bring that about
    before its forgery shows), a canary that did not come out as it must, a run that was rejected as a whole.
    """

    def __init__(self, *, fail_to_pass: float = 0.5, pass_to_pass: float = 0.5) -> None:
        self.fail_to_pass = weight("fail_to_pass", fail_to_pass)
        self.pass_to_pass = weight("pass_to_pass", pass_to_pass)

    def __call__(self, report: TestReport) -> float:
        """Shape: one report -> one number in [0, 1]; 1 only for `resolved`."""
        if report.resolved:
            return 1.0
        if report.outcome is not Outcome.UNRESOLVED or not report.failed:
            return 0.0
        if not all(canary.right for canary in report.canaries):
            return 0.0
        if report.fail_to_pass and not any(report.fail_to_pass.values()):
            return 0.0
        lists = ((self.fail_to_pass, report.fail_to_pass), (self.pass_to_pass, report.pass_to_pass))
        parts = [(each, sum(tests.values()) / len(tests)) for each, tests in lists if tests]
        value = sum(each * share for each, share in parts) / sum(each for each, _ in parts)
        return min(value, BELOW_ONE)


def weight(key: str, value: object) -> float:
    """`value` as a weight. Raises `InputError` for what is no finite number above 0."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
        return float(value)
    raise InputError(
        f"`reward.options.{key}={value}` must be a number above 0",
        hint=f"leave `reward.options.{key}` out for its default; only the ratio of the weights counts",
    )
