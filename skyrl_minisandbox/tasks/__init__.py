"""Datasets -> Task. One module per dataset family.

Names are imported when first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_minisandbox.tasks.load import load_tasks
    from skyrl_minisandbox.tasks.task import PublicTask, Task, Tests

__all__ = ["PublicTask", "Task", "Tests", "load_tasks"]


def __getattr__(name: str) -> Any:
    if name == "load_tasks":
        from skyrl_minisandbox.tasks.load import load_tasks

        return load_tasks
    if name in __all__:
        from skyrl_minisandbox.tasks import task

        return getattr(task, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
