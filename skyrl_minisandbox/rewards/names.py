"""Which test a listed name means, among the names that a run told.

Names are matched whole. Datasets that were made with SWE-bench's parsers list some names as those cut them
(`test_x[log(photon` of `test_x[log(photon flux)]`, `[/b]` of `[/a/b]`): such a name means every test that its parser
would have called so, and stands for them only when they agree.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping

from skyrl_minisandbox.rewards.parsers import PASSING, swebench_log


def lookup(name: str, verdicts: Mapping[str, str], parser: str = "") -> str | None:
    """The verdict of the listed `name`, None when no test is meant or those meant disagree. See `Names`."""
    return Names(verdicts, parser).lookup(name)


class Names:
    """An index over what a run told, for many look-ups.

    verdicts: by whole name. parser: `Tests.parser` of the list, which tells how its names were cut.
    """

    def __init__(self, verdicts: Mapping[str, str], parser: str = "") -> None:
        self._verdicts = verdicts
        self._sorted: list[str] | None = None
        self._cut: dict[str, list[str]] = {}
        if parser.startswith("swebench-pytest") or parser in ("swebench-matplotlib", "swebench-seaborn"):
            for told in verdicts:
                cut = listed(told, parser)
                if cut != told:
                    self._cut.setdefault(cut, []).append(told)

    def tests(self, name: str) -> list[str]:
        """The told names that `name` means: itself, else those cut to it, else those that a truncated id begins."""
        if name in self._verdicts:
            return [name]
        if name in self._cut:
            return self._cut[name]
        if name.count("[") <= name.count("]"):
            return []
        if self._sorted is None:
            self._sorted = sorted(self._verdicts)
        start = end = bisect.bisect_left(self._sorted, name)
        while end < len(self._sorted) and self._sorted[end].startswith(name):
            end += 1
        return self._sorted[start:end]

    def lookup(self, name: str) -> str | None:
        """The verdict of the tests that `name` means; None when there are none or not all pass or none does.

        Of several, skipped ones do not count beside others: a log's summary, from which the lists were made, does not
        name them.
        """
        verdicts = [self._verdicts[test] for test in self.tests(name)]
        counted = [verdict for verdict in verdicts if verdict != "SKIPPED"] or verdicts
        if len({verdict in PASSING for verdict in counted}) != 1:
            return None
        return counted[0]


def listed(name: str, parser: str) -> str:
    """What SWE-bench's parser of that name would call the pytest node `name`; itself where it makes nothing of it."""
    if parser not in swebench_log.PARSERS:
        return name
    return next(iter(swebench_log.PARSERS[parser](f"PASSED {name}")), name)


def is_test(name: str, runner: str) -> bool:
    """Whether `name` can be a test of that runner at all.

    Two of SWE-bench Verified's lists hold `[100%]`, which its parser took from a wrapped progress line: only the log
    can tell of such a name.
    """
    return runner != "pytest" or "::" in name or ".py" in name
