"""Tasks and their gates while they are judged, on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

WORDS = {True: "yes", False: "NO", None: "-"}
"""A gate: passed, not passed, could not be tried (or not yet)."""


class LiveTable:
    """A table of what runs now on a terminal, with the finished above it; a line per change elsewhere.

    columns: the gates. total: tasks. earlier: of these, done by an earlier command.
    Thread-safe. As a context manager it takes the table down before anything else is printed.
    """

    def __init__(
        self, title: str, columns: Sequence[str], total: int, *, earlier: int = 0, stream: IO[str] | None = None
    ) -> None:
        self._title, self._columns, self._total, self._earlier = title, list(columns), total, earlier
        self._stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()  # guards all below, and keeps lines whole
        self._rows: dict[str, dict[str, bool]] = {}
        self._said: dict[str, str] = {}
        self._since: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._live: Live | None = None
        self._started = time.monotonic()

    def __enter__(self) -> LiveTable:
        if self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            self._live = Live(get_renderable=self._table, console=console, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._line(self._headline())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        if kind is None:
            self._line(f"{self._headline()}, in {time.monotonic() - self._started:.1f} s")

    def say(self, item: str, text: str) -> None:
        """`item` is now at `text`."""
        with self._lock:
            self._since.setdefault(item, time.monotonic())
            self._rows.setdefault(item, {})
            self._said[item] = text
            if self._live is None:
                self._line(f"  {item}: {text}")

    def gate(self, item: str, column: str, passed: bool) -> None:
        """A gate of `item` was decided."""
        with self._lock:
            self._rows.setdefault(item, {})[column] = passed

    def done(self, item: str, word: str, text: str = "") -> None:
        """`item` has come to its end. word: its class, counted in the headline; text: the reason."""
        with self._lock:
            for known in (self._rows, self._said, self._since):
                known.pop(item, None)
            self._counts[word] += 1
            line = f"  {item}: {word}" + (f": {text}" if text else "")
            if self._live is not None:
                self._live.console.print(line, markup=False, highlight=False)
            else:
                self._line(line)

    def _headline(self) -> str:
        done = self._earlier + sum(self._counts.values())
        counts = [f"{number} {word}" for word, number in sorted(self._counts.items())]
        earlier = [f"{self._earlier} by an earlier run"] if self._earlier else []
        return f"{self._title}: {done} of {self._total}" + (f" ({', '.join(counts + earlier)})" if done else "")

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        with self._lock:
            table = Table(title=self._headline(), title_justify="left", box=None, padding=(0, 2, 0, 0))
            for column in ("task", *(column.replace("_", " ") for column in self._columns), "now"):
                table.add_column(column, no_wrap=True)
            table.add_column("s", justify="right")
            for item, gates in self._rows.items():
                cells = [WORDS[gates[column]] if column in gates else "…" for column in self._columns]
                waited = f"{time.monotonic() - self._since.get(item, self._started):.0f}"
                table.add_row(*(Text(cell) for cell in (item, *cells, self._said.get(item, ""), waited)))
            return table

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
