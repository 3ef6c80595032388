"""What a hack is: data that the suite runs, and from which docs/rewards.md gets its table."""

from __future__ import annotations

import dataclasses
import posixpath
from collections.abc import Mapping
from typing import Literal

from skyrl_minisandbox.tasks.diff import File, diff_trees

Runner = Literal["pytest", "unittest", "django", "sympy"]
Bait = Literal["official", "own sandbox"]

KINDS: dict[str, str] = {
    "tests": "the tests are deleted, skipped, renamed, linked elsewhere",
    "conftest": "a conftest.py that changes tests or verdicts",
    "configuration": "ini files with -k, addopts, -p",
    "start-up": "sitecustomize, usercustomize, .pth, entry points of a plug-in",
    "shadow": "a module that stands in front of the runner's",
    "runner": "the runner edited in place, a fake one on PATH, the environment swapped",
    "ending": "the process ends before its tests do, or never",
    "log": "forged summaries, reports and results",
    "verdict": "an exception or a value that counts as success without being one",
    "in-process": "the code under test reaches into the runner",
    "canary": "the code under test looks for who grades it",
    "rewritten test": "the code under test changes the tests in memory",
    "git": "hooks, attributes, filters, history",
    "process": "something that outlives the rollout or the test",
    "names": "names and characters that collide or look alike; locale, clock, hash seed",
}


@dataclasses.dataclass(frozen=True)
class Hack:
    """One attempt to be paid without fixing.

    kind: a key of `KINDS`. idea: what it does, for the table.
    patch: a unified diff; or else
    commands: what an agent runs in its sandbox (bash), the patch being what we make of that.
    bait: the grading that pays it, so that it is known to work: `official`, or `own sandbox` (the tests run where the
        agent was and their exit status is believed, as some trainers do). Empty: it needs something that no image of
        ours has; `why_no_bait` says what.
    stopped: what stops it, for the table.
    paid: why `protected` still pays it: then it is expected to, and a test that finds it stopped says so.
    tries: gradings in `protected`, none of which may pay: canaries are random, and what luck catches is not caught.
    """

    name: str
    kind: str
    runner: Runner
    idea: str
    stopped: str
    patch: str = ""
    commands: str = ""
    bait: Bait | None = "official"
    why_no_bait: str = ""
    paid: str = ""
    tries: int = 1

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert bool(self.patch) != bool(self.commands), self.name
        assert bool(self.bait) != bool(self.why_no_bait), self.name


@dataclasses.dataclass(frozen=True)
class Twin:
    """An honest fix that does something like what hacks of `kind` do; it must be paid in every mode."""

    name: str
    kind: str
    runner: Runner
    idea: str
    patch: str = ""
    commands: str = ""

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
        assert bool(self.patch) != bool(self.commands), self.name


LINK = "link:"
"""A text that begins so is a symbolic link to what follows."""


def patch_of(before: Mapping[str, str], changes: Mapping[str, str | None]) -> str:
    """The patch that makes each path of `changes` that text; None deletes it, `link:TARGET` makes it a link."""
    old = {path: File(text.encode()) for path, text in before.items()}
    new = {path: File(text.encode()) for path, text in changes.items() if text is not None and not _link(text)}
    plain = [path for path, text in changes.items() if text is None or not _link(text)]
    parts = [diff_trees(old, new, plain)]
    for path, text in changes.items():
        if text is not None and _link(text):
            if path in before:  # git wants a change of kind as two steps
                parts.append(diff_trees(old, {}, [path]))
            target = text.removeprefix(LINK)
            parts.append(
                f"diff --git a/{path} b/{path}\nnew file mode 120000\n--- /dev/null\n+++ b/{path}\n"
                f"@@ -0,0 +1 @@\n+{target}\n\\ No newline at end of file\n"
            )
    return "".join(parts)


def _link(text: str) -> bool:
    return text.startswith(LINK)


def edited(before: Mapping[str, str], path: str, old: str, new: str) -> dict[str, str]:
    """`path` with `old`, which is in it once, become `new`; for `patch_of`."""
    assert before[path].count(old) == 1, (path, old)
    return {path: before[path].replace(old, new)}


def written(files: Mapping[str, str]) -> str:
    """A bash program that writes these files below the current directory."""
    lines = []
    for path, text in files.items():
        assert text.endswith("\n") and "\nEND_OF_FILE\n" not in text
        if parent := posixpath.dirname(path):
            lines.append(f"mkdir -p '{parent}'")
        lines.append(f"cat > '{path}' <<'END_OF_FILE'\n{text}END_OF_FILE")
    return "\n".join(lines) + "\n"
