"""What runs in a benchmark: ours, a floor, a peer. Each takes its own time, so that all are called the same way."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path


class Absent(Exception):
    """Why this contender, or one of its abilities, is not in the table."""


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all contenders stand on: the same root file system, and a directory of their own."""

    work: Path  # on disk, removed at the end
    root: Path  # an unpacked root file system
    root_name: str
    archive: Path | None  # a Python environment as .tar.gz, for the one who unpacks it for each sandbox
    peers: Path  # what `--install-peers` made and what outlives a run


class Seat:
    """One living sandbox with a shell in it. Each method returns the seconds that it took."""

    def echo(self) -> float:
        """A command in the shell that lives on."""
        raise Absent("no shell that lives on")

    def true(self) -> float:
        """A new process in the sandbox, /bin/true, from the outside."""
        raise Absent("no way to start a process in a living sandbox")

    def reset(self) -> float:
        """All changes are dropped, and the shell answers again."""
        raise Absent("no reset")

    def close(self) -> float:
        raise NotImplementedError

    def roots(self) -> list[int]:
        """Process ids: these and what descends from them are this sandbox's own."""
        return []


class Held:
    """Sandboxes that live at the same time."""

    def __init__(self, seats: list[Seat]) -> None:
        self.seats = seats

    def answer(self) -> int:
        """Every shell is asked once more; how many answered rightly."""
        for seat in self.seats:
            seat.echo()
        return len(self.seats)

    def release(self) -> None:
        for seat in self.seats:
            seat.close()


class Contender:
    """See the module. `name` is the column."""

    name = ""

    def start(self, ground: Ground) -> None:
        """Get ready, once. Raises `Absent` with the reason, in one line."""

    def stop(self) -> None:
        """Give back what `start` took."""

    def version(self) -> str:
        return ""

    def open(self) -> tuple[Seat, float]:
        """A new sandbox: seconds from nothing to the answer of the first `echo` in its shell."""
        raise NotImplementedError

    def rate(self, count: int, width: int) -> float:
        """Sandboxes a second, each made, answered and gone, `width` at a time."""
        left = threading.Semaphore(count)

        def one() -> None:
            while left.acquire(blocking=False):
                self.open()[0].close()

        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(width) as pool:
            for future in [pool.submit(one) for _ in range(width)]:
                future.result()
        return count / (time.perf_counter() - started)

    def hold(self, count: int) -> Held:
        """`count` sandboxes that stay, each of which has answered once."""
        return Held([self.open()[0] for _ in range(count)])

    def state(self) -> list[Path]:
        """Directories on disk where its sandboxes keep what is theirs."""
        return []


class Stopwatch:
    """`with Stopwatch() as watch: …; watch.seconds`."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


def descendants(roots: list[int]) -> Iterator[int]:
    """The processes and all below them."""
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        yield pid
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # ended meanwhile
