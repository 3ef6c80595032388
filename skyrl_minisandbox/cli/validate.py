"""`minisandbox validate`: four gates that a task must pass before anything is trained on it.

With `out=DIR` every task's row is written as it ends, to `DIR/validation.jsonl`; the same command again goes on
where that one was ended. At the end `DIR/validation.json` has the rows in the order of the tasks, for programs and
for `tasks.validation`, and `DIR/validation.txt` the same for people.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from skyrl_minisandbox.cli.gates import Bench, judge
from skyrl_minisandbox.cli.grade import parallel
from skyrl_minisandbox.cli.live_table import WORDS, LiveTable
from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import format_table, print_json, seconds
from skyrl_minisandbox.cli.rows_file import RowsFile
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench, in_threads
from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.images import Image
from skyrl_minisandbox.tasks import Task
from skyrl_minisandbox.tasks.validation import GATES, Validation

GATES_ONLY = "--gates-only"

_RETRIED = ("build_failed", "not_judged")
"""What says nothing lasting about a task: an index that was down, a node in trouble."""


def run(request: Request) -> int:
    """Judge the tasks; 1 when some gate of one is not passed."""
    settings = load_settings(request.overrides)
    bench = Workbench(settings)
    reports = GATES_ONLY not in request.options
    tasks = bench.tasks()
    out = Path(settings.env.out) if settings.env.out else None
    with _rows_file(out) as file:
        images, failed = bench.built(tasks)
        rows = _earlier(file, tasks, images, bench, reports) if file else {}
        left = [task for task in tasks if task.id not in rows]
        lock = threading.Lock()  # guards `rows`
        with LiveTable("tasks to validate", GATES, len(tasks), earlier=len(rows)) as table:

            def one(task: Task) -> None:
                if task.id in failed:
                    row = _not_built(task, failed[task.id], bench)
                else:
                    row = _judged(task, images[task.id], bench, reports, table)
                if file:
                    file.append(row.model_dump(mode="json"))
                with lock:
                    rows[task.id] = row
                table.done(task.id, row.failure or "valid", row.error)

            in_threads([functools.partial(one, task) for task in left], parallel(bench))
    report = [rows[task.id] for task in tasks]
    if out:
        data = [row.model_dump(mode="json") for row in report]
        (out / "validation.json").write_text(json.dumps(data, indent=1))
        (out / "validation.txt").write_text(text_of(report))
    if request.json:
        print_json([row.model_dump(mode="json") for row in report])
    else:
        print(text_of(report), end="")
        if out:
            print(f"report: {out / 'validation.json'}")
    return 0 if all(row.valid for row in report) else 1


@contextlib.contextmanager
def _rows_file(out: Path | None) -> Iterator[RowsFile | None]:
    file = RowsFile(out / "validation.jsonl") if out else None
    try:
        yield file
    finally:
        if file:
            file.close()


def _earlier(
    file: RowsFile, tasks: Sequence[Task], images: dict[str, Image], bench: Workbench, reports: bool
) -> dict[str, Validation]:
    """Rows of an earlier command that still hold: the same task in the same image, graded the same way."""
    known: dict[str, Validation] = {}
    for data in file.rows:
        with contextlib.suppress(ValueError, KeyError):  # of another version of this package: judged again
            known[data["task_id"]] = Validation.model_validate(data)
    grading = dataclasses.asdict(bench.settings.env.grading)
    return {
        task.id: row
        for task in tasks
        if task.id in images
        and (row := known.get(task.id)) is not None
        and (row.task_digest, row.image_digest) == (task.digest(), images[task.id].digest)
        and row.grading == grading
        and row.failure not in _RETRIED
        and (row.reported or not reports)
    }


def _judged(task: Task, image: Image, bench: Workbench, reports: bool, table: LiveTable) -> Validation:
    grading = bench.settings.env.grading
    try:
        with bench.opener(image) as open_sandbox:
            work = Bench(
                open_sandbox,
                functools.partial(open_sandbox, network="host"),
                grading,
                reports=reports,
                say=functools.partial(table.say, task.id),
                gate=functools.partial(table.gate, task.id),
            )
            return judge(task, image.digest, work)
    except MiniSandboxError as error:  # the image could not be checked out
        return Validation(
            task_id=task.id,
            task_digest=task.digest(),
            image_digest=image.digest,
            grading=dataclasses.asdict(grading),
            failure="not_judged",
            error=error.message,
        )


def _not_built(task: Task, error: MiniSandboxError, bench: Workbench) -> Validation:
    first, _, rest = error.message.partition("\n")
    lines = [*rest.splitlines(), *([f"hint: {error.hint}"] if error.hint else [])]
    return Validation(
        task_id=task.id,
        task_digest=task.digest(),
        grading=dataclasses.asdict(bench.settings.env.grading),
        failure="build_failed",
        error=first,
        log=tuple(line.strip() for line in lines),
    )


def text_of(report: Sequence[Validation]) -> str:
    """The report for people: a table, the tasks that are not valid with the log's lines, and what else was seen."""
    table = [
        [
            row.task_id,
            row.failure or "valid",
            *(WORDS[gate] for gate in row.gates()),
            WORDS[row.modes_agree],
            WORDS[row.wrong_fails],
            _order(row),
            WORDS[None if row.needs_network is None else not row.needs_network],
            str(len(row.flaky)) if row.flaky else "",
            seconds(row.seconds),
        ]
        for row in report
    ]
    gates = [gate.replace("_", " ") for gate in GATES]
    headers = ["task", "verdict", *gates, "modes agree", "wrong fails", "any order", "no network", "flaky", "gold s"]
    parts = [format_table(headers, table, right=[10, 11]), ""]
    for row in report:
        parts += _story(row)
    counts = Counter(row.failure or "valid" for row in report)
    valid = counts.pop("valid", 0)
    others = "".join(f", {number} {word.replace('_', ' ')}" for word, number in sorted(counts.items()))
    parts += [f"{valid} of {len(report)} tasks are valid{others}"]
    return "\n".join(parts) + "\n"


def _order(row: Validation) -> str:
    return WORDS[None if not row.order else not row.order_matters]


def _story(row: Validation) -> list[str]:
    """What a reader must know of one task beside the table; nothing for one that is as it should be."""
    lines = []
    if row.failure:
        lines += textwrap.wrap(row.error, 110, initial_indent="  ", subsequent_indent="    ")
        lines += [f"  | {line}" for line in row.log]
    if row.flaky:
        lines += ["  dropped, as they come out now so, now so:" if row.valid else "  now so, now so:"]
        lines += [f"    {name}" for name in row.flaky]
    if row.already_pass and row.valid:
        lines += ["  pass without the patch too:", *(f"    {name}" for name in row.already_pass)]
    if row.wrong_fails is False:
        lines += ["  a patch that only looks like the solution passes its tests"]
    if row.differences:
        lines += ["  the grading modes differ:", *(f"    {difference}" for difference in row.differences)]
    if row.order_matters:
        lines += [f"  fail when {row.order}:", *(f"    {name}" for name in row.order_matters)]
    if row.needs_network:
        lines += ["  gold passes with a network, which grading never has"]
    return [f"{row.task_id}: {row.failure or 'valid'}", *lines, ""] if lines else []
