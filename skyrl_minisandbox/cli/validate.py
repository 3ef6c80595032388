"""`minisandbox validate`: four gates that a task must pass before anything is trained on it."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.grade import graded, parallel
from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import Progress, print_json, print_table, seconds
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench, in_threads
from skyrl_minisandbox.errors import MiniSandboxError
from skyrl_minisandbox.images import Image
from skyrl_minisandbox.rewards import TestReport
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks import Task

GATES = ("empty_fails", "gold_passes", "repeats", "no_future")

# Commits of the object database that HEAD does not lead to, whatever refers to them (refs, reflogs, nothing);
# then remotes and tags.
FUTURE = r"""
command -v git >/dev/null || { test ! -e .git && exit 0; echo 'no git to look with'; exit 3; }
test -e .git || exit 0
git -c safe.directory='*' cat-file --batch-all-objects --batch-check='%(objecttype) %(objectname)' |
    sed -n 's/^commit //p' | sort >/tmp/all || exit 3
git -c safe.directory='*' rev-list HEAD | sort >/tmp/past || exit 3
comm -23 /tmp/all /tmp/past
git -c safe.directory='*' remote
git -c safe.directory='*' tag
"""


def run(request: Request) -> int:
    """Judge the tasks; 1 when some gate is not passed."""
    settings = load_settings(request.overrides)
    bench = Workbench(settings)
    tasks = bench.tasks()
    images = bench.images(tasks)
    rows: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()  # guards `rows`
    with Progress("tasks to validate", len(tasks)) as progress:

        def one(task: Task) -> None:
            row = validate(bench, task, images[task.id], functools.partial(progress.say, task.id))
            with lock:
                rows[task.id] = row
            progress.done(task.id, "valid" if row["valid"] else row["error"])

        in_threads([functools.partial(one, task) for task in tasks], parallel(bench))
    report = [rows[task.id] for task in tasks]
    if settings.env.out:
        path = Path(settings.env.out)
        path.mkdir(parents=True, exist_ok=True)
        (path / "validation.json").write_text(json.dumps(report, indent=1))
    if request.json:
        print_json(report)
    else:
        _print(report)
        if settings.env.out:
            print(f"report: {Path(settings.env.out) / 'validation.json'}")
    return 0 if all(row["valid"] for row in report) else 1


def validate(bench: Workbench, task: Task, image: Image, say: Callable[[str], None]) -> dict[str, Any]:
    """One task's row: each gate true or false, or null where it could not be tried, and why."""
    row: dict[str, Any] = {
        "task_id": task.id,
        "valid": False,
        **dict.fromkeys(GATES),
        "seconds": 0.0,
        "error": "",
    }
    try:
        say("tests without a patch")
        empty = _report(graded(bench, task, image, "", run_empty=True))
        # It fails for the right reason only if the tests really ran: every fail-to-pass test failing because
        # nothing could be collected is what many good tasks look like, a log without any result is not.
        row["empty_fails"] = not empty.resolved and not any(empty.fail_to_pass.values())
        say("tests with the gold patch")
        gold = _report(graded(bench, task, image, task.gold_patch))
        row["gold_passes"] = gold.resolved
        row["seconds"] = gold.seconds
        say("the same again")
        again = _report(graded(bench, task, image, task.gold_patch))
        differing = sorted(n for n in {*gold.tests, *again.tests} if gold.tests.get(n) != again.tests.get(n))
        row["repeats"] = not differing and gold.outcome == again.outcome
        say("later commits")
        with bench.opener(task, image) as open_sandbox, open_sandbox() as sandbox:
            future = reachable_future(sandbox, task.recipe.workdir)
        row["no_future"] = not future
        row["error"] = _why(row, empty, gold, differing, future)
        row["valid"] = all(row[gate] for gate in GATES)
    except MiniSandboxError as error:
        row["error"] = error.message
    return row


def reachable_future(sandbox: Sandbox, workdir: str) -> str:
    """The first commit, remote or tag that leads beyond HEAD; empty when there is none."""
    result = sandbox.run(["bash", "-c", FUTURE], cwd=workdir, timeout=60)
    lines = result.stdout.decode("utf-8", "replace").split()
    if result.exit_code != 0:
        return f"could not look: {result.output.strip()[-200:]}"
    return lines[0] if lines else ""


def _report(report: TestReport | MiniSandboxError) -> TestReport:
    if isinstance(report, MiniSandboxError):
        raise report
    return report


def _why(row: dict[str, Any], empty: TestReport, gold: TestReport, differing: list[str], future: str) -> str:
    if not row["empty_fails"]:
        passing = [name for name, good in empty.fail_to_pass.items() if good]
        return f"passes without a patch: {passing[0] if passing else empty.outcome}"
    if not row["gold_passes"]:
        return f"the gold patch is {gold.outcome}: {gold.error}"
    if not row["repeats"]:
        return f"another verdict the second time: {', '.join(differing[:3]) or 'outcome'}"
    return "" if row["no_future"] else f"beyond HEAD: {future}"


def _print(report: list[dict[str, Any]]) -> None:
    words = {True: "yes", False: "NO", None: "-"}
    rows = [
        [row["task_id"], *(words[row[gate]] for gate in GATES), seconds(row["seconds"]), row["error"]] for row in report
    ]
    print_table(["task", *(gate.replace("_", " ") for gate in GATES), "seconds", "error"], rows, right=[5])
    print(f"\n{sum(row['valid'] for row in report)} of {len(report)} tasks are valid")
