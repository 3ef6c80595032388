"""Answers from a recorded file."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import InputError, PolicyError
from skyrl_minisandbox.policies.policy import Message


class ScriptPolicy:
    """Gives recorded texts, one per query, whatever the conversation says.

    path: a JSON file: a list of texts, or an object of such lists by task id. A name without a suffix is one
        of the recordings that come with the package (`pypi`: mini-swe-agent on some of the pypi tasks).
    task_id: whose texts to give, where the file is an object.
    """

    def __init__(self, *, path: str = "pypi", task_id: str = "") -> None:
        self.path = path
        self.task_id = task_id
        self._texts = _texts(load_script(path), path, task_id)
        self._next = 0

    def query(self, messages: list[Message]) -> str:
        """Return the next text. Raises `PolicyError` when there is none."""
        if self._next >= len(self._texts):
            raise PolicyError(
                f"the script `{self.path}` has ended: {len(self._texts)} texts for task `{self.task_id}`",
                hint="record more texts, or let the last one submit",
            )
        self._next += 1
        return self._texts[self._next - 1]


def load_script(path: str) -> Any:
    """Read a script file, or one that comes with the package. Raises `InputError`."""
    try:
        if not Path(path).suffix:
            source = importlib.resources.files("skyrl_minisandbox.policies") / "scripts" / f"{path}.json"
            return json.loads(source.read_text(encoding="utf-8"))
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the script `{path}`: {error.strerror}", hint="set `policy.path=FILE.json`"
        ) from error
    except ValueError as error:
        raise InputError(
            f"the script `{path}` is not JSON: {error}",
            hint='it is a list of texts, or {"task id": [texts]}',
        ) from error


def scripted_tasks(path: str = "pypi") -> list[str]:
    """The task ids that a script has texts for; empty for a single list."""
    data = load_script(path)
    return sorted(data) if isinstance(data, dict) else []


def _texts(data: Any, path: str, task_id: str) -> list[str]:
    if isinstance(data, dict):
        if task_id not in data:
            raise InputError(
                f"the script `{path}` has no texts for task `{task_id}`; it has: {', '.join(sorted(data))}",
                hint=f"tasks.ids=[{','.join(sorted(data))}]",
            )
        data = data[task_id]
    if not isinstance(data, list) or not all(isinstance(text, str) for text in data):
        raise InputError(
            f"the script `{path}` holds no list of texts for task `{task_id}`",
            hint='it is a list of texts, or {"task id": [texts]}',
        )
    return data
