"""1 when every fail-to-pass and pass-to-pass test passes, else 0."""

from __future__ import annotations

from skyrl_minisandbox.rewards.report import TestReport


def binary(report: TestReport) -> float:
    """Return 1.0 for `resolved`, 0.0 for every other grade."""
    return 1.0 if report.resolved else 0.0
