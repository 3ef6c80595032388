"""The kernel side: namespaces, overlay, limits and commands. Knows nothing of tasks, images, agents or Ray.

Names are loaded on use: the launcher is a small process that imports only what it runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skyrl_minisandbox.sandbox.client import owner_shift as owner_shift
    from skyrl_minisandbox.sandbox.client import shutdown_launcher as shutdown_launcher
    from skyrl_minisandbox.sandbox.client import tmpfs_holds_upper as tmpfs_holds_upper
    from skyrl_minisandbox.sandbox.pool import Pool as Pool
    from skyrl_minisandbox.sandbox.sandbox import Sandbox as Sandbox
    from skyrl_minisandbox.sandbox.shell import Shell as Shell
    from skyrl_minisandbox.sandbox.spec import Bind as Bind
    from skyrl_minisandbox.sandbox.spec import CommandResult as CommandResult
    from skyrl_minisandbox.sandbox.spec import Limits as Limits
    from skyrl_minisandbox.sandbox.spec import SandboxSpec as SandboxSpec
    from skyrl_minisandbox.sandbox.state import Change as Change
    from skyrl_minisandbox.sandbox.state import Snapshot as Snapshot

__all__ = [
    "Bind", "Change", "CommandResult", "Limits", "Pool", "Sandbox", "SandboxSpec", "Shell", "Snapshot",
    "owner_shift", "shutdown_launcher", "tmpfs_holds_upper",
]

_WHERE = {
    "Pool": "pool", "Sandbox": "sandbox", "Shell": "shell", "Change": "state", "Snapshot": "state",
    "owner_shift": "client", "shutdown_launcher": "client", "tmpfs_holds_upper": "client",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE.get(name, 'spec')}"), name)
