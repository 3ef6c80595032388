"""The Hydra tree: where it lies, how overrides become a configuration, and what its keys mean.

It is composed through Hydra's API and not `hydra.main`, so that Hydra makes no directories and no log files.
Two trees share the groups: `config.yaml` is what every verb but `train` has, `train.yaml` adds SkyRL's whole
configuration and the groups that set it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training.declared import flat

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

PLUGINS = ("tasks", "scaffold", "policy", "reward")
"""Groups whose choice may also be a dotted path, by the one plug-in rule."""
OPEN = ("scaffold.options", "reward.options")
"""Keys below which all is the plug-in's own and not ours to know."""
TRAINING = ("model", "experiment")
"""Groups that set SkyRL's keys, so only `train` has them."""


class Key(NamedTuple):
    """One key of the tree as its YAML file tells it."""

    name: str
    default: str
    sentence: str


class Tree(NamedTuple):
    """Which tree is composed, and what the command line may say of it.

    primary: the file that names the groups. groups: their choices. open: dotted keys below which anything may stand.
    optional: dotted keys that are null unless something below them is set, with the keys that may be.
    more: directories with further choices, laid out as ours.
    """

    primary: str
    groups: Mapping[str, list[str]]
    open: frozenset[str] = frozenset(OPEN)
    optional: Mapping[str, Mapping[str, Any]] = {}
    more: tuple[str, ...] = ()


class Overrides(NamedTuple):
    """A command line as Hydra takes it. names: the keys that must exist. open: as in `Tree`."""

    choices: list[str]
    values: list[str]
    names: list[str]
    open: frozenset[str]


def config_directory() -> Path:
    """The tree of the installed package, or of the checkout."""
    package = Path(__file__).resolve().parent.parent
    for path in (package / "configs", package.parent / "configs"):
        if (path / "config.yaml").is_file():
            return path
    raise InputError(f"no configs/ beside {package}", hint="pip install --force-reinstall skyrl-minisandbox")


def groups(*more: str, training: bool = False) -> dict[str, list[str]]:
    """Every group and its choices. more: directories with further ones. training: those of `train` too."""
    found: dict[str, set[str]] = {}
    for root in (config_directory(), *map(Path, more)):
        for path in filter(Path.is_dir, root.iterdir()):
            if training or path.name not in TRAINING:
                found.setdefault(path.name, set()).update(choice.stem for choice in path.glob("*.yaml"))
    return {name: sorted(found[name]) for name in sorted(found)}


def keys(path: Path) -> Iterator[Key]:
    """The keys of one YAML file, dotted, with the comment above each joined to one line."""
    comment: list[str] = []
    above: list[tuple[int, str]] = []  # indentation and name of the sections that a line stands in
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        found = re.match(r"( *)([a-z_]+): *(.*)$", line)
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if found and found[2] != "defaults":
            indent = len(found[1])
            above = [one for one in above if one[0] < indent]
            after = next((one for one in lines[number + 1 :] if one.strip() and not one.lstrip().startswith("#")), "")
            if not found[3] and len(after) - len(after.lstrip()) > indent:
                above.append((indent, found[2]))
            else:
                name = ".".join([*(one for _, one in above), found[2]])
                yield Key(name, found[3], " ".join(comment))
        comment = []


def headline(path: Path) -> str:
    """The first sentence of a YAML file: what choosing it means."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    return " ".join(lines)


def compose(overrides: Sequence[str], tree: Tree | None = None) -> DictConfig:
    """The configuration that these overrides make. Raises `InputError` that names the key and near ones."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = tree or Tree("config", groups())
    said = translate(overrides, tree)
    more = search_path(tree)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_directory()), version_base="1.3"):
        try:
            plain: Any = OmegaConf.to_container(hydra_compose(tree.primary, more + said.choices))
            for key in said.names:
                check_key(key, plain, tree, said.open)
            composed: DictConfig = hydra_compose(tree.primary, more + said.choices + said.values)
            return composed
        except (HydraException, OmegaConfBaseException) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(
                f"these overrides do not fit together: {' '.join(overrides)}: {reason}",
                hint=every_key(tree),
            ) from error


def resolved(composed: DictConfig) -> Any:
    """It as plain data. Raises `InputError` for a reference that leads nowhere."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"cannot resolve the configuration: {str(error).splitlines()[0]}") from error


def search_path(tree: Tree) -> list[str]:
    """The override that shows Hydra the tree's further directories."""
    return [f"hydra.searchpath=[{','.join(f'file://{path}' for path in tree.more)}]"] if tree.more else []


def translate(overrides: Sequence[str], tree: Tree, *, many: bool = False) -> Overrides:
    """The command line as Hydra takes it: `++` where a key is the plug-in's own, a dotted path as its name.

    many: a value may be several (`a,b`), for a sweep. Raises `InputError`.
    """
    said = Overrides([], [], [], tree.open)
    for text in overrides:
        one = _parse(text, tree, many)
        group, value = one.key_or_group, text.partition("=")[2]
        asked = [str(each) for each in one.sweep_string_iterator()] if one.is_sweep_override() else [str(one.value())]
        if group not in tree.groups:
            said.values.append(text)
            said.names.append(group)
        elif group in PLUGINS and all("." in each for each in asked):  # scaffold=my.module.Scaffold
            said.values.append(f"{group}.name={value}")
            if group == "policy":
                said.choices.append("policy=plugin")
                said = said._replace(open=said.open | {"policy"})
        elif group == "model" and all("/" in each for each in asked):  # a directory, or a name of a model hub
            said.values.append(f"trainer.policy.model.path={value}")
        else:
            for each in asked:
                if each not in tree.groups[group]:
                    raise _unknown_choice(group, each, tree.groups)
            said.choices.append(text)
    loose = said.open | set(tree.optional)
    values = [f"++{text}" if _within(text.partition("=")[0], loose) else text for text in said.values]
    return said._replace(values=values)


def _within(key: str, places: frozenset[str] | set[str]) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _parse(text: str, tree: Tree, many: bool) -> Override:
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
    if one.is_sweep_override() and not many:
        hint = f"a list is written {one.key_or_group}=[{text.partition('=')[2]}]"
        hint += "; --multirun has a run for each" if tree.primary == "train" else ""
        raise InputError(f"`{text}` has several values; one run has one", hint=hint)
    return one


def _unknown_choice(group: str, choice: str, known: Mapping[str, list[str]]) -> InputError:
    near = difflib.get_close_matches(choice, known[group], n=1)
    hint = f"did you mean `{group}={near[0]}`? " if near else ""
    hint += f"choices: {', '.join(known[group])}"
    if group in PLUGINS:
        hint += "; or a dotted path `package.module.Name`"
    if group == "model":
        hint += "; or a directory, or a name of a model hub with its `/`"
    return InputError(f"unknown choice `{group}={choice}`", hint=hint)


def check_key(key: str, plain: dict[str, Any], tree: Tree, open_keys: frozenset[str] = frozenset()) -> None:
    """Raises `InputError` where `key` is no key of the tree, or one with keys of its own."""
    if _within(key, open_keys):
        return
    whole: Any = _with_optional(plain, tree.optional)
    node = whole
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            every = list(flat(whole))
            near = difflib.get_close_matches(key, every, n=3, cutoff=0.6)
            near += [one for one in every if one.rpartition(".")[2] == key.rpartition(".")[2] and one not in near][:3]
            hint = f"did you mean {' or '.join(f'`{one}`' for one in near)}? " if near else ""
            raise InputError(f"unknown key `{key}`", hint=hint + every_key(tree))
        node = node[part]
    if isinstance(node, dict) and node and key not in tree.optional:
        raise InputError(
            f"`{key}` has keys of its own: {', '.join(node)}",
            hint=f"set one of them: {key}.{next(iter(node))}=…",
        )


def every_key(tree: Tree) -> str:
    """The hint where to find all keys."""
    return f"minisandbox {'train' if tree.primary == 'train' else 'VERB'} --help lists every key with its default"


def _with_optional(plain: dict[str, Any], optional: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """`plain` with the keys that may be set where it has null."""
    shown = dict(plain)
    for key, inside in optional.items():
        name, _, rest = key.partition(".")
        if rest:
            shown[name] = _with_optional(shown.get(name) or {}, {rest: inside})
        else:
            shown[name] = {**inside, **(shown.get(name) or {})}
    return shown
