"""Which paths come from the image whatever a patch says, and which are the patch's own."""

from __future__ import annotations

import pytest

from skyrl_minisandbox.rewards.steering import Steering, test_directories

PACKAGES = {"pkg", "pkg/tests", "tests", "flat/pkg"}


def steering(runner: str = "pytest", command: str = "pytest tests/test_a.py", gold: tuple[str, ...] = ()) -> Steering:
    files = ("tests/test_a.py", "pkg/tests/test_b.py", "test_flat.py", "checks/test_c.py")
    return Steering(runner, command, files, gold, PACKAGES.__contains__)


@pytest.mark.parametrize(
    "path",
    [
        "conftest.py", "pkg/conftest.py", "pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml", "sitecustomize.py",
        "usercustomize/__init__.py", "evil.pth", "pkg.egg-info/entry_points.txt", "x-1.0.dist-info/entry_points.txt",
        "pkg/__pycache__/core.cpython-311.pyc", "tests/test_a.py", "tests/helpers.py", "tests/data/x.json",
        "pkg/tests/__init__.py", "tests", "test_flat.py", "test_flat/__init__.py",
        "test_flat.cpython-311-x86_64-linux-gnu.so", "checks/test_c/__init__.py", "checks/test_c.so", "pytest.py",
        "_pytest/runner.py", "pluggy/__init__.py", "unittest/case.py", "random.py", "scripts/json/__init__.py",
    ],
)  # fmt: skip
def test_what_steers_a_runner_comes_from_the_image(path: str) -> None:
    assert steering().steers(path)


@pytest.mark.parametrize(
    "path",
    ["pkg/core.py", "pkg/json.py", "pkg/random/__init__.py", "docs/a.rst", "setup.py", "checks/other.py", "README.md",
     "flat/pkg/ast.py", "pkg/conftest_tools.py", "testament.py", "new_module.py"],
)  # fmt: skip
def test_what_a_fix_may_be_made_of_is_the_patch_s_own(path: str) -> None:
    assert not steering().steers(path)


def test_a_file_that_the_gold_patch_touches_is_part_of_the_solution() -> None:
    assert not steering(gold=("setup.cfg", "tests/helpers.py")).steers("setup.cfg")
    assert steering(gold=("setup.cfg",)).steers("pkg/conftest.py")


def test_a_runner_that_the_project_brings_is_the_image_s() -> None:
    assert steering("django").steers("django/test/runner.py")
    assert not steering("pytest").steers("django/test/runner.py")
    for path in ("bin/test", "sympy/testing/runtests.py", "sympy/utilities/runtests.py"):
        assert steering("sympy").steers(path)
        assert not steering("django").steers(path)
    assert not steering("sympy").steers("sympy/utilities/lambdify.py")


def test_a_file_that_the_command_names_is_the_image_s() -> None:
    assert steering("command", "bash ./tools/run.sh --fast").steers("tools/run.sh")
    assert steering("command", "make check").steers("Makefile")
    assert not steering("command", "bash ./tools/run.sh").steers("tools/other.sh")
    assert steering("command", "it's 'unclosed run.sh").steers("run.sh")


def test_directories_of_tests_are_the_topmost_ones() -> None:
    assert test_directories(["tests/a/tests/b.py", "x/test/y.py", "z.py", "pkg/latest/q.py"]) == {"tests", "x/test"}
