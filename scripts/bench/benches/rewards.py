"""What protected grading costs beside official: the gold patch of each `pypi` task, both ways in turn.

Builds the tasks' images first where the store has none (about a minute, from the package index).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benches.command import add_options, deliver, run, say
from benches.report import Bar, Report, Row
from skyrl_minisandbox import __version__
from skyrl_minisandbox.config import EnvConfig, GradingConfig
from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import grade
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks import Task, load_tasks

MODES = ("official", "protected")
BAR = 1.15
"""From the issue that asked for protected grading: wall time on the `pypi` set, both modes on the same machine."""


def measure(task: Task, open_sandbox: Callable[[], Sandbox], times: int) -> dict[str, float]:
    """Median seconds by mode; in turn, so that a busy machine is busy for both."""
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(times):
        for mode in MODES if turn % 2 else MODES[::-1]:
            began = time.perf_counter()
            report = grade(task, task.gold_patch, open_sandbox, grading=GradingConfig(mode=mode))
            seconds[mode].append(time.perf_counter() - began)
            if report.outcome is not Outcome.RESOLVED:
                raise SystemExit(f"{task.id}, {mode}: {report.outcome}: {report.error}")
    return {mode: statistics.median(values) for mode, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "three tasks, once each")
    parser.add_argument("--times", type=int, default=5, help="gradings of each task in each mode (default: 5)")
    given = parser.parse_args()
    places = EnvConfig().images
    store, cache = Store(Path(places.store)), Cache(Path(places.cache))
    sources = Sources(cache.path / "sources")
    tasks = load_tasks("pypi", sources=sources)[: 3 if given.quick else None]
    report = Report("rewards", versions={"ours": __version__})
    total = dict.fromkeys(MODES, 0.0)
    ratios = []
    for task in tasks:
        say(f"{task.id} …")
        image = build_image(task.recipe, store=store, cache=cache, name=task.id, sources=sources)
        with cache.checkout(image, store) as made:
            spec = made.sandbox_spec()
            found = measure(task, lambda spec=spec: Sandbox(spec), 1 if given.quick else given.times)  # type: ignore[misc]
        for mode in MODES:
            total[mode] += found[mode]
        ratios.append(found["protected"] / found["official"])
        report.rows.append(Row(task.id, "s", found["protected"], {"official": found["official"]}))
    bars = (Bar(BAR, "official"),)
    report.rows.append(Row("all tasks together", "s", total["protected"], {"official": total["official"]}, bars))
    report.rows.append(Row("the median task", "x official", statistics.median(ratios), {}))
    deliver(report, given)


if __name__ == "__main__":
    run(main)
