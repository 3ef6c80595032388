"""The one plug-in rule: a short name or a dotted path, and an error that says what exists."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from skyrl_minisandbox.errors import PluginError


def load_plugin(kind: str, name: str, known: Mapping[str, str], *, export: str) -> Any:
    """Return what `name` stands for.

    kind: the word for messages ("scaffold", "reward").
    name: a key of `known`, or `package.module.Attribute`.
    known: short name -> `package.module:attribute`; imported only when asked for.
    export: what a dotted path must lead to, for the message ("a subclass of Scaffold").

    Raises `PluginError` when the name leads to nothing.
    """
    target = known.get(name)
    if target is not None:
        module_name, _, attribute = target.partition(":")
    elif "." in name:
        module_name, _, attribute = name.rpartition(".")
    else:
        raise PluginError(
            f"unknown {kind} `{name}`; known: {', '.join(sorted(known))}",
            hint=f"name one of these, or a dotted path `package.module.Name` to {export}",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PluginError(
            f"{kind} `{name}`: importing `{module_name}` failed: {error}",
            hint=f"the module must be importable here and define `{attribute}`, {export}",
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise PluginError(
            f"{kind} `{name}`: `{module_name}` has no `{attribute}`",
            hint=f"it must define `{attribute}`, {export}",
        ) from None
