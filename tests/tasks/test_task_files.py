"""The task files of `pypi` themselves: facts, and nothing that belongs to somebody else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from skyrl_minisandbox.tasks.pypi import TASK_FILES, PypiTask, read_task_file

FILES = sorted(TASK_FILES.glob("*"))
PYTHONS = ("3.11", "3.12", "3.13")


def rows() -> list[PypiTask]:
    return [read_task_file(file) for file in FILES]


def test_the_set_is_at_least_twelve_tasks_over_eight_projects() -> None:
    assert len(FILES) >= 12
    assert len({row.package for row in rows()}) >= 8


def test_all_tasks_hold_on_every_python_that_runs_minisandbox() -> None:
    assert {row.pythons for row in rows()} == {PYTHONS}


def test_all_tasks_share_one_environment() -> None:
    assert len({(row.pins, row.index_cutoff) for row in rows()}) == 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_task_file_is_named_by_its_id_and_its_id_by_the_release_with_the_bug(file: Path) -> None:
    row = read_task_file(file)
    assert file.name == f"{row.id}.yaml"
    assert row.id == f"{row.package}-{row.base.version}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_task_file_holds_no_patch_and_no_file_content(file: Path) -> None:
    text = file.read_text()
    assert not re.search(r"^(diff --git|@@ |--- a/|\+\+\+ b/|Copyright|\s*def test_)", text, re.MULTILINE)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_no_task_has_its_own_project_among_its_pins(row: PypiTask) -> None:
    """A later release in the environment would hold the solution."""
    names = {pin.partition("==")[0].lower() for pin in row.pins}
    assert row.package.lower() not in names


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_tests_are_named_once_and_lie_in_the_files_that_run(row: PypiTask) -> None:
    names = [*row.fail_to_pass, *row.pass_to_pass]
    assert len(names) == len(set(names))
    run = set(row.command.split())
    assert {name.partition("::")[0] for name in names} <= run
    assert not set(row.source_files) & set(row.test_files)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_an_issue_does_not_name_the_files_of_the_fix_or_the_hidden_tests(row: PypiTask) -> None:
    statement = row.problem_statement
    for path in row.source_files:
        if "/" in path:
            assert path not in statement
    for name in (*row.fail_to_pass, *row.test_files):
        assert re.split(r"::|/", name)[-1].partition("[")[0] not in statement


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_an_issue_has_a_title_and_a_text(row: PypiTask) -> None:
    title, blank, *body = row.problem_statement.split("\n")
    assert title and not blank and body
    assert 200 <= len(row.problem_statement) <= 3000
