"""A Task: one problem with the tests that judge it. Frozen, hashable by content, plain data."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict

from skyrl_minisandbox.images.recipe import Recipe


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tests(_Frozen):
    """How a patch is judged.

    patch: unified diff that brings the hidden tests; applied on top of the image's own files.
    files: every path that `patch` touches, relative to the workdir; restored from the image first.
    command: shell command, run in the workdir of a fresh sandbox.
    parser: name of the log parser that reads the command's output: `pytest`, `unittest`, `django`, `sympy`, one of
        SWE-bench's own (`swebench-pytest-v2`, ...), or a dotted path.
    runner: what the command runs: `pytest`, `unittest`, `django`, `sympy`, or `command` for anything else.
        Empty: that of the parser's name.
    fail_to_pass, pass_to_pass: whole test names as the parser gives them.
    flaky: names that validation found to come out now so, now so; they are in neither list and decide nothing.
    timeout: seconds for the command. test_timeout: seconds for each test; None: no bound of its own.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    patch: str
    files: tuple[str, ...]
    command: str
    parser: str = "pytest"
    runner: str = ""
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    flaky: tuple[str, ...] = ()
    timeout: float = 300.0
    test_timeout: float | None = None

    @property
    def kind(self) -> str:
        """What the command runs: `runner`, or what the parser's name says."""
        return self.runner or self.parser


class PublicTask(_Frozen):
    """All of a task that a scaffold and the sandbox of its rollout may know."""

    id: str
    problem_statement: str
    recipe: Recipe


class Task(_Frozen):
    """One problem.

    id: unique in its dataset; safe as a file name (letters, digits, `.`, `_`, `-`).
    gold_patch: unified diff that solves it; only for privileged scaffolds.
    source: the dataset family it came from.
    """

    id: str
    problem_statement: str
    recipe: Recipe
    tests: Tests
    gold_patch: str
    source: str = ""

    def public(self) -> PublicTask:
        """The task without its solution and its hidden tests."""
        return PublicTask(
            id=self.id, problem_statement=self.problem_statement, recipe=self.recipe
        )

    def digest(self) -> str:
        """Hex SHA-256 of the whole task."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
