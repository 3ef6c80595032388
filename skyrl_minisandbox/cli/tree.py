"""The Hydra tree: where it lies, how overrides become a configuration, and what its keys mean.

It is composed through Hydra's API and not `hydra.main`, so that Hydra makes no directories and no log files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skyrl_minisandbox.errors import InputError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

PLUGINS = ("tasks", "scaffold", "policy", "reward")
"""Groups whose choice may also be a dotted path, by the one plug-in rule."""
OPEN = re.compile(r"(scaffold|reward)\.options\.")
"""Keys that are the plug-in's own and not ours to know."""


class Key(NamedTuple):
    """One key of the tree as its YAML file tells it."""

    name: str
    default: str
    sentence: str


def config_directory() -> Path:
    """The tree of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "configs", package.parent / "configs"):
        if (path / "config.yaml").is_file():
            return path
    raise InputError(f"no configs/ beside {package}", hint="pip install --force-reinstall skyrl-minisandbox")


def groups() -> dict[str, list[str]]:
    """Every group and its choices."""
    return {
        path.name: sorted(choice.stem for choice in path.glob("*.yaml"))
        for path in sorted(config_directory().iterdir())
        if path.is_dir()
    }


def keys(path: Path) -> Iterator[Key]:
    """The keys of one YAML file with the comment above each, joined to one line."""
    comment: list[str] = []
    for line in path.read_text().splitlines():
        found = re.match(r"([a-z_]+): *(.*)$", line)
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif found and found[1] != "defaults":
            yield Key(found[1], found[2], " ".join(comment))
            comment = []
        else:
            comment = []


def headline(path: Path) -> str:
    """The first sentence of a YAML file: what choosing it means."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these overrides make. Raises `InputError` that names the key and near ones."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = groups()
    parsed = [_parse(text) for text in overrides]
    choices, values, names = [], [], []
    own = OPEN
    for text, one in zip(overrides, parsed, strict=True):
        group, value = one.key_or_group, one.value()
        if group not in known:
            values.append(text)
            names.append(group)
        elif group in PLUGINS and "." in str(value):  # scaffold=my.module.Scaffold
            values.append(f"{group}.name={text.partition('=')[2]}")
            if group == "policy":
                choices.append("policy=plugin")
                own = re.compile(rf"{OPEN.pattern}|policy\.")
        elif value in known[group]:
            choices.append(text)
        else:
            raise _unknown_choice(group, str(value), known)
    values = [f"++{text}" if own.match(text) else text for text in values]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        plain = OmegaConf.to_container(hydra_compose("config", choices))
        for name in names:
            if not own.match(name):
                _check_key(name, plain)
        try:
            composed: DictConfig = hydra_compose("config", choices + values)
            return composed
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(
                f"these overrides do not fit together: {' '.join(overrides)}: {reason}",
                hint="minisandbox VERB --help lists every key with its default",
            ) from error


def _parse(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    try:
        one = OverridesParser.create().parse_override(text)
    except HydraException:
        raise InputError(
            f"cannot read `{text}`",
            hint="write key=value; put quotes inside quotes round what has spaces, commas or brackets: \"key='a, b'\"",
        ) from None
    if one.type is not OverrideType.CHANGE or one.package:
        raise InputError(f"cannot read `{text}`", hint="write key=value, without `+`, `~` or `@`")
    if one.is_sweep_override():
        raise InputError(
            f"`{text}` has several values; one run has one",
            hint=f"a list is written {one.key_or_group}=[{text.partition('=')[2]}]",
        )
    return one


def _unknown_choice(group: str, choice: str, known: dict[str, list[str]]) -> InputError:
    near = difflib.get_close_matches(choice, known[group], n=1)
    hint = f"did you mean `{group}={near[0]}`? " if near else ""
    hint += f"choices: {', '.join(known[group])}"
    if group in PLUGINS:
        hint += "; or a dotted path `package.module.Name`"
    return InputError(f"unknown choice `{group}={choice}`", hint=hint)


def _check_key(key: str, tree: Any) -> None:
    node = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            every = list(_flat(tree, ""))
            near = difflib.get_close_matches(key, every, n=3, cutoff=0.6)
            near += [one for one in every if one.rpartition(".")[2] == key and one not in near]
            hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
            raise InputError(
                f"unknown key `{key}`", hint=hint + "minisandbox VERB --help lists every key with its default"
            )
        node = node[part]
    if isinstance(node, dict) and node:
        raise InputError(
            f"`{key}` has keys of its own: {', '.join(node)}",
            hint=f"set one of them: {key}.{next(iter(node))}=…",
        )


def _flat(node: Any, prefix: str) -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
