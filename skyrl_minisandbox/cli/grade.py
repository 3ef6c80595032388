"""`minisandbox grade predictions=FILE`: run the tests on finished patches.

With `out=DIR` every report is written as it is made, to `DIR/grades/ID.json`, with a row in `DIR/grades.jsonl`; the
same command again goes on where that one was ended. ID is the task's id, with a number where a task has several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import Progress, print_json, print_table, seconds
from skyrl_minisandbox.cli.rows_file import RowsFile
from skyrl_minisandbox.cli.run_directory import write_json
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench, build_failure, in_threads
from skyrl_minisandbox.errors import InputError, MachineError, MiniSandboxError
from skyrl_minisandbox.images import Image
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import Reward, TestReport, grade, load_reward
from skyrl_minisandbox.tasks import Task
from skyrl_minisandbox.tasks.load import task_ids

_SHOWN = 10  # names of missing predictions on one line


def run(request: Request) -> int:
    """Grade each prediction in a fresh sandbox; 1 when one could not be graded or, of `tasks.ids`, is missing."""
    if "predictions" not in request.own:
        raise InputError("which predictions?", hint="minisandbox grade predictions=FILE.jsonl")
    settings = load_settings(request.overrides)
    chosen = settings.env.tasks
    reward = load_reward(settings.env.reward.name, **settings.env.reward.options)
    predictions = read_predictions(Path(request.own["predictions"]))
    wanted = [one for one in predictions if not chosen.ids or one.task_id in chosen.ids]
    if not wanted:
        raise InputError(f"{request.own['predictions']} has no predictions for tasks.ids={chosen.ids}")
    bench = Workbench(settings)
    tasks = {task.id: task for task in bench.tasks(list(dict.fromkeys(one.task_id for one in wanted)))}
    asked = chosen.ids or task_ids(chosen.name, path=chosen.path or None, validation=chosen.validation or None)
    missing = [task_id for task_id in asked if task_id not in tasks]
    out = Path(settings.env.out) if settings.env.out else None
    with _rows_file(out) as file:
        images, failed = bench.built(list(tasks.values()))
        if not images:
            raise build_failure(list(failed.items()), len(tasks))
        rows = _earlier(file, wanted, tasks, images, bench, reward) if file else {}
        lock = threading.Lock()  # guards `rows`
        with Progress("patches to grade", len(wanted) - len(rows)) as progress:

            def one(prediction: Prediction) -> None:
                progress.say(prediction.id, "tests")
                task = tasks[prediction.task_id]
                image = images.get(task.id)
                report = graded(bench, task, image, prediction.patch, reward) if image else failed[task.id]
                row = _row(prediction, report, reward)
                if file:
                    _keep(file, row, report, _key(prediction, task, image, bench, reward))
                with lock:
                    rows[prediction.id] = row
                progress.done(prediction.id, row["outcome"])

            left = [prediction for prediction in wanted if prediction.id not in rows]
            in_threads([functools.partial(one, prediction) for prediction in left], parallel(bench))
    table = [rows[prediction.id] for prediction in wanted]
    if request.json:
        print_json(table)
    else:
        _print(table, missing, len(asked))
        if out:
            print(f"grades: {out / 'grades'}")
    ours = any(row["outcome"] == Outcome.INFRA_ERROR for row in table)
    return 1 if ours or (chosen.ids and missing) else 0


@contextlib.contextmanager
def _rows_file(out: Path | None) -> Iterator[RowsFile | None]:
    if out is None:
        yield None
        return
    file = RowsFile(out / "grades.jsonl")
    try:
        yield file
    finally:
        file.close()


def graded(bench: Workbench, task: Task, image: Image, patch: str, reward: Reward) -> TestReport | MiniSandboxError:
    """The report, or what kept it from being made. A sandbox that died under the patch is tried once more."""
    try:
        with bench.opener(image) as open_sandbox:
            once = functools.partial(
                grade, task, patch, open_sandbox, grading=bench.settings.env.grading, needs=reward.needs
            )
            report = once()
            return once() if report.sandbox_died else report
    except MiniSandboxError as error:
        return error


def parallel(bench: Workbench) -> int:
    """Gradings at once: `parallel`, else one for each CPU that we may use, as tests compute."""
    return bench.settings.parallel or len(os.sched_getaffinity(0))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One patch to grade. id: that of its task, `TASK+2` for the second patch of the same task, and so on."""

    id: str
    task_id: str
    patch: str


def _key(prediction: Prediction, task: Task, image: Image | None, bench: Workbench, reward: Reward) -> dict[str, Any]:
    """All that a report depends on."""
    return {
        "task_digest": task.digest(),
        "image_digest": image.digest if image else "",
        "patch_digest": hashlib.sha256(prediction.patch.encode("utf-8", "surrogatepass")).hexdigest(),
        "grading": dataclasses.asdict(bench.settings.env.grading),
        "needs": sorted(reward.needs),
    }


def _keep(file: RowsFile, row: dict[str, Any], report: TestReport | MiniSandboxError, key: dict[str, Any]) -> None:
    """Write one grade. Raises `MachineError`."""
    whole = report.to_json() if isinstance(report, TestReport) else None
    short = {name: value for name, value in row.items() if name != "tests"}
    folder = file.path.parent / "grades"
    try:
        write_json(folder / f"{row['rollout_id']}.json", {**short, "report": whole})
    except OSError as error:
        raise MachineError(
            f"the grade of task {row['task_id']} cannot be written to {folder}: {error.strerror}",
            hint=f"df -h {folder.parent}",
        ) from error
    file.append({**short, "key": key})


def _earlier(
    file: RowsFile,
    wanted: Sequence[Prediction],
    tasks: dict[str, Task],
    images: dict[str, Image],
    bench: Workbench,
    reward: Reward,
) -> dict[str, dict[str, Any]]:
    """Rows of an earlier command that still hold, with the reward that is asked for now."""
    known = {row.get("rollout_id"): row for row in file.rows}
    rows = {}
    for one in wanted:
        row, image = known.get(one.id), images.get(one.task_id)
        if row is None or image is None or row.get("outcome") == Outcome.INFRA_ERROR:
            continue
        if row.get("key") != _key(one, tasks[one.task_id], image, bench, reward):
            continue
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # lost, or of another version
            whole = json.loads((file.path.parent / "grades" / f"{one.id}.json").read_text("utf-8"))
            rows[one.id] = _row(one, TestReport.from_json(whole["report"]), reward)
    return rows


def read_predictions(path: Path) -> list[Prediction]:
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
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from None
    if not rows:
        raise InputError(f"{path} holds no predictions", hint='{"instance_id": …, "model_patch": …} a line')
    seen: Counter[str] = Counter()
    return [_prediction(path, place, row, seen) for place, row in rows]


def _prediction(path: Path, place: str, row: Any, seen: Counter[str]) -> Prediction:
    if not isinstance(row, dict):
        raise InputError(f"{path}, {place}: not an object", hint='{"instance_id": …, "model_patch": …} a line')
    for field in ("instance_id", "model_patch"):
        if field not in row:
            raise InputError(f"{path}, {place}: no field `{field}`", hint='{"instance_id": …, "model_patch": …} a line')
    patch = row["model_patch"]
    if patch is not None and not isinstance(patch, str):
        raise InputError(f"{path}, {place}: `model_patch` is neither a text nor null")
    task_id = str(row["instance_id"])
    seen[task_id] += 1
    number = f"+{seen[task_id]}" if seen[task_id] > 1 else ""  # no task's id has a `+`
    return Prediction(task_id + number, task_id, patch or "")


def _row(prediction: Prediction, report: TestReport | MiniSandboxError, reward: Reward) -> dict[str, Any]:
    known: dict[str, Any] = {"rollout_id": prediction.id, "task_id": prediction.task_id}
    if isinstance(report, MiniSandboxError):
        return {**known, "outcome": "infra_error", "reward": None, "seconds": 0.0, "error": report.message}
    return {
        **known,
        "outcome": str(report.outcome),
        "reward": reward(report),
        "seconds": report.seconds,
        "error": report.error,
        "tests": dict(report.tests),
    }


def _print(rows: Sequence[dict[str, Any]], missing: Sequence[str], asked: int) -> None:
    lines = [
        [
            row["rollout_id"],
            row["outcome"],
            "-" if row["reward"] is None else f"{row['reward']:g}",
            seconds(row["seconds"]),
            row["error"],
        ]
        for row in rows
    ]
    print_table(["task", "outcome", "reward", "grade s", "error"], lines, right=[2, 3])
    numbers = [row["reward"] for row in rows if row["reward"] is not None]
    mean = f"{sum(numbers) / len(numbers):.3f}" if numbers else "-"
    print(f"\nmean reward {mean} over {len(numbers)} of {len(rows)}")
    resolved = sum(row["outcome"] == Outcome.RESOLVED for row in rows)
    print(f"resolved {_share(resolved, len(numbers))} of the graded patches")
    if missing:
        solved = len({row["task_id"] for row in rows if row["outcome"] == Outcome.RESOLVED})
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        print(f"resolved {_share(solved, asked)} of all tasks; no prediction for {len(missing)} of them:")
        print(f"  {', '.join(missing[:_SHOWN])}{more}")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")
