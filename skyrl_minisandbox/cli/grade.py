"""`minisandbox grade predictions=FILE`: run the tests on finished patches."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import Progress, print_json, print_table, seconds
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench, in_threads
from skyrl_minisandbox.errors import InputError, MiniSandboxError
from skyrl_minisandbox.images import Image
from skyrl_minisandbox.rewards import TestReport, grade, load_reward
from skyrl_minisandbox.tasks import Task


def run(request: Request) -> int:
    """Grade each prediction in a fresh sandbox; 1 when some could not be graded at all."""
    if "predictions" not in request.own:
        raise InputError("which predictions?", hint="minisandbox grade predictions=FILE.jsonl")
    settings = load_settings(request.overrides)
    reward = load_reward(settings.env.reward.name)
    predictions = read_predictions(Path(request.own["predictions"]))
    chosen = settings.env.tasks.ids
    wanted = [one for one in predictions if not chosen or one["instance_id"] in chosen]
    if not wanted:
        raise InputError(f"{request.own['predictions']} has no predictions for tasks.ids={chosen}")
    bench = Workbench(settings)
    tasks = {task.id: task for task in bench.tasks(list(dict.fromkeys(one["instance_id"] for one in wanted)))}
    images = bench.images(list(tasks.values()))
    reports: list[TestReport | MiniSandboxError | None] = [None] * len(wanted)
    lock = threading.Lock()  # guards `reports`
    with Progress("patches to grade", len(wanted)) as progress:

        def one(number: int) -> None:
            name = wanted[number]["instance_id"]
            progress.say(name, "tests")
            report = graded(bench, tasks[name], images[name], wanted[number]["model_patch"])
            with lock:
                reports[number] = report
            progress.done(name, str(report.outcome) if isinstance(report, TestReport) else "infra_error")

        in_threads([functools.partial(one, number) for number in range(len(wanted))], parallel(bench))
    rows = []
    for prediction, report in zip(wanted, reports, strict=True):
        assert report is not None
        rows.append({"task_id": prediction["instance_id"], **_row(report, reward)})
    if request.json:
        print_json(rows)
    else:
        _print(rows)
    return 1 if any(row["outcome"] == "infra_error" for row in rows) else 0


def graded(
    bench: Workbench, task: Task, image: Image, patch: str, *, run_empty: bool = False
) -> TestReport | MiniSandboxError:
    """The report, or what kept it from being made."""
    try:
        with bench.opener(task, image) as open_sandbox:
            return grade(task, patch, open_sandbox, run_empty=run_empty)
    except MiniSandboxError as error:
        return error


def parallel(bench: Workbench) -> int:
    """Gradings at once: `parallel`, else one for each CPU that we may use, as tests compute."""
    import os

    return bench.settings.parallel or len(os.sched_getaffinity(0))


def read_predictions(path: Path) -> list[dict[str, str]]:
    """JSONL, a JSON list, or a JSON object by instance id. Raises `InputError` that names line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="predictions=FILE.jsonl") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    rows: list[tuple[str, Any]] = []
    try:
        whole = json.loads(text)
        if isinstance(whole, dict) and "instance_id" not in whole:
            whole = [{"instance_id": key, **(value if isinstance(value, dict) else {})} for key, value in whole.items()]
        rows = [(f"entry {n}", row) for n, row in enumerate(whole if isinstance(whole, list) else [whole], 1)]
    except ValueError:
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no predictions", hint='{"instance_id": …, "model_patch": …} a line')
    return [_prediction(path, place, row) for place, row in rows]


def _prediction(path: Path, place: str, row: Any) -> dict[str, str]:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {place}: not an object", hint='{"instance_id": …, "model_patch": …} a line')
    for field in ("instance_id", "model_patch"):
        if field not in row:
            raise InputError(f"{path}, {place}: no field `{field}`", hint='{"instance_id": …, "model_patch": …} a line')
    patch = row["model_patch"]
    if patch is not None and not isinstance(patch, str):
        raise InputError(f"{path}, {place}: `model_patch` is neither a text nor null")
    return {"instance_id": str(row["instance_id"]), "model_patch": patch or ""}


def _row(report: TestReport | MiniSandboxError, reward: Any) -> dict[str, Any]:
    if isinstance(report, MiniSandboxError):
        return {"outcome": "infra_error", "reward": None, "seconds": 0.0, "error": report.message}
    return {
        "outcome": str(report.outcome),
        "reward": reward(report),
        "seconds": report.seconds,
        "error": report.error,
        "tests": dict(report.tests),
    }


def _print(rows: list[dict[str, Any]]) -> None:
    lines = [
        [
            row["task_id"],
            row["outcome"],
            "-" if row["reward"] is None else f"{row['reward']:g}",
            seconds(row["seconds"]),
            row["error"],
        ]
        for row in rows
    ]
    print_table(["task", "outcome", "reward", "grade", "error"], lines, right=[2, 3])
    numbers = [row["reward"] for row in rows if row["reward"] is not None]
    mean = f"{sum(numbers) / len(numbers):.3f}" if numbers else "-"
    print(f"\nmean reward {mean} over {len(numbers)} of {len(rows)}")
