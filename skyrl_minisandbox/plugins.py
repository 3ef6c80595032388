"""The one plug-in rule: a short name or a dotted path, and an error that says what exists."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from skyrl_minisandbox.errors import InputError, PluginError


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


def make_plugin(kind: str, name: str, factory: Any, config: Mapping[str, Any], *, under: str = "") -> Any:
    """Call `factory` with `config` as keyword arguments.

    under: the key that they stand below, for messages; `kind` when empty.

    Raises `InputError` that lists the keys it knows, for one that it does not know or lacks.
    """
    check_keys(kind, name, factory, config, under=under)
    return factory(**config)


def check_keys(kind: str, name: str, factory: Any, config: Mapping[str, Any], *, under: str = "") -> None:
    """Raise the `InputError` of `make_plugin` without calling anything."""
    under = under or kind
    parameters = inspect.signature(factory).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for key in config:
            if key not in known:
                raise InputError(
                    f"{kind} `{name}` has no key `{key}`; known: {', '.join(sorted(known)) or 'none'}",
                    hint=f"name one of these, or leave `{under}.{key}` out",
                )
    for parameter in parameters:
        needed = parameter.default is parameter.empty and parameter.kind is parameter.KEYWORD_ONLY
        if needed and config.get(parameter.name) is None:
            raise InputError(
                f"{kind} `{name}` needs the key `{parameter.name}`",
                hint=f"set `{under}.{parameter.name}=...`",
            )
