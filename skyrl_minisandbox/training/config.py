"""SkyRL's whole configuration with ours at `environment.skyrl_gym.minisandbox`. Imports SkyRL, neither Ray nor torch.

The dataclasses are SkyRL's own with one field more, so its dotlist, its derived defaults and its trainer take them
as they are. What it lets pass is refused here: a mistyped key by name with its neighbours, a text for a number.

No `from __future__ import annotations` here: SkyRL builds nested dataclasses from `field.type`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from skyrl.train import config as skyrl
from skyrl.train.config.config import build_nested_dataclass

from skyrl_minisandbox.config import EnvConfig, build
from skyrl_minisandbox.errors import InputError

OURS = "environment.skyrl_gym.minisandbox"
"""Where an `EnvConfig` stands in SkyRL's configuration: `environment.skyrl_gym.<env_class>`."""

_WORDS = {
    f"{OURS}.{item.name}": f"{OURS}.{item.name}.{dataclasses.fields(item.type)[0].name}"
    for item in dataclasses.fields(EnvConfig)
    if dataclasses.is_dataclass(item.type) and dataclasses.fields(item.type)[0].name in ("name", "kind", "mode")
}
"""Groups of ours for which a word may stand, and the key that it is the value of."""

REFUSALS = (ValueError, AssertionError, NotImplementedError, TypeError)
"""What SkyRL raises for a configuration that cannot be."""


@dataclass
class GymConfig(skyrl.SkyRLGymConfig):  # type: ignore[misc]  # SkyRL is not installed where types are checked
    """SkyRL's section of its environments, with ours."""

    minisandbox: EnvConfig = field(default_factory=EnvConfig)


@dataclass
class EnvironmentConfig(skyrl.EnvironmentConfig):  # type: ignore[misc]
    """Rows without an `env_class` of their own are ours."""

    env_class: str = "minisandbox"
    skyrl_gym: GymConfig = field(default_factory=GymConfig)


@dataclass
class TrainConfig(skyrl.SkyRLTrainConfig):  # type: ignore[misc]
    """All that a training needs."""

    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)

    @property
    def ours(self) -> EnvConfig:
        """Our section."""
        return self.environment.skyrl_gym.minisandbox

    @classmethod
    def from_dict_config(cls, cfg: Any) -> "TrainConfig":
        """From nested keys: a DictConfig or a dict. Keys that are left out have SkyRL's defaults, derived ones too.

        In our section a word may stand for a group, as in Hydra: `scaffold: gold`. Raises `InputError`.
        """
        raw = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        raw = _checked(cls, raw, "", list(_paths(cls, "")))
        built: TrainConfig = build_nested_dataclass(cls, raw)
        return built


def make_train_config(given: Any) -> TrainConfig:
    """The configuration from a dotlist (`["trainer.epochs=3", …]`), nested keys, or one that is made already.

    Raises `InputError`, also for what SkyRL refuses.
    """
    if isinstance(given, TrainConfig):
        return given
    try:
        if isinstance(given, Sequence):
            return _from_dotlist(list(given))
        return TrainConfig.from_dict_config(given)
    except (*REFUSALS, OmegaConfBaseException) as error:
        raise InputError(f"SkyRL refuses the configuration: {error}") from error


def _from_dotlist(given: list[str]) -> TrainConfig:
    for one in given:
        key, equals, _ = one.partition("=")
        if not equals or not key or key.startswith("-"):
            raise InputError(f"`{one}` is not `key=value`", hint="trainer.epochs=3 environment.env_class=minisandbox")
        if key.startswith("+"):
            raise InputError(f"`{key}`: keys need no `+` here", hint=one.lstrip("+"))
    # A dotlist keeps one of `scaffold=x` and `scaffold.options.y=1`, whichever comes last, and says nothing.
    pairs = [one.split("=", 1) for one in given]
    spelled = [(key if value.startswith("{") else _WORDS.get(key, key), value) for key, value in pairs]
    config: TrainConfig = TrainConfig.from_cli_overrides(["=".join(pair) for pair in spelled])
    return config


def _checked(cls: type, raw: Any, path: str, known: list[str]) -> Any:
    """`raw` with every key known and every number a number. Our section is built, short forms and all."""
    if isinstance(raw, cls):
        return raw
    if not isinstance(raw, Mapping):
        raise InputError(f"`{path or 'the configuration'}` must have keys of its own, but is `{raw}`")
    kinds = {item.name: item.type for item in dataclasses.fields(cls)}
    found: dict[str, Any] = {}
    for key, value in raw.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in kinds:
            raise InputError(f"unknown key `{where}`", hint=_neighbours(where, list(kinds), known))
        nested = _nested(kinds[key])
        if where == OURS:
            found[key] = build(EnvConfig, value, where)
        elif nested is not None and not (value is None and nested is not kinds[key]):
            found[key] = _checked(nested, value, where, known)
        else:
            found[key] = _leaf(value, kinds[key], where)
    return found


def _leaf(value: Any, kind: Any, where: str) -> Any:
    """`value` as SkyRL's annotation has it, where that is a number, a bool or a list of texts; else untouched."""
    kinds = [one for one in typing.get_args(kind) if one is not type(None)] if _is_union(kind) else [kind]
    if value is None or len(kinds) != 1:
        return value
    kind = kinds[0]
    if typing.get_origin(kind) is list and isinstance(value, str):
        return [value]  # SkyRL would take it for a list of letters
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int and number and float(value).is_integer():
        return int(value)  # 1e6
    if isinstance(kind, type) and issubclass(kind, Enum):
        names = [str(one.value) for one in kind]
        if not isinstance(value, kind) and value not in names:
            raise InputError(f"`{where}={value}` must be one of {', '.join(names)}")
    right = {int: False, float: number, bool: isinstance(value, bool)}.get(kind, True)
    if not right:
        said = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"`{where}={value}` must be {said}")
    return value


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _nested(kind: Any) -> type | None:
    """The dataclass that a field holds, if it holds one: `X` or `Optional[X]`."""
    for one in typing.get_args(kind) if _is_union(kind) else (kind,):
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            return one
    return None


def _paths(cls: type, path: str) -> Iterator[str]:
    """Every key of a tree of dataclasses, dotted."""
    for item in dataclasses.fields(cls):
        where = f"{path}.{item.name}" if path else item.name
        yield where
        nested = _nested(item.type)
        if nested is not None:
            yield from _paths(nested, where)


def _neighbours(where: str, here: list[str], known: list[str]) -> str:
    """What may have been meant: nearly that name here, or that name elsewhere; else all that is known here."""
    parent, _, name = where.rpartition(".")
    near = difflib.get_close_matches(name, here, n=3)
    meant = [f"{parent}.{one}" if parent else one for one in near]
    meant += [one for one in known if one.rpartition(".")[2] == name and one not in meant][:3]
    if meant:
        return f"did you mean {' or '.join(f'`{one}`' for one in meant)}?"
    return f"known here: {', '.join(here)}"
