"""The toy set: sixteen modules of a few lines in one repository, each with one defect and a menu of four commands.

For seeing that a training learns, in minutes and without a download: one small image for all tasks, tests of a tenth
of a second, and an issue that lists the commands of which one mends the module. `scaffold=menu` has the model choose
one by its letter, so that a guess is right one time in four.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.tasks.diff import File, diff_trees
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker
from skyrl_minisandbox.tasks.rows import parse_row
from skyrl_minisandbox.tasks.task import Task, Tests

TASK_FILE = Path(__file__).with_name("toy_tasks.yaml")

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""What the commands of a menu are called, in their order."""

TIMEOUT = 20.0
"""Seconds for the tests of one module; they take a tenth."""

_HINT = f"a task looks like those in skyrl_minisandbox/tasks/{TASK_FILE.name}"
_DATE = "2020-01-01T00:00:00 +0000"  # of the one commit, so that equal recipes make equal layers
_LINE = re.compile(rf"([{LETTERS}])\. (\S.*)")


def _edit(text: str) -> tuple[str, str]:
    find, arrow, put = text.partition(" => ")
    if not find or not arrow or "\n" in text or "'" in text:
        raise ValueError(f"`{text}` is no `find => put` on one line without a single quote")
    return find, put


class ToyTask(BaseModel):
    """One row of the file; its head says what the fields are."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^toy-[a-z_]+$")
    issue: str = Field(min_length=1)
    source: str = Field(min_length=1)
    commands: tuple[Annotated[str, AfterValidator(lambda text: _edit(text) and text)], ...] = Field(
        min_length=2, max_length=len(LETTERS)
    )
    right: str = Field(pattern="^[A-Z]$")
    mended: dict[str, str] = Field(min_length=1)
    kept: dict[str, str]

    @model_validator(mode="after")
    def _fits(self) -> ToyTask:
        if self.right not in LETTERS[: len(self.commands)]:
            raise ValueError(f"`right: {self.right}` is none of its {len(self.commands)} commands")
        for text in self.commands:
            find, _ = _edit(text)
            if self.source.count(find) != 1:
                raise ValueError(f"`{find}` stands {self.source.count(find)} times in the source, not once")
        return self

    @property
    def name(self) -> str:
        """Of the module."""
        return self.id.removeprefix("toy-")

    def mended_source(self) -> str:
        """The module after the right command."""
        find, put = _edit(self.commands[LETTERS.index(self.right)])
        return self.source.replace(find, put)

    def test_source(self) -> str:
        """The module of the hidden tests."""
        lines = [
            "import unittest",
            "",
            f"from {self.name} import {self.name}",
            "",
            "",
            "class Test(unittest.TestCase):",
            "    def __str__(self):  # the same name under every Python",
            f'        return f"{{self._testMethodName}} (test_{self.name}.Test)"',
        ]
        for name, line in {**self.mended, **self.kept}.items():
            lines += ["", f"    def test_{name}(self):", f"        {line}"]
        return "\n".join(lines) + "\n"

    def tests(self, names: Mapping[str, str]) -> tuple[str, ...]:
        """Whole names of tests, as the runner tells them."""
        return tuple(f"test_{name} (test_{self.name}.Test)" for name in names)


def family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    """The tasks that come with the package, or those of a YAML file `path`."""
    rows = read_toy_tasks(options.path or TASK_FILE)
    recipe = _recipe(rows, options)
    return {row.id: _Maker(row, recipe) for row in rows}


def read_toy_tasks(file: Path) -> list[ToyTask]:
    """The rows of a file. Raises `TaskError` that names the row and the field."""
    try:
        data: Any = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"task file {file.name} cannot be read: {' '.join(str(error).split())}", hint=_HINT) from error
    if not isinstance(data, list) or not data:
        raise TaskError(f"task file {file.name} is not a list of tasks", hint=_HINT)
    rows = [parse_row(ToyTask, row, f"task {number} of {file.name}", hint=_HINT) for number, row in enumerate(data, 1)]
    ids = [row.id for row in rows]
    for number, task_id in enumerate(ids, 1):
        if task_id in ids[: number - 1]:
            raise TaskError(f"task {number} of {file.name}, field `id`: an earlier task is `{task_id}`", hint=_HINT)
    return rows


def menu(statement: str) -> dict[str, str]:
    """The commands that a problem statement lists, by letter: lines `A. command`, from A on without a gap."""
    found = [match.groups() for line in statement.splitlines() if (match := _LINE.fullmatch(line.strip()))]
    commands: dict[str, str] = {}
    for letter, command in found:
        if letter == LETTERS[len(commands)]:
            commands[letter] = command
    return commands


def _command(row: ToyTask, text: str) -> str:
    find, put = _edit(text)
    mark = next(mark for mark in "/|,#!" if mark not in text)
    find = re.sub(r"([\\.*^$\[\]])", r"\\\1", find)
    put = re.sub(r"([\\&])", r"\\\1", put)
    return f"sed -i 's{mark}{find}{mark}{put}{mark}' {row.name}.py"


def _statement(row: ToyTask) -> str:
    lines = [f"{letter}. {_command(row, text)}" for letter, text in zip(LETTERS, row.commands, strict=False)]
    return "\n".join([row.issue, "", *lines]) + "\n"


def _recipe(rows: list[ToyTask], options: FamilyOptions) -> Recipe:
    """The one recipe: the modules as one commit. The Python is the base's own, unless a version is asked for."""
    base = options.base or "host"
    identity = "-c user.name=minisandbox -c user.email=minisandbox@localhost -c core.logAllRefUpdates=false"
    script = ["python3 -c 'import unittest'"]  # a base without one is told when it is built, not when it is graded
    script += [f"cat > {row.name}.py <<'END'\n{row.source}END" for row in rows]
    script += [
        f"export GIT_AUTHOR_DATE='{_DATE}' GIT_COMMITTER_DATE='{_DATE}'",
        "git -c init.defaultBranch=main init -q --template= . && git add -A",
        f"git {identity} commit -q -m 'Initial commit'",
        "rm -rf .git/COMMIT_EDITMSG .git/index && git read-tree HEAD",
    ]
    return Recipe(
        base=base,
        python=options.python,
        system_packages=("python3",) if base == "debian" and not options.python else (),
        commands=("set -e\n" + "\n".join(script) + "\n",),
    )


class _Maker:
    def __init__(self, row: ToyTask, recipe: Recipe) -> None:
        self.row = row
        self.recipe = recipe

    def __call__(self) -> Task:
        row = self.row
        module, test = f"{row.name}.py", f"test_{row.name}.py"
        before = {module: File(row.source.encode())}
        after = {module: File(row.mended_source().encode()), test: File(row.test_source().encode())}
        return Task(
            id=row.id,
            problem_statement=_statement(row),
            recipe=self.recipe,
            tests=Tests(
                patch=diff_trees(before, after, [test]),
                files=(test,),
                command=f"python3 -m unittest -v test_{row.name}",
                parser="unittest",
                fail_to_pass=row.tests(row.mended),
                pass_to_pass=row.tests(row.kept),
                timeout=TIMEOUT,
            ),
            gold_patch=diff_trees(before, after, [module]),
            source="toy",
        )
