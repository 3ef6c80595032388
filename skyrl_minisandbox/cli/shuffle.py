"""The same task with its tests in another order."""

from __future__ import annotations

from skyrl_minisandbox.tasks.task import Task

_FOLDER = ".other-order"
_MODULE = "minisandbox_other_order"

# A pytest plugin: every process of a run (pytest-xdist has several) must come to the same order.
_PLUGIN = f"""\
import random

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    random.Random({_MODULE!r}).shuffle(items)
"""


def other_order(task: Task) -> tuple[str, Task] | None:
    """`shuffled` or `reversed`, and the task that is; None where the runner has no such order.

    pytest: a plugin that comes with the test patch. Django: its runner's `--reverse`, since 1.8. It is for a look
    at honest patches, in `official` mode.
    """
    tests = task.tests
    if tests.kind == "pytest":
        lines = _PLUGIN.splitlines()
        path = f"{_FOLDER}/{_MODULE}.py"
        added = "".join(f"+{line}\n" for line in lines)
        patch = (
            f"diff --git a/{path} b/{path}\nnew file mode 100644\n--- /dev/null\n+++ b/{path}\n"
            f"@@ -0,0 +1,{len(lines)} @@\n{added}"
        )
        # Not the workdir itself: a module there could hide one that the tests import.
        command = (
            f'export PYTHONPATH="$PWD/{_FOLDER}${{PYTHONPATH:+:$PYTHONPATH}}" '
            f'PYTEST_ADDOPTS="-p {_MODULE} ${{PYTEST_ADDOPTS-}}"\n{tests.command}'
        )
        before = tests.patch if not tests.patch or tests.patch.endswith("\n") else tests.patch + "\n"
        changed = {"patch": before + patch, "files": (*tests.files, path), "command": command}
        return "shuffled", task.model_copy(update={"tests": tests.model_copy(update=changed)})
    if tests.kind == "django":
        changed = {"command": f"{tests.command.rstrip()} --reverse"}
        return "reversed", task.model_copy(update={"tests": tests.model_copy(update=changed)})
    return None
