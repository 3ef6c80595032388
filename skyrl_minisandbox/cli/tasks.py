"""`minisandbox tasks list|show|export`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import print_json, print_table
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.tasks import Task
from skyrl_minisandbox.tasks.export import SPLITS, Filters, repository, row, split, write
from skyrl_minisandbox.tasks.load import task_ids

KEYS = {
    "list": (),
    "show": ("task",),
    "export": ("validation", "val_fraction", "split", "match", "min_tests", "max_tests", "max_characters"),
}
"""Which keys of the verb each word knows."""


def run(request: Request) -> int:
    """Print the tasks of the configuration or one of them whole, or write those that passed validation as a dataset."""
    for key in request.own:
        if key not in KEYS[request.word]:
            raise InputError(
                f"minisandbox tasks {request.word} has no key `{key}`",
                hint=f"its own keys: {', '.join(KEYS[request.word]) or 'none'}; `{key}` is of "
                + " and ".join(f"`tasks {word}`" for word in KEYS if key in KEYS[word]),
            )
    return {"list": _list, "show": _show, "export": _export}[request.word](request)


def _list(request: Request) -> int:
    tasks = Workbench(load_settings(request.overrides)).tasks()
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


def _show(request: Request) -> int:
    bench = Workbench(load_settings(request.overrides))
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


def _export(request: Request) -> int:
    """Write `train.parquet` and `validation.parquet` below `out`, and print what they hold."""
    own = request.own
    numbers = {key: _number(own, key) for key in ("min_tests", "max_tests", "max_characters")}
    filters = Filters(match=own.get("match", ""), **numbers)
    fraction = _fraction(own.get("val_fraction", "0.1"))
    by = own.get("split", SPLITS[0])
    if by not in SPLITS:
        raise InputError(f"`split={by}` must be {' or '.join(f'`{one}`' for one in SPLITS)}")
    bench = _validated(request)
    settings = bench.settings
    if not settings.env.out:
        raise InputError("where to?", hint="out=DIR gets train.parquet and validation.parquet")
    tasks, left_out = _chosen(bench, filters)
    parts = split(tasks, fraction=fraction, seed=settings.seed, by=by)
    out = Path(settings.env.out)
    files = [(out / f"{name}.parquet", part) for name, part in zip(("train", "validation"), parts, strict=True) if part]
    write((path, [row(task, settings.env.tasks.name) for task in part]) for path, part in files)
    if request.json:
        print_json(
            {
                "files": {path.stem: str(path) for path, _ in files},
                "tasks": {path.stem: [task.id for task in part] for path, part in files},
                "left_out": left_out,
                "split": by,
                "seed": settings.seed,
            }
        )
        return 0
    table = [[str(path), str(len(part)), str(len({repository(task) for task in part}))] for path, part in files]
    print_table(["file", "tasks", "repositories"], table, right=[1, 2])
    for words, count in left_out.items():
        print(f"left out: {count} {words}")
    keys = {"train": "data.train_data", "validation": "data.val_data"}
    print("in SkyRL: " + " ".join(f"\"{keys[path.stem]}=['{path}']\"" for path, _ in files))
    return 0


def _validated(request: Request) -> Workbench:
    """What works on the tasks that passed; on all only where that was said. Raises `InputError`."""
    settings = load_settings(request.overrides)
    tasks = settings.env.tasks
    given = request.own.get("validation", "")
    if given and tasks.validation:
        raise InputError("`validation` and `tasks.validation` are the same; one of them is enough")
    validation = str(Path(given).expanduser().absolute()) if given not in ("", "none") else tasks.validation
    if not validation and given != "none":
        raise InputError(
            "nothing says that these tasks judge, and a model is not trained on what does not",
            hint="minisandbox validate tasks=… out=DIR, then validation=DIR/validation.json; or validation=none",
        )
    tasks = dataclasses.replace(tasks, validation=validation)
    return Workbench(dataclasses.replace(settings, env=dataclasses.replace(settings.env, tasks=tasks)))


def _chosen(bench: Workbench, filters: Filters) -> tuple[list[Task], dict[str, int]]:
    """The tasks to write, and how many are left out, by why. Raises `InputError` when none is left."""
    config = bench.settings.env.tasks
    loaded = bench.tasks()
    every = len(set(config.ids) or task_ids(config.name, path=config.path or None))
    counts: Counter[str] = Counter()
    if every > len(loaded):
        counts["that have not passed validation"] = every - len(loaded)
    tasks = []
    for task in loaded:
        why = filters.against(task)
        if why:
            counts[why] += 1
        else:
            tasks.append(task)
    if not tasks:
        said = ", ".join(f"{count} {words}" for words, count in counts.items())
        raise InputError(f"no task is left: {said}", hint="wider filters; `minisandbox tasks list` prints the tasks")
    return tasks, dict(counts)


def _number(own: Mapping[str, str], key: str) -> int | None:
    text = own.get(key)
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"`{key}={text}` must be a whole number, 0 or above")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"`val_fraction={text}` must be a number from 0 to 1")
    return value


def _first_line(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= 72 else line[:71] + "…"
