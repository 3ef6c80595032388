"""What every dataset family is asked for, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class FamilyOptions:
    """What a user may say about a task source.

    sources: gives released source distributions; asked only by families that need them.
    base: base of the images, `host` or `debian`; None: what suits the family.
    python: `3.12`, another interpreter than the tasks' own; None: theirs.
    path: file or directory that the family reads; None: its own default.
    repos: directory with local clones of the repositories.
    """

    sources: Callable[[], Sources]
    base: str | None = None
    python: str | None = None
    path: Path | None = None
    repos: Path | None = None


TaskMaker = Callable[[], Task]

Family = Callable[[FamilyOptions], Mapping[str, TaskMaker]]
"""A family: options -> the maker of each task by its id, in the order of the dataset.

Ids must be had without work, because most of them may not be asked for; what costs (a download, a diff)
belongs into the maker. Makers are called from several threads, each at most once. Both raise `TaskError`
for a bad row.
"""
