"""Rows of SWE-bench's shape (schema of its releases up to 4.1: Verified, Lite, full) -> Tasks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from skyrl_minisandbox.errors import InputError, TaskError
from skyrl_minisandbox.images.recipe import GitCommit, Recipe
from skyrl_minisandbox.tasks.diff import FILE, changed_files
from skyrl_minisandbox.tasks.environments import environment
from skyrl_minisandbox.tasks.family import FamilyOptions, TaskMaker
from skyrl_minisandbox.tasks.rows import names_of, parse_row
from skyrl_minisandbox.tasks.task import Task, Tests

TIMEOUT = 1800.0
"""Seconds for a test command: SWE-bench's own default."""

INDEX_CUTOFF = "2024-10-20"
"""By then what the images' freezes leave open was resolved."""

_HINT = "rows have the columns of princeton-nlp/SWE-bench_Verified"
_PARSERS = {
    "astropy/astropy": "swebench-pytest-v2",
    "django/django": "swebench-django",
    "matplotlib/matplotlib": "swebench-matplotlib",
    "mwaskom/seaborn": "swebench-seaborn",
    "pallets/flask": "swebench-pytest",
    "psf/requests": "swebench-pytest-options",
    "pydata/xarray": "swebench-pytest",
    "pydicom/pydicom": "swebench-pytest-options",
    "pylint-dev/pylint": "swebench-pytest-options",
    "pytest-dev/pytest": "swebench-pytest",
    "scikit-learn/scikit-learn": "swebench-pytest-v2",
    "sphinx-doc/sphinx": "swebench-pytest-v2",
    "sympy/sympy": "swebench-sympy",
}
_RUNNERS = {"django/django": "django", "sympy/sympy": "sympy"}
_NO_TESTS = (".json", ".png", "csv", ".txt", ".md", ".jpg", ".jpeg", ".pkl", ".yml", ".yaml", ".toml")


def _text(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a text that is not empty")
    return value


_Text = Annotated[str, BeforeValidator(_text)]
_Names = Annotated[tuple[str, ...], BeforeValidator(names_of)]


class SweBenchRow(BaseModel):
    """The columns that matter; the others of a row are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    instance_id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    repo: str = Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    base_commit: str = Field(pattern=r"^[0-9a-f]{40}$")
    version: _Text
    problem_statement: _Text
    patch: _Text
    test_patch: _Text
    fail_to_pass: _Names = Field(alias="FAIL_TO_PASS", min_length=1)
    pass_to_pass: _Names = Field(alias="PASS_TO_PASS")


def family(options: FamilyOptions) -> Mapping[str, TaskMaker]:
    """The rows of the file `path` (JSONL, JSON or parquet)."""
    if options.path is None:
        raise InputError(
            "tasks=swebench needs a file with rows", hint="tasks.path=FILE.jsonl, one row a line; or a .parquet file"
        )
    makers: dict[str, TaskMaker] = {}
    for number, data in enumerate(read_rows(options.path), 1):
        where = f"row {number} of {options.path.name}"
        if isinstance(data, Mapping) and isinstance(data.get("instance_id"), str):
            where += f" (`{data['instance_id']}`)"
        row = parse_row(SweBenchRow, data, where, hint=_HINT)
        if row.instance_id in makers:
            raise TaskError(f"{where}, field `instance_id`: an earlier row has it too", hint=_HINT)
        makers[row.instance_id] = _Maker(row, where, options)
    if not makers:
        raise InputError(f"`{options.path}` has no rows", hint=_HINT)
    return makers


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a `.jsonl`, `.json` (a list) or `.parquet` file, unchecked. Raises `InputError`, `TaskError`."""
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
            return
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task rows cannot be read: {error}", hint="check tasks.path=FILE") from error
    if path.suffix == ".json":
        rows = _json(text, f"`{path.name}`")
        if not isinstance(rows, list):
            raise InputError(f"`{path.name}` must hold a list of rows", hint="or write one row a line as .jsonl")
        yield from rows
        return
    numbered = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    for number, line in numbered:
        yield _json(line, f"line {number} of {path.name}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TaskError(f"{where} is not JSON: {error}", hint=_HINT) from None


def _parquet(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise InputError(
            f"reading `{path.name}` needs pyarrow, which is not installed",
            hint="pip install pyarrow; or convert the file to .jsonl",
        ) from None
    try:
        yield from parquet.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's own errors derive from it
        raise InputError(f"`{path.name}` is no readable parquet file: {error}", hint="check tasks.path") from None


class _Maker:
    def __init__(self, row: SweBenchRow, where: str, options: FamilyOptions) -> None:
        self.row = row
        self.where = where
        self.options = options

    def __call__(self) -> Task:
        row = self.row
        env = environment(row.instance_id, row.repo, row.version)
        if env is None:
            raise TaskError(
                f"{self.where}, field `version`: how to build {row.repo} {row.version} is not known",
                hint="only repositories and versions of SWE-bench Verified are; leave this row out with tasks.ids",
            )
        files = changed_files(row.test_patch)
        if not files:
            raise TaskError(f"{self.where}, field `test_patch`: it changes no file", hint=_HINT)
        return Task(
            id=row.instance_id,
            problem_statement=row.problem_statement,
            recipe=Recipe(
                base=self.options.base or "debian",
                python=self.options.python or env.python,
                packages=env.packages,
                build_packages=env.build_packages,
                system_packages=env.system_packages,
                index_cutoff=INDEX_CUTOFF,
                repository=GitCommit(
                    repo=row.repo, commit=row.base_commit, clone=find_clone(self.options.repos, row.repo)
                ),
                commands=env.commands,
                env=env.env,
            ),
            tests=Tests(
                patch=row.test_patch,
                files=files,
                command=f"{env.test_command} {' '.join(test_targets(row.repo, row.test_patch))}".strip(),
                parser=_PARSERS.get(row.repo, "swebench-pytest"),
                runner=_RUNNERS.get(row.repo, "pytest"),
                fail_to_pass=row.fail_to_pass,
                pass_to_pass=row.pass_to_pass,
                timeout=TIMEOUT,
            ),
            gold_patch=row.patch,
            source="swebench",
        )


def find_clone(repos: Path | None, repo: str) -> str:
    """The local clone of `owner/name` below `repos`: `owner__name`, `owner/name` or `name`, bare (`.git`) or not.

    Where there is none, the first of these, so that the build names what it expected; "" without `repos`.
    """
    if repos is None:
        return ""
    owner, _, name = repo.partition("/")
    stems = [f"{owner}__{name}", f"{owner}/{name}", name]
    for stem in stems:
        for candidate in (repos / stem, repos / f"{stem}.git"):
            if candidate.is_dir():
                return str(candidate.absolute())
    return str((repos / stems[0]).absolute())


def test_targets(repo: str, test_patch: str) -> tuple[str, ...]:
    """What SWE-bench appends to the test command: the patch's files that may be tests; modules for Django."""
    targets = [match["new"] for match in FILE.finditer(test_patch)]
    targets = [path for path in targets if not path.endswith(_NO_TESTS)]
    if repo == "django/django":
        targets = [path.removesuffix(".py").removeprefix("tests/").replace("/", ".") for path in targets]
    return tuple(targets)


test_targets.__test__ = False  # type: ignore[attr-defined]  # no test, whatever pytest makes of the name
