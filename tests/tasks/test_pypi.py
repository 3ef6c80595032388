"""Task files become Tasks: patches are those of two real releases, and a bad file is one clear sentence."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from skyrl_minisandbox.errors import InputError, TaskError
from skyrl_minisandbox.images.recipe import Sdist
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.diff import read_sdist
from skyrl_minisandbox.tasks.pypi import TASK_FILES, read_task_file
from tests.support import needs
from tests.tasks.test_diff import apply, sdist, write

ONE = TASK_FILES / "click-8.1.2.yaml"


def altered(folder: Path, **fields: Any) -> Path:
    """A directory with one task file whose fields are replaced; None leaves a field out."""
    data = yaml.safe_load(ONE.read_text()) | fields
    (folder / "one.yaml").write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return folder


@needs("network", "git")
@pytest.mark.parametrize("task_id", [file.stem for file in sorted(TASK_FILES.glob("*.yaml"))])
def test_both_patches_apply_and_give_exactly_the_files_of_the_next_release(
    task_id: str, pypi_tasks: list[Task], sources: Sources, tmp_path: Path
) -> None:
    task = next(task for task in pypi_tasks if task.id == task_id)
    row = read_task_file(TASK_FILES / f"{task_id}.yaml")
    repository = task.recipe.repository
    assert isinstance(repository, Sdist)
    before = read_sdist(sources.sdist(repository.package, repository.version, repository.sha256, repository.filename))
    after = read_sdist(sources.sdist(row.package, row.fix.version, row.fix.sha256, row.fix.filename))
    write(before, tmp_path)
    apply(task.tests.patch, tmp_path)
    touched = set(row.test_files)
    for step in (touched, touched | set(row.source_files)):
        for path in before.keys() | step:
            wanted = (after if path in step else before).get(path)
            found = tmp_path / path
            assert (found.read_bytes() if found.exists() else None) == (wanted.data if wanted else None), path
        if step is touched:
            apply(task.gold_patch, tmp_path)


@needs("network")
def test_public_carries_neither_the_solution_nor_the_hidden_tests(pypi_tasks: list[Task]) -> None:
    for task in pypi_tasks:
        public = task.public()
        text = public.model_dump_json()
        secrets = [line[1:].strip() for patch in (task.gold_patch, task.tests.patch) for line in patch.split("\n")
                   if line.startswith("+") and not line.startswith("+++") and len(line) > 60]
        assert not [line for line in secrets if line in text or line in public.problem_statement]
        assert not [name for name in task.tests.fail_to_pass if name in text]


@needs("network")
def test_loading_again_gives_the_same_tasks_without_a_download(pypi_tasks: list[Task], sources: Sources) -> None:
    before = {path: path.stat().st_mtime_ns for path in sources.directory.rglob("*.tar.gz")}
    again = load_tasks("pypi", sources=sources, python="3.11")
    assert [task.digest() for task in again] == [task.digest() for task in pypi_tasks]
    assert {path: path.stat().st_mtime_ns for path in sources.directory.rglob("*.tar.gz")} == before


@needs("network")
def test_all_recipes_differ_in_their_repository_only_below_the_environment(pypi_tasks: list[Task]) -> None:
    shared = {(task.recipe.base, task.recipe.python, task.recipe.packages) for task in pypi_tasks}
    assert len(shared) == 1
    assert len({task.recipe.digest() for task in pypi_tasks}) == len(pypi_tasks)


@needs("network")
def test_the_running_interpreter_is_the_default_and_base_and_python_can_be_chosen(sources: Sources) -> None:
    import sys

    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    [task] = load_tasks("pypi", ids=["click-8.1.2"], sources=sources)
    assert (task.recipe.base, task.recipe.python) == ("host", running)
    [task] = load_tasks("pypi", ids=["click-8.1.2"], sources=sources, base="debian", python="3.12")
    assert (task.recipe.base, task.recipe.python) == ("debian", "3.12")


@needs("network")
def test_a_version_that_does_not_exist_is_an_error_naming_task_package_and_version(
    tmp_path: Path, sources: Sources
) -> None:
    wrong = {"version": "8.1.999", "filename": "click-8.1.999.tar.gz", "sha256": "0" * 64}
    with pytest.raises(InputError, match=r"`click-8\.1\.2`.*click.*8\.1\.999"):
        load_tasks("pypi", path=altered(tmp_path, base=wrong), sources=sources)


@needs("network")
def test_another_file_than_was_recorded_is_refused(tmp_path: Path, sources: Sources) -> None:
    wrong = {"version": "8.1.2", "filename": "click-8.1.2.tar.gz", "sha256": "0" * 64}
    with pytest.raises(InputError, match=r"`click-8\.1\.2`.*sha256"):
        load_tasks("pypi", path=altered(tmp_path, base=wrong), sources=sources)


class Releases(Sources):
    """Two tiny releases instead of the index's, for what no real release is: damaged, or the same."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder
        sdist(folder / "1.tar.gz", ("p-1/src.py", b"a\n"), ("p-1/same.py", b"\n"))
        sdist(folder / "2.tar.gz", ("p-2/src.py", b"b\n"), ("p-2/same.py", b"\n"), ("p-2/img.png", b"\xff\0"))

    def sdist(self, package: str, version: str, sha256: str = "", filename: str = "") -> Path:
        return self.directory / ("1.tar.gz" if version == "8.1.2" else "2.tar.gz")


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"source_files": ["same.py"], "test_files": ["src.py"]},
            r"`click-8.1.2`, field `source_files`: `same.py` is the same in click-8.1.2",
        ),
        (
            {"source_files": ["no.py"], "test_files": ["src.py"]},
            r"`click-8.1.2`, field `source_files`: `no.py` is in neither of click-8.1.2",
        ),
        ({"source_files": ["src.py"], "test_files": ["img.png"]}, r"field `test_files`: `img.png` is not UTF-8"),
    ],
    ids=["same", "absent", "binary"],
)
def test_a_file_that_gives_no_patch_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    (tmp_path / "tasks").mkdir()
    folder = altered(tmp_path / "tasks", **fields)
    with pytest.raises(TaskError, match=message):
        load_tasks("pypi", path=folder, python="3.11", sources=Releases(tmp_path))


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    releases = Releases(tmp_path)
    (tmp_path / "2.tar.gz").write_bytes(b"no archive")
    with pytest.raises(TaskError, match=r"`click-8\.1\.2`: 2\.tar\.gz cannot be read"):
        load_tasks("pypi", path=altered(tmp_path / "tasks"), python="3.11", sources=releases)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"command": None}, r"task file one\.yaml has no field `command`"),
        ({"base": {"version": "1"}}, r"task file one\.yaml has no field `base\.filename`"),
        ({"fail_to_pass": []}, r"task file one\.yaml, field `fail_to_pass`"),
        ({"timeout": "soon"}, r"task file one\.yaml, field `timeout`"),
        ({"pins": ["pytest>=8"]}, r"field `pins`: `pytest>=8` is no exact pin"),
        ({"runner": "nose"}, r"field `runner`"),
        ({"id": "a/b"}, r"field `id`"),
        ({"fail_to_passs": []}, r"unknown field `fail_to_passs`; near it: `fail_to_pass`"),
    ],
)
def test_a_bad_field_is_one_sentence_with_file_and_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load_tasks("pypi", path=altered(tmp_path, **fields))
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("id: [")
    with pytest.raises(TaskError, match=r"task file broken\.yaml cannot be read"):
        load_tasks("pypi", path=tmp_path)


def test_a_directory_without_task_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no task files"):
        load_tasks("pypi", path=tmp_path)


def test_a_python_on_which_the_tests_were_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`click-8\.1\.2` was measured on Python 3\.11, 3\.12, 3\.13, not on 3\.9"):
        load_tasks("pypi", ids=["click-8.1.2"], python="3.9", sources=Releases(tmp_path))


def test_git_is_not_needed_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise AssertionError("loading must not start a program")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    (tmp_path / "tasks").mkdir()
    folder = altered(tmp_path / "tasks", source_files=["src.py"], test_files=["src.py"])
    [task] = load_tasks("pypi", path=folder, python="3.11", sources=Releases(tmp_path))
    assert task.gold_patch == "diff --git a/src.py b/src.py\n--- a/src.py\n+++ b/src.py\n@@ -1 +1 @@\n-a\n+b\n"
