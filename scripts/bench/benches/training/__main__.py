"""scripts/bench/training: run the rows, print the table, write the JSON."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from benches.command import add_choice, add_options, deliver, expect_known, run, say
from benches.contender import Absent, Ground
from benches.report import Report
from benches.sandbox.root import small_root
from benches.training.measures import QUICK, REPOSITORY, Measures, Size
from benches.training.rollouts import TASKS, make_tasks
from skyrl_minisandbox import __version__
from skyrl_minisandbox.env import shutdown


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
    add_options(parser, "at most a minute: few samples, and no Docker")
    add_choice(parser, rows)
    parsed = parser.parse_args(argv)
    parsed.rows = parsed.rows.split(",") if parsed.rows else rows
    expect_known(parser, parsed.rows, rows)
    return parsed


def main() -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    arguments = arguments_of(sys.argv[1:])
    deliver(measure(arguments), arguments)


if __name__ == "__main__":
    run(main)
