"""Submits a patch that looks like the solution and does not solve: no task may end `resolved`.

Computed from the gold patch when it runs. Of its hunks only those stay that change no behaviour; where there are
none, the one that has least to do with what the tests ask for, with its first condition inverted so that even if it
were the fix it is none. Running the tests to choose would be surer, but then the scaffold would prove itself right;
a test of ours runs them instead. The same task always gives the same patch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from unidiff import Hunk, PatchedFile, PatchSet
from unidiff.patch import Line

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.policies.policy import Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission, whole
from skyrl_minisandbox.tasks.task import PublicTask, Task

_NO_CODE = re.compile(r"\.(md|rst|txt|cfg|toml|ini|in|pyi)$", re.IGNORECASE)
_PACKAGING = re.compile(r"(^|/)(setup|conf|versioneer|_version|__meta__|__about__)\.py$")
_NO_LOGIC = re.compile(r"^\s*(#.*|__\w+__\s*=.*|version\s*=.*|)$", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z_]\w{2,}")


class WrongScaffold(Scaffold):
    """The gold patch without what makes it work, without a look at the sandbox or a question to the policy."""

    privileged = True

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Return the spoilt gold patch. Raises `TaskError` for a gold patch that cannot be read."""
        full = whole(task)
        asked = "\n".join([full.problem_statement, *full.tests.fail_to_pass, _added(full.tests.patch)])
        try:
            return Submission(patch=wrong_patch(full.gold_patch, asked))
        except ValueError as error:
            raise TaskError(
                f"no wrong patch can be made from the gold patch of task `{full.id}`: {error}",
                hint=f"minisandbox tasks show {full.id}",
            ) from error


def wrong_patch(gold: str, asked: str = "") -> str:
    """Spoil a unified diff: never empty, applicable where `gold` is.

    asked: text that says what is asked for (issue, tests). Raises `ValueError` when nothing can be spoilt.
    """
    try:
        files = list(PatchSet(gold))
    except Exception as error:  # unidiff raises its own class for some faults and plain ones for others
        raise ValueError(f"not a unified diff: {error}") from error
    files = [file for file in files if len(file) and not file.is_binary_file]  # unidiff drops their bytes
    hunks = [(file, hunk) for file in files for hunk in file]
    harmless = [hunk for file, hunk in hunks if not _has_logic(file, hunk)]
    if harmless and len(harmless) < len(hunks):
        return _render(files, harmless)
    words = set(_WORD.findall(asked))

    def distance(pair: tuple[PatchedFile, Hunk]) -> tuple[int, int]:
        changed = [line.value for line in _changed(pair[1])]
        return len(words & set(_WORD.findall("\n".join(changed)))), len(changed)

    ranked = [hunk for _, hunk in sorted(hunks, key=distance)]  # stable: the first of equals
    for hunk in ranked:
        if _invert(hunk):
            return _render(files, [hunk])
    if len(ranked) > 1:
        return _render(files, ranked[:1])
    if ranked and _hollow(ranked[0]):
        return _render(files, ranked)
    raise ValueError("it has no hunk to leave out and no line to invert")


def _added(patch: str) -> str:
    return "\n".join(line[1:] for line in patch.splitlines() if line.startswith("+"))


def _render(files: list[PatchedFile], kept: list[Hunk]) -> str:
    """The text of these hunks, numbered anew: `git apply` begins its search at the target line."""
    parts = []
    for file in files:
        hunks = [hunk for hunk in file if any(hunk is one for one in kept)]
        shift = 0
        for hunk in hunks:
            hunk.target_start = hunk.source_start + shift
            shift += hunk.target_length - hunk.source_length
        file[:] = hunks
        if hunks:
            parts.append(str(file))
    return "".join(parts)


def _changed(hunk: Hunk) -> Iterator[Line]:
    return (line for line in hunk if line.is_added or line.is_removed)


def _has_logic(file: PatchedFile, hunk: Hunk) -> bool:
    """Whether a hunk may change what the program does: code, and more than comments or a version."""
    if _NO_CODE.search(file.path) or _PACKAGING.search(file.path):
        return False
    return any(not _NO_LOGIC.match(line.value.rstrip("\r\n")) for line in _changed(hunk))


def _invert(hunk: Hunk) -> bool:
    """Turn the first added condition into its contrary; without one the first returned or assigned value."""
    for contrary in (_other_branch, _other_value):
        for line in hunk:
            if line.is_added:
                body = line.value.rstrip("\r\n")
                spoilt = _spoil(body, contrary)
                if spoilt is not None:
                    line.value = spoilt + line.value[len(body) :]
                    return True
    return False


def _spoil(line: str, contrary: Callable[[str], str | None]) -> str | None:
    code = line.lstrip()
    spoilt = contrary(code)
    return None if spoilt is None or spoilt == code else line[: len(line) - len(code)] + spoilt


def _other_branch(code: str) -> str | None:
    """`if x:` -> `if not (x):`; None for what is no whole header on one line."""
    for word, probe in (("if", "{}\n  pass"), ("while", "{}\n  pass"), ("elif", "if x:\n  pass\n{}\n  pass")):
        header = re.fullmatch(rf"{word}\s+(.+):\s*(#.*)?", code)
        if header and _parses(probe.format(code)) and _parses(header[1]):
            return f"{word} not ({header[1]}):"
    return None


def _other_value(code: str) -> str | None:
    """`return x` -> `return not (x)`, `y = x` -> `y = None`; None for what is no whole statement of these."""
    given = re.fullmatch(r"return\s+(.+)", code)
    if given and _parses(f"def f():\n  {code}"):
        return f"return not ({_uncommented(given[1])})"
    assigned = re.fullmatch(r"([\w.\[\]'\"]+)\s*=\s*([^=].*)", code)
    if assigned and _parses(code):
        return f"{assigned[1]} = None"
    return None


def _uncommented(code: str) -> str:
    """`code` without a trailing comment: up to the first `#` before which it is an expression of its own."""
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
    text = first.value
    first.value = text[: len(text) - len(text.lstrip())].rstrip("\r\n") + "# unchanged\n"
    kept: list[Line] = []
    for line in hunk:
        if line.is_removed:
            line.line_type = " "
        if line is first or not line.is_added:
            kept.append(line)
    hunk[:] = kept
    hunk.target_length = hunk.source_length + 1
    return True
