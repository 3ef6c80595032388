"""From the name of a task source to Tasks."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skyrl_minisandbox.config import ImagesConfig
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.plugins import load_plugin
from skyrl_minisandbox.tasks.family import Family, FamilyOptions
from skyrl_minisandbox.tasks.task import Task
from skyrl_minisandbox.tasks.validation import passed_ids, read_validation, without_flaky

FAMILIES = {
    "pypi": "skyrl_minisandbox.tasks.pypi:family",
    "swebench": "skyrl_minisandbox.tasks.swebench:family",
    "toy": "skyrl_minisandbox.tasks.toy:family",
}

_THREADS = 8  # makers mostly wait for the package index
_SHOWN = 5


def load_tasks(
    source: str,
    *,
    ids: Sequence[str] | None = None,
    repos: str | Path | None = None,
    sources: Sources | None = None,
    base: str | None = None,
    python: str | None = None,
    path: str | Path | None = None,
    validation: str | Path | None = None,
) -> list[Task]:
    """Return the tasks of a source.

    source: a family's short name, or the dotted path of one of your own (see `tasks.family.Family`).
    ids: only these, in this order; None or empty: all, in the dataset's order.
    repos: directory with local clones of the repositories; needed to build their images, not to load.
    sources: where released source distributions come from; None: the user's package index, kept below
        the default cache directory.
    base: base of the images, `host` or `debian`; None: what suits the family.
    python: `3.12`, another interpreter than the tasks' own; None: theirs.
    path: file or directory that the family reads; None: its own default.
    validation: a `validation.json`: only the tasks that passed, without their flaky tests.

    Raises `InputError` for an unknown id (it lists near ones), or one that has not passed, `PluginError` for
    an unknown source, `TaskError` for a row that is not a task, and what `Sources` raises, with the task named.
    """
    options = FamilyOptions(
        sources=(lambda: sources) if sources is not None else _default_sources,
        base=base or None,
        python=python or None,
        path=Path(path) if path else None,
        repos=Path(repos) if repos else None,
    )
    makers = _family(source)(options)
    chosen = list(dict.fromkeys(ids)) if ids else list(makers)
    unknown = [task_id for task_id in chosen if task_id not in makers]
    if unknown:
        raise _unknown_ids(source, unknown, list(makers))
    rows = read_validation(Path(validation)) if validation else {}
    if validation:
        chosen = passed_ids(rows, chosen, asked=bool(ids), source=source)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tasks") as pool:
        pending = [pool.submit(makers[task_id]) for task_id in chosen]
        try:
            tasks = [future.result() for future in pending]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # one bad task is enough: do not make the others first
            raise
    return [without_flaky(task, rows[task.id]) for task in tasks] if validation else tasks


def task_ids(source: str, *, path: str | Path | None = None, validation: str | Path | None = None) -> list[str]:
    """The ids of a source, in the dataset's order, without making the tasks.

    path, validation: as for `load_tasks`, and the same errors.
    """
    ids = list(_family(source)(FamilyOptions(sources=_default_sources, path=Path(path) if path else None)))
    return passed_ids(read_validation(Path(validation)), ids, asked=False, source=source) if validation else ids


def _family(source: str) -> Family:
    export = "a function as `skyrl_minisandbox.tasks.family.Family` describes"
    family: Family = load_plugin("task source", source, FAMILIES, export=export)
    return family


@functools.cache
def _default_sources() -> Sources:
    return Sources(Path(ImagesConfig().cache) / "sources")


def _unknown_ids(source: str, unknown: list[str], known: list[str]) -> InputError:
    near = [name for task_id in unknown for name in difflib.get_close_matches(task_id, known, n=_SHOWN)]
    if near:
        found = f"near names: {', '.join(list(dict.fromkeys(near))[:_SHOWN])}"
    else:
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        found = f"it has {', '.join(known[:_SHOWN]) or 'no tasks at all'}{more}"
    word = "task id" if len(unknown) == 1 else "task ids"
    return InputError(
        f"unknown {word} {', '.join(f'`{name}`' for name in unknown)} in `{source}`",
        hint=f"{found}; `minisandbox tasks list tasks={source}` lists all",
    )
