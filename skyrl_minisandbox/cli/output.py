"""What a person sees: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Columns two spaces apart on stdout, readable without colour. right: columns aligned to the right."""
    print(format_table(headers, rows, right=right))


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """The text that `print_table` prints."""
    widths = [max(len(line[column]) for line in [headers, *rows]) for column in range(len(headers))]
    lines = []
    for line in [headers, *rows]:
        cells = [
            cell.rjust(widths[column]) if column in right else cell.ljust(widths[column])
            for column, cell in enumerate(line)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(data, indent=2, sort_keys=False, default=str))


def seconds(value: float) -> str:
    """`0.012`, `1.50`, `75.0`: three figures are enough to compare and short enough for a column."""
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


class Progress:
    """What is going on, on stderr: a live display on a terminal, a line per change elsewhere.

    Thread-safe. As a context manager it takes the display down before anything else is printed.
    """

    def __init__(self, title: str, total: int, stream: IO[str] | None = None) -> None:
        self._title, self._total, self._done = title, total, 0
        self._stream = stream if stream is not None else sys.stderr
        self._lock = threading.Lock()  # guards all below, and keeps lines whole
        self._rich: RichProgress | None = None
        self._overall: TaskID | None = None
        self._rows: dict[str, TaskID] = {}
        self._started = time.monotonic()

    def __enter__(self) -> Progress:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import Progress as RichProgress
            from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

            self._rich = RichProgress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
                transient=True,
            )
            self._rich.start()
            self._overall = self._rich.add_task(self._headline(), total=None)
        else:
            self._line(f"{self._title}: {self._total}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._rich is not None:
                self._rich.stop()
                self._rich = None
            if kind is None:
                self._line(f"{self._title}: {self._headline_tail()} in {time.monotonic() - self._started:.1f} s")

    def say(self, item: str, text: str) -> None:
        """`item` is now at `text`."""
        with self._lock:
            if self._rich is None:
                self._line(f"  {item}: {text}")
                return
            if item not in self._rows:
                self._rows[item] = self._rich.add_task("", total=None)
            self._rich.update(self._rows[item], description=f"  {item}: {text}"[: self._rich.console.width - 14])

    def done(self, item: str, text: str) -> None:
        """`item` has come to its end, with `text` as its result."""
        with self._lock:
            self._done += 1
            if self._rich is None:
                self._line(f"  {item}: {text}")
                return
            if item in self._rows:
                self._rich.remove_task(self._rows.pop(item))
            if self._overall is not None:
                self._rich.update(self._overall, description=self._headline())
            self._rich.console.print(f"  {item}: {text}", markup=False, highlight=False)

    def _headline(self) -> str:
        return f"{self._title}: {self._headline_tail()}"

    def _headline_tail(self) -> str:
        return f"{self._done} of {self._total}"

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


@contextmanager
def stage(text: str) -> Iterator[None]:
    """Say on stderr what takes a while now."""
    print(f"{text} …", file=sys.stderr, flush=True)
    yield
