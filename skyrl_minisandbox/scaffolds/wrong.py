"""Submits a patch that looks like the solution and does not solve: no task may end `resolved`.

Computed from the gold patch when it runs: the hunks that may change what the program does are left out. Where
nothing would be left, the first condition or value of an added line is inverted instead. The same task always
gives the same patch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from unidiff import Hunk, PatchedFile, PatchSet
from unidiff.patch import Line

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission, whole
from skyrl_minisandbox.tasks.task import PublicTask, Task

_PACKAGING = re.compile(r"(^|/)(setup|conf|versioneer|_version|__meta__|__about__)\.py$")
_PROSE = re.compile(r"\.(md|rst|txt|cfg|toml|ini|in)$", re.IGNORECASE)
_NO_LOGIC = re.compile(r"^\s*(#.*|__\w+__\s*=.*|version\s*=.*|)$", re.IGNORECASE)


class WrongScaffold(Scaffold):
    """The gold patch without its logic, without a look at the sandbox or a question to the policy."""

    privileged = True

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Return the spoilt gold patch. Raises `TaskError` for a gold patch that cannot be read."""
        full = whole(task)
        try:
            return Submission(patch=wrong_patch(full.gold_patch))
        except ValueError as error:
            raise TaskError(
                f"no wrong patch can be made from the gold patch of task `{full.id}`: {error}",
                hint=f"minisandbox tasks show {full.id}",
            ) from error


def wrong_patch(gold: str) -> str:
    """Spoil a unified diff: never empty, always applicable where `gold` is.

    Raises `ValueError` when nothing in it can be spoilt.
    """
    try:
        kept = PatchSet(gold)
        spoilt = PatchSet(gold)
    except Exception as error:  # unidiff raises its own class for some faults and plain ones for others
        raise ValueError(f"not a unified diff: {error}") from error
    for file in kept:
        _keep(file, [hunk for hunk in file if not _has_logic(file, hunk)])
    text = _render(kept)
    if text:
        return text
    for file in spoilt:
        for hunk in file:
            if _invert(hunk):
                return _render(spoilt)
    for file in spoilt:
        for hunk in file:
            if file.path.endswith(".py") and _hollow(hunk):
                return _render(spoilt)
    raise ValueError("it has no hunk to leave out and no line to invert")


def _keep(file: PatchedFile, hunks: list[Hunk]) -> None:
    """Keep some hunks of a file and number them anew: `git apply` begins its search at the target line."""
    file[:] = hunks
    shift = 0
    for hunk in hunks:
        hunk.target_start = hunk.source_start + shift
        shift += hunk.target_length - hunk.source_length


def _render(patch: PatchSet) -> str:
    """The text, without files that have nothing left, and without binary ones: unidiff drops their bytes."""
    return "".join(str(file) for file in patch if len(file) and not file.is_binary_file)


def _changed(hunk: Hunk) -> Iterator[Line]:
    return (line for line in hunk if line.is_added or line.is_removed)


def _has_logic(file: PatchedFile, hunk: Hunk) -> bool:
    """Whether a hunk may change what the program does: no prose or packaging, and more than a version."""
    if _PROSE.search(file.path) or _PACKAGING.search(file.path):
        return False
    return any(not _NO_LOGIC.match(line.value.rstrip("\r\n")) for line in _changed(hunk))


def _invert(hunk: Hunk) -> bool:
    """Turn the first added line that is a whole statement with a condition or a value into its contrary."""
    for line in hunk:
        if line.is_added:
            body = line.value.rstrip("\r\n")
            spoilt = _contrary(body)
            if spoilt is not None and spoilt != body:
                line.value = spoilt + line.value[len(body) :]
                return True
    return False


def _contrary(line: str) -> str | None:
    """The line with its condition or value inverted; None when it is no whole statement of that kind."""
    indent, code = re.match(r"(\s*)(.*)", line, re.DOTALL).groups()  # type: ignore[union-attr]
    for word, probe in (("if", "{}\n  pass"), ("while", "{}\n  pass"), ("elif", "if x:\n  pass\n{}\n  pass")):
        header = re.fullmatch(rf"{word}\s+(.+?):\s*(#.*)?", code)
        if header and _parses(probe.format(code)):
            return f"{indent}{word} not ({header[1]}):"
    if (given := re.fullmatch(r"return\s+(.+)", code)) and _parses(f"def f():\n  {code}"):
        return f"{indent}return not ({_uncommented(given[1])})"
    assigned = re.fullmatch(r"([\w.\[\]'\"]+)\s*=\s*([^=].*)", code)
    if assigned and _parses(code):
        return f"{indent}{assigned[1]} = None"
    return None


def _uncommented(code: str) -> str:
    """`code` without a trailing comment: the longest prefix before a `#` that is an expression of its own."""
    for match in re.finditer("#", code):
        if _parses(code[: match.start()].strip()):
            return code[: match.start()].strip()
    return code


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _hollow(hunk: Hunk) -> bool:
    """Undo the hunk but for a comment where its first added line was."""
    first = next((line for line in hunk if line.is_added), None)
    if first is None:
        return False
    indent = re.match(r"\s*", first.value.rstrip("\r\n"))
    first.value = f"{indent[0] if indent else ''}# unchanged\n"
    kept: list[Line] = []
    for line in hunk:
        if line.is_removed:
            line.line_type = " "
        if line is first or not line.is_added:
            kept.append(line)
    hunk[:] = kept
    hunk.target_length = hunk.source_length + 1
    return True
