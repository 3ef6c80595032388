"""scripts/bench/training: run the rows, print the table, write the JSON."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from benches.contender import Absent, Ground
from benches.report import Report, put_figures
from benches.sandbox.root import small_root
from benches.training.measures import QUICK, REPOSITORY, Measures, Size
from benches.training.rollouts import TASKS, make_tasks
from skyrl_minisandbox import __version__
from skyrl_minisandbox.env import shutdown


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> Report:
    report = Report("training", versions={"ours": __version__, "ray": metadata.version("ray")})
    report.facts.update(quick=arguments.quick, euid=os.geteuid())
    work = Path(tempfile.mkdtemp(prefix="minisandbox-bench-", dir=arguments.work))
    try:
        say("building the tasks' images")
        tasks = make_tasks(work / "store", work / "cache", 2 if arguments.quick else TASKS)
        measures = Measures(work, tasks, report, QUICK if arguments.quick else Size(), docker_ground(arguments, work))
        for name, row in measures.rows().items():
            if name not in arguments.rows:
                continue
            started = time.monotonic()
            try:
                row()
            except KeyboardInterrupt:
                report.not_run[name] = "interrupted, as all that would have followed"
                break
            except Absent as why:
                report.not_run[name] = str(why)
            except Exception as error:
                report.not_run[name] = f"{type(error).__name__}: {error}"
            say(f"{name}: {time.monotonic() - started:.1f} s")
    finally:
        shutdown()
        shutil.rmtree(work, ignore_errors=True)
    return report


def docker_ground(arguments: argparse.Namespace, work: Path) -> Ground | None:
    """What Docker is given: the small root of scripts/bench/sandbox --quick."""
    if arguments.quick or "tax" not in arguments.rows:
        return None
    peers = REPOSITORY / ".cache/bench"
    peers.mkdir(parents=True, exist_ok=True)
    return Ground(work, work / "root", small_root(work / "root"), None, peers)


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench/training", description=__doc__)
    rows = list(Measures.rows(Measures.__new__(Measures)))
    parser.add_argument("--quick", action="store_true", help="at most a minute: few samples, and no Docker")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put the table between the two marks of this page")
    parser.add_argument("--rows", help=f"some of {','.join(rows)}")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bar is missed")
    parser.add_argument("--work", type=Path, help="where temporary directories are made; ext4, xfs or btrfs")
    parsed = parser.parse_args(argv)
    parsed.rows = parsed.rows.split(",") if parsed.rows else rows
    for name in parsed.rows:
        if name not in rows:
            parser.error(f"`{name}` is not one of {', '.join(rows)}")
    return parsed


def _end(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # what was started ends, and what was made is removed


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    logging.getLogger("ray").setLevel(logging.ERROR)
    arguments = arguments_of(sys.argv[1:])
    report = measure(arguments)
    print(report.text())
    if arguments.json:
        report.write(arguments.json)
    if arguments.docs:
        put_figures(arguments.docs, report.markdown())
    if arguments.check and any(row.holds is False for row in report.rows):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
