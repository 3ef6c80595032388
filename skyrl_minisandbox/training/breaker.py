"""The circuit breaker: a step whose rollouts mostly fail for reasons of ours ends, instead of training on the rest."""

from __future__ import annotations

from collections import Counter, deque

from skyrl_minisandbox.errors import InfraErrorsError
from skyrl_minisandbox.training.rows import INFRA_ERROR, Row

LEAST_SEEN = 16
"""Rows below which a fraction says little."""

LEAST_WINDOW = 32
"""Rows that are looked back on, where a call has fewer: a fully asynchronous one has a single group."""


class Breaker:
    """Looks at the last rows, of all calls together. Used from one event loop, so without a lock.

    most: the fraction of `infra_error` rows above which it trips (`training.max_infra_error_fraction`).
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self._rows: deque[Row] = deque(maxlen=LEAST_WINDOW)

    def add(self, row: Row, size: int) -> None:
        """A row that has ended. size: rows of its call.

        Raises `InfraErrorsError` once so many have failed that the rows still running cannot make up for it. Not
        earlier: rows that fail are the first to end.
        """
        window = max(size, LEAST_WINDOW)
        if window > (self._rows.maxlen or 0):
            self._rows = deque(self._rows, maxlen=window)
        self._rows.append(row)
        last = self._last(size)
        if len(_failed(last)) > self.most * window:
            raise self._error(last)

    def judge(self, rows: list[Row], *, alone: bool) -> None:
        """At the end of a call. alone: no other call is under way, from which more could be learnt.

        Raises `InfraErrorsError`.
        """
        last = self._last(len(rows))
        if len(last) >= LEAST_SEEN:
            if len(_failed(last)) > self.most * len(last):
                raise self._error(last)
        elif alone and rows and len(_failed(rows)) == len(rows) and self.most < 1:
            raise self._error(rows)

    def _last(self, size: int) -> list[Row]:
        return list(self._rows)[-max(size, LEAST_WINDOW) :]

    def _error(self, rows: list[Row]) -> InfraErrorsError:
        failed = _failed(rows)
        causes = _counted(row.event or "unknown" for row in failed)
        nodes = _counted(row.node or "none" for row in failed)
        return InfraErrorsError(
            f"{len(failed)} of the last {len(rows)} rollouts failed for reasons of ours, above "
            f"training.max_infra_error_fraction={self.most:g}. Causes: {causes}. Nodes: {nodes}. "
            f"The last one: {failed[-1].error or 'nothing was said'}",
            hint="minisandbox doctor, on those nodes",
        )


def _failed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.cause == INFRA_ERROR]


def _counted(words: object) -> str:
    return ", ".join(f"{word} {number}" for word, number in Counter(words).most_common())  # type: ignore[call-overload]
