"""Grading patches, and rewards computed from the grade."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.plugins import load_plugin
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.grade import grade
from skyrl_minisandbox.rewards.patch import patch_from_upper
from skyrl_minisandbox.rewards.report import Canary, TestReport

__all__ = ["Canary", "Outcome", "TestReport", "grade", "load_reward", "patch_from_upper"]

Reward = Callable[[TestReport | None], float | None]

REWARDS = {"binary": "skyrl_minisandbox.rewards.binary:binary"}


def load_reward(name: str) -> Reward:
    """Return `reward(report) -> number`.

    name: a key of `REWARDS`, or a dotted path to a function `TestReport -> float`.

    The returned function takes None for what was not graded: an `infra_error`, whose reward is None and
    never a number. It raises `InputError` when a reward of one's own gives something that is no finite
    number.
    """
    function: Any = load_plugin("reward", name, REWARDS, export="a function `TestReport -> float`")

    def reward(report: TestReport | None) -> float | None:
        if report is None or report.outcome is Outcome.INFRA_ERROR:
            return None
        value = function(report)
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        raise InputError(
            f"reward `{name}` gave {value!r} for the outcome `{report.outcome}`, which is no finite number",
            hint="it must return a float; what could not be graded never reaches it",
        )

    return reward
