"""`minisandbox tasks list|show`."""

from __future__ import annotations

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import print_json, print_table
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench


def run(request: Request) -> int:
    """Print the tasks of the configuration, or one of them whole."""
    bench = Workbench(load_settings(request.overrides))
    if request.word == "list":
        tasks = bench.tasks()
        if request.json:
            print_json([task.model_dump(mode="json") for task in tasks])
            return 0
        rows = [
            [
                task.id,
                task.recipe.base,
                task.recipe.python or "",
                str(len(task.tests.fail_to_pass)),
                str(len(task.tests.pass_to_pass)),
                _first_line(task.problem_statement),
            ]
            for task in tasks
        ]
        print_table(["task", "base", "python", "fail", "pass", "issue"], rows, right=[3, 4])
        return 0
    task = bench.one_task(request.own.get("task"))
    if request.json:
        print_json(task.model_dump(mode="json"))
        return 0
    print(f"{task.id} ({task.source or bench.settings.env.tasks.name})\n")
    print(task.problem_statement.rstrip())
    print(
        f"\nimage    {task.recipe.base}, Python {task.recipe.python or 'of the base'},"
        f" recipe {task.recipe.digest()[:12]}"
    )
    print(f"tests    {task.tests.command}")
    for name in task.tests.fail_to_pass:
        print(f"must be mended   {name}")
    print(f"must still pass  {len(task.tests.pass_to_pass)} tests")
    return 0


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 72 else line[:71] + "…"
