"""Real bugs of small PyPI projects: a released version, the tests of the next release, its fix as gold patch.

A task file holds facts only. Sources come from the user's package index, and both patches are made here by
comparing the two source distributions, so nothing of the projects is carried along.
"""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from skyrl_minisandbox.errors import InputError, MiniSandboxError, TaskError
from skyrl_minisandbox.images.recipe import Recipe, Sdist
from skyrl_minisandbox.tasks.diff import File, diff_trees, read_sdist
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker
from skyrl_minisandbox.tasks.rows import parse_row
from skyrl_minisandbox.tasks.task import Task, Tests

TASK_FILES = Path(__file__).with_name("pypi_tasks")
WORKDIR = "/testbed"

_HINT = "a task file looks like those in skyrl_minisandbox/tasks/pypi_tasks"


def _pinned(pins: tuple[str, ...]) -> tuple[str, ...]:
    for pin in pins:
        if "==" not in pin:
            raise ValueError(f"`{pin}` is no exact pin; write `name==version`")
    return pins


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Release(_Frozen):
    """One source distribution. sha256: hex; the download is refused when it has another."""

    version: str
    filename: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class PypiTask(_Frozen):
    """One task file.

    base: the release with the bug. fix: the release that mends it and brings the tests.
    source_files: what the gold patch changes. test_files: what the hidden tests change or add.
    python_path: directory of the sdist, relative to it, that makes the project importable ("" its top).
    runner: names the log parser. command: how the tests run, in the top directory of the sdist.
    timeout: seconds for the command.
    pythons: versions on which `fail_to_pass` and `pass_to_pass` were measured.
    pins: all packages of the environment, exactly; never the project itself: later ones hold the fix.
    index_cutoff: ISO date by which all pins were released.
    """

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    package: str
    base: Release
    fix: Release
    source_files: tuple[str, ...] = Field(min_length=1)
    test_files: tuple[str, ...] = Field(min_length=1)
    python_path: str = ""
    runner: Literal["pytest"]
    command: str
    timeout: float = Field(gt=0)
    pythons: tuple[str, ...] = Field(min_length=1)
    index_cutoff: str
    pins: Annotated[tuple[str, ...], AfterValidator(_pinned)]
    problem_statement: str = Field(min_length=1)
    fail_to_pass: tuple[str, ...] = Field(min_length=1)
    pass_to_pass: tuple[str, ...]


def family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    """The tasks that come with the package, or those of a directory `path` of task files (`*.yaml`)."""
    folder = options.path or TASK_FILES
    files = [folder] if folder.is_file() else sorted(folder.glob("*.yaml"))
    if not files:
        raise InputError(f"`{folder}` has no task files (*.yaml)", hint=_HINT)
    makers: dict[str, TaskMaker] = {}
    for file in files:
        row = read_task_file(file)
        if row.id in makers:
            raise TaskError(f"task file {file.name}, field `id`: another file has `{row.id}` too", hint=_HINT)
        makers[row.id] = _Maker(row, options)
    return makers


def read_task_file(file: Path) -> PypiTask:
    """The facts of one task. Raises `TaskError` naming the file and the field."""
    where = f"task file {file.name}"
    try:
        data = yaml.load(file.read_text("utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TaskError(f"{where} cannot be read: {' '.join(str(error).split())}", hint=_HINT) from error
    return parse_row(PypiTask, data, where, hint=_HINT)


class _Maker:
    def __init__(self, row: PypiTask, options: FamilyOptions) -> None:
        self.row = row
        self.options = options

    def __call__(self) -> Task:
        row = self.row
        python = self._python()
        before, after = self._tree(row.base), self._tree(row.fix)
        top = f"{WORKDIR}/{row.python_path}".rstrip("/")
        return Task(
            id=row.id,
            problem_statement=row.problem_statement,
            recipe=Recipe(
                base=self.options.base or "host",
                python=python,
                packages=row.pins,
                index_cutoff=row.index_cutoff,
                repository=Sdist(
                    package=row.package,
                    version=row.base.version,
                    filename=row.base.filename,
                    sha256=row.base.sha256,
                ),
                env={"PYTHONPATH": top},
                workdir=WORKDIR,
            ),
            tests=Tests(
                patch=self._patch("test_files", row.test_files, before, after),
                files=row.test_files,
                command=row.command,
                parser=row.runner,
                fail_to_pass=row.fail_to_pass,
                pass_to_pass=row.pass_to_pass,
                timeout=row.timeout,
            ),
            gold_patch=self._patch("source_files", row.source_files, before, after),
            source="pypi",
        )

    def _python(self) -> str:
        wanted = self.options.python or f"{sys.version_info.major}.{sys.version_info.minor}"
        if wanted not in self.row.pythons:
            raise InputError(
                f"task `{self.row.id}` was measured on Python {', '.join(self.row.pythons)}, not on {wanted}",
                hint=f"`tasks.python={self.row.pythons[-1]}`, with `images.pythons=[DIR]` to find one",
            )
        return wanted

    def _tree(self, release: Release) -> dict[str, File]:
        try:
            path = self.options.sources().sdist(
                self.row.package, release.version, release.sha256, release.filename
            )
        except MiniSandboxError as error:
            raise type(error)(f"task `{self.row.id}`: {error.message}", hint=error.hint) from error
        try:
            return read_sdist(path)
        except (OSError, ValueError, tarfile.TarError) as error:
            raise TaskError(f"task `{self.row.id}`: {path.name} cannot be read: {error}") from error

    def _patch(
        self, field: str, paths: tuple[str, ...], before: Mapping[str, File], after: Mapping[str, File]
    ) -> str:
        where = f"task `{self.row.id}`, field `{field}`"
        for path in paths:
            if before.get(path) == after.get(path):
                state = "is the same in" if path in before else "is in neither of"
                both = f"{self.row.base.filename} and {self.row.fix.filename}"
                raise TaskError(f"{where}: `{path}` {state} {both}")
        try:
            return diff_trees(before, after, paths)
        except ValueError as error:
            raise TaskError(f"{where}: {error}") from error


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is a tenth of the time
