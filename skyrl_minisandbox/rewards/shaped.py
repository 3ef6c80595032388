"""A little for each step on the way: the patch applies, it compiles, its tests pass.

For models that are too weak to resolve anything at first. It pays for what is no solution, so its mean says little
about a model: look at the outcomes, and go over to `binary` as soon as some rollouts are `resolved`.
"""

from __future__ import annotations

from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.fraction import BELOW_ONE, Fraction, weight
from skyrl_minisandbox.rewards.report import TestReport

_APPLIED = (Outcome.UNRESOLVED, Outcome.TESTS_TIMEOUT)


class Shaped:
    """1 for `resolved`; else the weighted sum of three steps.

    applies: the patch goes in, whatever the tests say then.
    compiles: the Python files that it changes are byte-compiled; nothing where it changes none, or for a patch
        that changes only a text file would be worth as much as one that tries.
    tests: the `fraction` of the tests that pass. fail_to_pass, pass_to_pass: its weights.

    The weights are above 0 and only their ratio counts. By default the first two are a tenth each: enough to tell
    patches of a group apart that all fail, and less than mending one test of ten.
    """

    needs = frozenset({"compiled"})

    def __init__(
        self,
        *,
        applies: float = 0.1,
        compiles: float = 0.1,
        tests: float = 0.8,
        fail_to_pass: float = 0.5,
        pass_to_pass: float = 0.5,
    ) -> None:
        self.applies = weight("applies", applies)
        self.compiles = weight("compiles", compiles)
        self.tests = weight("tests", tests)
        self.fraction = Fraction(fail_to_pass=fail_to_pass, pass_to_pass=pass_to_pass)

    def __call__(self, report: TestReport) -> float:
        """Shape: one report -> one number in [0, 1]; 1 only for `resolved`."""
        if report.resolved:
            return 1.0
        if report.outcome not in _APPLIED:
            return 0.0
        value = self.applies + self.tests * self.fraction(report)
        if report.compiled:
            value += self.compiles
        return min(value / (self.applies + self.compiles + self.tests), BELOW_ONE)
