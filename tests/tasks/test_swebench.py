"""Rows of SWE-bench's shape become Tasks; a bad row names itself and the field."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.errors import InputError, TaskError
from skyrl_minisandbox.images.recipe import GitCommit
from skyrl_minisandbox.tasks import Task, load_tasks
from skyrl_minisandbox.tasks.diff import changed_files
from skyrl_minisandbox.tasks.environments import FACTS, environment
from skyrl_minisandbox.tasks.swebench import test_targets

PATCH = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-a\n+b\n"
ROW: dict[str, Any] = {
    "repo": "pallets/flask",
    "instance_id": "pallets__flask-5014",
    "base_commit": "7ee9ceb71e868944a46e1ff00b506772a53a4f1d",
    "patch": PATCH.format("src/flask/blueprints.py"),
    "test_patch": PATCH.format("tests/test_blueprints.py"),
    "problem_statement": "It is broken.",
    "hints_text": "",
    "created_at": "2023-03-04T18:36:21Z",
    "version": "2.3",
    "FAIL_TO_PASS": '["tests/test_blueprints.py::test_one[a b]"]',
    "PASS_TO_PASS": '["tests/test_blueprints.py::test_two"]',
    "environment_setup_commit": "182ce3dd15dfa3537391c3efaf9c3ff407d134d4",
    "difficulty": "<15 min fix",
}


def row(**fields: Any) -> dict[str, Any]:
    """The row with fields replaced; `...` leaves a field out."""
    return {key: value for key, value in (ROW | fields).items() if value is not ...}


def rows_file(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in rows))
    return path


def load_one(folder: Path, **fields: Any) -> Task:
    [task] = load_tasks("swebench", path=rows_file(folder, row(**fields)))
    return task


def test_a_row_becomes_a_task(tmp_path: Path) -> None:
    task = load_one(tmp_path)
    assert task.id == "pallets__flask-5014"
    assert task.gold_patch == ROW["patch"]
    assert task.tests.patch == ROW["test_patch"]
    assert task.tests.files == ("tests/test_blueprints.py",)
    assert task.tests.command == "pytest -rA tests/test_blueprints.py"
    assert (task.tests.parser, task.tests.runner) == ("swebench-pytest", "pytest")
    assert task.tests.fail_to_pass == ("tests/test_blueprints.py::test_one[a b]",)
    assert task.tests.pass_to_pass == ("tests/test_blueprints.py::test_two",)
    recipe = task.recipe
    assert (recipe.base, recipe.python, recipe.workdir) == ("debian", "3.11", "/testbed")
    assert recipe.repository == GitCommit(repo="pallets/flask", commit=ROW["base_commit"])
    assert "werkzeug==2.3.7" in recipe.packages
    assert recipe.commands == (
        "python -m pip install --no-deps --no-build-isolation -C editable_mode=compat -e .",
    )


def test_public_has_the_issue_and_nothing_that_solves_it(tmp_path: Path) -> None:
    text = load_one(tmp_path).public().model_dump_json()
    assert "It is broken." in text
    for secret in ("blueprints.py", "test_one", "hints", "2023-03-04"):
        assert secret not in text


def test_test_names_may_be_a_list_or_its_json(tmp_path: Path) -> None:
    task = load_one(tmp_path, FAIL_TO_PASS=["a::b"], PASS_TO_PASS=[])
    assert (task.tests.fail_to_pass, task.tests.pass_to_pass) == (("a::b",), ())


@pytest.mark.parametrize(
    "field", ["repo", "instance_id", "base_commit", "patch", "test_patch", "problem_statement", "version",
              "FAIL_TO_PASS", "PASS_TO_PASS"],
)
def test_a_missing_field_names_row_and_field(tmp_path: Path, field: str) -> None:
    path = rows_file(tmp_path, row(instance_id="pallets__flask-1"), row(**{field: ...}))
    with pytest.raises(TaskError) as caught:
        load_tasks("swebench", path=path)
    named = "" if field == "instance_id" else " (`pallets__flask-5014`)"
    assert caught.value.message == f"row 2 of rows.jsonl{named} has no field `{field}`"
    assert caught.value.hint


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"FAIL_TO_PASS": "tests/a.py::b"}, r"field `FAIL_TO_PASS`: is text, but not the JSON of a list"),
        ({"FAIL_TO_PASS": "{}"}, r"field `FAIL_TO_PASS`: must be a list of names"),
        ({"FAIL_TO_PASS": "[]"}, r"field `FAIL_TO_PASS`"),
        ({"FAIL_TO_PASS": [1]}, r"field `FAIL_TO_PASS`: must be a list of names"),
        ({"patch": " "}, r"field `patch`: must be a text that is not empty"),
        ({"version": 2.3}, r"field `version`: must be a text"),
        ({"base_commit": "main"}, r"field `base_commit`"),
        ({"instance_id": "../x"}, r"field `instance_id`"),
        ({"repo": "flask"}, r"field `repo`"),
        ({"test_patch": "nothing"}, r"field `test_patch`: it changes no file"),
        ({"repo": "me/mine", "instance_id": "me__mine-1"}, r"field `version`: how to build me/mine 2\.3 is not known"),
    ],
)
def test_a_bad_field_names_row_and_field(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=rf"row 1 of rows\.jsonl.*, {message}"):
        load_one(tmp_path, **fields)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"line 3 of rows\.jsonl is not JSON"):
        load_tasks("swebench", path=rows_file(tmp_path, ROW, "", "{"))


def test_a_row_that_is_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"row 1 of rows\.jsonl is not an object"):
        load_tasks("swebench", path=rows_file(tmp_path, "[1]"))


def test_an_id_that_stands_twice_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"row 2 .*field `instance_id`: an earlier row has it too"):
        load_tasks("swebench", path=rows_file(tmp_path, ROW, ROW))


def test_without_a_file_the_key_is_named() -> None:
    with pytest.raises(InputError) as caught:
        load_tasks("swebench")
    assert "tasks.path=FILE" in caught.value.hint


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        load_tasks("swebench", path=tmp_path / "none.jsonl")


def test_json_with_a_list_of_rows_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([ROW]))
    assert [task.id for task in load_tasks("swebench", path=tmp_path / "rows.json")] == ["pallets__flask-5014"]


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lists = row(FAIL_TO_PASS=["a::b"], PASS_TO_PASS=["c::d"])
    parquet.write_table(arrow.Table.from_pylist([lists]), tmp_path / "rows.parquet")
    [task] = load_tasks("swebench", path=tmp_path / "rows.parquet")
    assert task.tests.fail_to_pass == ("a::b",)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow") as caught:
        load_tasks("swebench", path=tmp_path / "rows.parquet")
    assert "pip install pyarrow" in caught.value.hint


@pytest.mark.parametrize(
    "place", ["pallets__flask", "pallets/flask", "flask", "pallets__flask.git", "pallets/flask.git", "flask.git"]
)
def test_a_local_clone_is_found_under_its_usual_names(tmp_path: Path, place: str) -> None:
    clone = tmp_path / "repos" / place
    clone.mkdir(parents=True)
    [task] = load_tasks("swebench", path=rows_file(tmp_path, ROW), repos=tmp_path / "repos")
    assert isinstance(task.recipe.repository, GitCommit)
    assert task.recipe.repository.clone == str(clone)


def test_rows_load_without_a_clone_and_where_it_lies_is_not_the_recipes_identity(tmp_path: Path) -> None:
    path = rows_file(tmp_path, ROW)
    [without] = load_tasks("swebench", path=path)
    [expected] = load_tasks("swebench", path=path, repos=tmp_path)
    assert isinstance(expected.recipe.repository, GitCommit)
    assert expected.recipe.repository.clone == str(tmp_path / "pallets__flask")
    assert expected.recipe.digest() == without.recipe.digest()


def test_django_is_asked_for_modules_and_sympy_has_its_own_parser(tmp_path: Path) -> None:
    django = load_one(
        tmp_path,
        repo="django/django",
        instance_id="django__django-13212",
        version="3.2",
        test_patch=PATCH.format("tests/forms_tests/tests/test_validators.py") + PATCH.format("tests/forms_tests/a.txt"),
    )
    assert django.tests.command.endswith("--parallel 1 forms_tests.tests.test_validators")
    assert (django.tests.parser, django.tests.runner) == ("swebench-django", "django")
    assert django.tests.files == ("tests/forms_tests/tests/test_validators.py", "tests/forms_tests/a.txt")
    sympy = load_one(tmp_path, repo="sympy/sympy", instance_id="sympy__sympy-20916", version="1.8")
    assert (sympy.tests.parser, sympy.tests.runner) == ("swebench-sympy", "sympy")


def test_both_names_of_a_renamed_file_are_restored() -> None:
    patch = "diff --git a/tests/a.py b/tests/b.py\nsimilarity index 100%\n"
    patch += "rename from tests/a.py\nrename to tests/b.py\n"
    assert changed_files(patch) == ("tests/a.py", "tests/b.py")
    assert test_targets("x/y", patch) == ("tests/b.py",)


def test_a_version_for_setuptools_scm_is_given_where_tags_would_have_been() -> None:
    env = environment("pytest-dev__pytest-5809", "pytest-dev/pytest", "4.6")
    assert env is not None
    assert env.commands[-1].startswith("SETUPTOOLS_SCM_PRETEND_VERSION=4.6.0 python -m pip install")
    assert "setuptools-scm==7.1.0" in env.build_packages


def test_what_only_a_compiler_could_install_is_left_out() -> None:
    env = environment("django__django-13212", "django/django", "3.2")
    assert env is not None
    assert not any(pin.startswith("pywatchman") for pin in env.packages)
    assert "pylibmc==1.6.3" in env.packages


def test_a_setuptools_that_is_too_old_to_build_the_project_does_not() -> None:
    old = environment("pylint-dev__pylint-8898", "pylint-dev/pylint", "3.0")
    new = environment("pylint-dev__pylint-6903", "pylint-dev/pylint", "2.15")
    assert old is not None and new is not None
    assert "setuptools==41.6.0" in old.packages
    assert old.commands == ("python -m pip install --no-deps -C editable_mode=compat -e .",)
    assert new.commands == ("python -m pip install --no-deps --no-build-isolation -C editable_mode=compat -e .",)


def test_another_split_uses_the_environment_of_its_repository_and_version() -> None:
    known = environment("pallets__flask-5014", "pallets/flask", "2.3")
    assert environment("pallets__flask-4992", "pallets/flask", "2.3") == known
    assert environment("pallets__flask-4045", "pallets/flask", "2.0") is None


def test_tox_is_never_run_and_no_test_command_needs_a_network() -> None:
    facts = json.loads(FACTS.read_text())
    for instance_id, (_, version, _) in facts["instances"].items():
        owner, _, name = instance_id.rpartition("-")[0].partition("__")
        env = environment(instance_id, f"{owner}/{name}", version)
        assert env is not None
        assert "tox" not in env.test_command
        assert not any(word in line for line in env.commands for word in ("apt-get", "locale-gen"))
        assert all("==" in pin for pin in env.packages)


def test_the_environments_are_facts_of_all_500_verified_instances() -> None:
    facts = json.loads(FACTS.read_text())
    assert len(facts["instances"]) == 500
    assert len(facts["environments"]) == 62
    assert {name for name, _, _ in facts["instances"].values()} == facts["environments"].keys()


@pytest.mark.skipif(not os.environ.get("MINISANDBOX_ROWS"), reason="MINISANDBOX_ROWS=FILE names no real rows")
def test_real_rows_load() -> None:
    path = Path(os.environ["MINISANDBOX_ROWS"])
    tasks = load_tasks("swebench", path=path)
    assert len(tasks) == sum(1 for line in path.read_text().splitlines() if line.strip())
    for task in tasks:
        public = task.public().model_dump_json()
        assert json.dumps(task.gold_patch)[1:-1] not in public
        assert json.dumps(task.tests.patch)[1:-1] not in public
