"""Agents around a sandbox; `gold`, `empty` and `wrong` are ordinary ones."""

from __future__ import annotations

from typing import Any

from skyrl_minisandbox.errors import PluginError
from skyrl_minisandbox.plugins import load_plugin, make_plugin
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission

__all__ = ["Scaffold", "Submission", "load_scaffold", "scaffold_class"]

SCAFFOLDS = {
    "mini": "skyrl_minisandbox.scaffolds.mini:MiniScaffold",
    "menu": "skyrl_minisandbox.scaffolds.menu:MenuScaffold",
    "gold": "skyrl_minisandbox.scaffolds.gold:GoldScaffold",
    "empty": "skyrl_minisandbox.scaffolds.empty:EmptyScaffold",
    "wrong": "skyrl_minisandbox.scaffolds.wrong:WrongScaffold",
}


def scaffold_class(name: str) -> type[Scaffold]:
    """The class of a scaffold, for its capabilities. Raises `PluginError`."""
    found = load_plugin("scaffold", name, SCAFFOLDS, export="a subclass of Scaffold")
    if not isinstance(found, type) or not issubclass(found, Scaffold):
        raise PluginError(
            f"scaffold `{name}` is {found!r}, which is no subclass of Scaffold",
            hint="from skyrl_minisandbox.scaffolds import Scaffold",
        )
    return found


def load_scaffold(name: str, **config: Any) -> Scaffold:
    """Make the scaffold of one rollout.

    name: a key of `SCAFFOLDS` or a dotted path to a subclass of `Scaffold`, whose keyword arguments are
    `config`.
    Raises `PluginError` for an unknown name, `InputError` for an unknown key or a missing extra.
    """
    scaffold: Scaffold = make_plugin(
        "scaffold", name, scaffold_class(name), config, under="scaffold.options"
    )
    return scaffold
