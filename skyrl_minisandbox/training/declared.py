"""A configuration class as plain data: its declared defaults, as they stand in the source, and its sentences.

An instance would not do: SkyRL derives some values from others as it is made (`generator.max_input_length` from
`trainer.max_prompt_length`), and defaults taken from one freeze what the user has not set yet.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import enum
import functools
import inspect
import itertools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple


class Declared(NamedTuple):
    """What a class declares.

    defaults: nested plain data; None where a value is derived or left out.
    optional: the dotted key of a nested class that is None unless asked for, and the keys that it may have.
    open: dotted keys of plain mappings, below which anything may stand.
    """

    defaults: dict[str, Any]
    optional: dict[str, dict[str, Any]]
    open: frozenset[str]


def declared(cls: type, *, without: str = "") -> Declared:
    """The declaration of `cls` and of all classes nested in it. without: a dotted key to leave out."""
    defaults: dict[str, Any] = {}
    optional: dict[str, dict[str, Any]] = {}
    open_keys: set[str] = set()
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if item.name == without:
            continue
        name, _, rest = without.partition(".")
        inside, may_be_none = _nested(hints[item.name])
        if inside is None:
            if _is_mapping(hints[item.name]):
                open_keys.add(item.name)
            defaults[item.name] = _plain(_default(item))
            continue
        nested = declared(inside, without=rest if name == item.name else "")
        optional |= {f"{item.name}.{key}": value for key, value in nested.optional.items()}
        open_keys |= {f"{item.name}.{key}" for key in nested.open}
        factory: Any = item.default_factory
        value = None if factory is inside else _default(item)
        if may_be_none and value is None and factory is not inside:
            optional[item.name] = nested.defaults
            defaults[item.name] = None
        else:
            defaults[item.name] = nested.defaults | _said(inside, value, nested.defaults)
    return Declared(defaults, optional, frozenset(open_keys))


def sentences(cls: type) -> dict[str, str]:
    """The dotted keys of `cls` and what the string below each field says in its source; "" where there is none."""
    found: dict[str, str] = {}
    hints = typing.get_type_hints(cls)
    said = _strings_below_fields(cls)
    for item in dataclasses.fields(cls):
        inside, _ = _nested(hints[item.name])
        if inside is None:
            found[item.name] = said.get(item.name, "")
        else:
            found |= {f"{item.name}.{key}": text for key, text in sentences(inside).items()}
    return found


def flat(tree: Mapping[str, Any], stop: frozenset[str] = frozenset(), prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a nested mapping and their values. stop: keys whose mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in stop:
            found |= flat(value, stop, f"{key}.")
        else:
            found[key] = value
    return found


def _said(cls: type, instance: Any, plain: Mapping[str, Any]) -> dict[str, Any]:
    """What a default instance has beside its class's own defaults: `OptimizerConfig(lr=5e-6)`."""
    if instance is None or any(_default(item) is dataclasses.MISSING for item in dataclasses.fields(cls)):
        return {}
    fresh = cls()
    said: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        value, usual = getattr(instance, item.name), getattr(fresh, item.name)
        if value == usual:
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            said[item.name] = {**plain[item.name], **_said(type(value), value, plain[item.name])}
        else:
            said[item.name] = _plain(value)
    return said


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return item.default


def _plain(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return "???"  # OmegaConf's word for what must be set
    if isinstance(value, enum.Enum):
        return value.value
    return copy.deepcopy(list(value) if isinstance(value, tuple) else value)


def _nested(kind: Any) -> tuple[type | None, bool]:
    """The dataclass that a field holds, and whether it may be None."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = typing.get_args(kind) if union else (kind,)
    for one in kinds:
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            return one, type(None) in kinds
    return None, False


def _is_mapping(kind: Any) -> bool:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    kinds = typing.get_args(kind) if union else (kind,)
    return any((typing.get_origin(one) or one) is dict for one in kinds)


def _strings_below_fields(cls: type) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        body = _classes(one.__module__).get(one.__qualname__) if dataclasses.is_dataclass(one) else None
        for field, after in itertools.pairwise(body.body if body is not None else []):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[field.target.id] = " ".join(str(after.value.value).split())
    return found


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes that stand in a module's source, by name; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
