"""Grading patches, and rewards computed from the grade."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.plugins import check_keys, load_plugin, make_plugin
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.grade import grade
from skyrl_minisandbox.rewards.patch import patch_from_upper
from skyrl_minisandbox.rewards.report import Canary, TestReport

__all__ = ["Canary", "Outcome", "Reward", "TestReport", "grade", "load_reward", "patch_from_upper"]

REWARDS = {
    "binary": "skyrl_minisandbox.rewards.binary:binary",
    "fraction": "skyrl_minisandbox.rewards.fraction:Fraction",
    "shaped": "skyrl_minisandbox.rewards.shaped:Shaped",
}

NEEDS = frozenset({"compiled"})
"""Fields of the TestReport that are only filled for a reward that names them in an attribute `needs`."""

_EXPORT = "a function `TestReport -> float`, or a class whose objects are called like one"


class Reward:
    """`reward(report) -> number`, for one configuration. Made by `load_reward`.

    name: as it was asked for. needs: what grading must look at beside the tests, a subset of `NEEDS`.
    """

    def __init__(self, name: str, function: Callable[[TestReport], Any], needs: frozenset[str]) -> None:
        self.name = name
        self.needs = needs
        self._function = function

    def __call__(self, report: TestReport | None) -> float | None:
        """The number of one report; None for what was not graded (None, or `infra_error`), which is never a number.

        `tampered` is never above 0, whatever the function gives. Raises `InputError` when a function of one's own
        gives something that is no finite number.
        """
        if report is None or report.outcome is Outcome.INFRA_ERROR:
            return None
        value = self._function(report)
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise InputError(
                f"reward `{self.name}` gave {value!r} for the outcome `{report.outcome}`, which is no finite number",
                hint="it must return a float; what could not be graded never reaches it",
            )
        number = float(value)
        return min(number, 0.0) if report.outcome is Outcome.TAMPERED else number


def load_reward(name: str, **options: Any) -> Reward:
    """The reward of one configuration.

    name: a key of `REWARDS`, or a dotted path to a function `TestReport -> float` or to a class.
    options: keyword arguments: of the class, or handed to the function beside the report.

    Raises `PluginError` for a name that leads to nothing, `InputError` for an option that it does not know or take.
    """
    found: Any = load_plugin("reward", name, REWARDS, export=_EXPORT)
    under = "reward.options"
    if isinstance(found, type):
        function = make_plugin("reward", name, found, options, under=under)
    elif callable(found):
        check_keys("reward", name, functools.partial(found, None), options, under=under)
        function = functools.partial(found, **options)
    else:
        function = found
    if not callable(function):
        raise InputError(f"reward `{name}` is {function!r}, which cannot be called", hint=f"it must be {_EXPORT}")
    needs = frozenset(getattr(found, "needs", ()))
    if needs - NEEDS:
        raise InputError(
            f"reward `{name}` needs {', '.join(sorted(needs - NEEDS))}; known: {', '.join(sorted(NEEDS))}",
            hint="its attribute `needs` names fields of the TestReport that are only filled when asked for",
        )
    return Reward(name, function, needs)
