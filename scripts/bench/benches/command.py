"""What the commands of all rooms share: their options, their signals, where their rows go."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benches.report import Report, put_figures

INTERRUPTED = 130


def say(text: str) -> None:
    """To whoever waits: the rows alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """Those of every room. quick: what `--quick` leaves out."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put the table between the two marks of this page")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")


def add_choice(parser: argparse.ArgumentParser, rows: Sequence[str]) -> None:
    """Those of a room whose rows can be chosen, and which needs a place."""
    parser.add_argument("--rows", help=f"some of {','.join(rows)}")
    parser.add_argument("--work", type=Path, help="where temporary directories are made; ext4, xfs or btrfs")


def expect_known(parser: argparse.ArgumentParser, given: Sequence[str], known: Sequence[str]) -> None:
    """Exits 2 for a name that is none of them."""
    for name in given:
        if name not in known:
            parser.error(f"`{name}` is not one of {', '.join(known)}")


def deliver(report: Report, arguments: argparse.Namespace) -> None:
    """Print the rows and put them where `add_options` was told. Exits 1 where `--check` wants it."""
    print(report.text())
    if arguments.json:
        report.write(arguments.json)
    if arguments.docs:
        put_figures(arguments.docs, report.markdown())
    if arguments.check and any(row.holds is False for row in report.rows):
        sys.exit(1)


def run(main: Callable[[], None]) -> None:
    """Call `main`; a signal to end ends it in order: what was started ends, and what was made is removed."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
