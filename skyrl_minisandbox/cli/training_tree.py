"""`minisandbox train`'s tree: SkyRL's configuration as its dataclasses declare it, ours beside it, recipes over both.

    data, trainer, generator, environment   SkyRL's keys, of the version that is installed
    tasks, images, …, training              ours; SkyRL's own command has them at `environment.skyrl_gym.minisandbox`
    model, experiment                       groups that set any of them

What the user did not set goes to SkyRL as not set, so that it derives what it derives (`declared.py` says why).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from skyrl_minisandbox.cli.tree import OPEN, Tree, compose, groups, resolved
from skyrl_minisandbox.config import EnvConfig
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.training.declared import Declared, declared, flat

MODES = ("sync", "async", "generate")
OWN = ("mode", "policy")
"""Keys of the tree that are neither SkyRL's nor the Env's."""
ALIASES = {"seed": "trainer.seed", "environment.skyrl_gym.minisandbox": ""}
"""Keys that stand for others: `seed=1` as in every verb, and ours as SkyRL's own command names them."""
PLACES = {"trainer.ckpt_path": "checkpoints", "trainer.export_path": "exports", "trainer.log_path": "logs"}
"""What SkyRL writes below the home directory and /tmp, where two trainings meet; with `out` it goes below that."""


NEEDED = re.compile(r"\$\{needed: *(.*)\}")
"""A value that a recipe cannot know: `${needed:what it is}`."""


class Training(NamedTuple):
    """One training's configuration.

    mode: see `training.entrypoint.run`. dotlist: as SkyRL's own command takes it. tree: the whole tree as plain data.
    """

    mode: str
    dotlist: list[str]
    tree: dict[str, Any]


def training_tree(*more: str) -> Tree:
    """The tree, its SkyRL part known to Hydra. more: directories with further choices. Needs SkyRL."""
    from hydra.core.config_store import ConfigStore

    skyrl = _skyrl()
    ConfigStore.instance().store(name="skyrl", node=skyrl.defaults)
    return Tree(
        "train",
        groups(*more, training=True),
        open=frozenset(OPEN) | skyrl.open,
        optional=skyrl.optional,
        more=more,
    )


def load_training(overrides: Sequence[str], tree: Tree) -> Training:
    """Compose. Raises `InputError`; what only the trainer's own checks find is found by the entry point."""
    from omegaconf import OmegaConf

    composed = compose([spelled(one) for one in overrides], tree)
    _expect_needed(OmegaConf.to_container(composed))
    if composed.out and "://" not in composed.out:
        composed.out = os.path.abspath(os.path.expanduser(composed.out))  # the trainer's directory is Ray's
    plain = resolved(composed)
    skyrl = _skyrl()
    known = [*skyrl.defaults, *(item.name for item in dataclasses.fields(EnvConfig)), *OWN]
    for key in plain:  # Hydra takes whatever a file of the user's brings
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"
            raise InputError(f"unknown key `{key}` in one of the files that were chosen", hint=hint)
    mode, policy = plain["mode"], plain["policy"]["name"]
    if mode not in MODES and "." not in str(mode):
        raise InputError(
            f"unknown `mode={mode}`", hint=f"one of {', '.join(MODES)}, or a dotted path to a subclass of Experiment"
        )
    if policy != "inverted":
        raise InputError(
            f"`policy={policy}` cannot answer in training: the model that is trained does",
            hint="leave `policy` out; minisandbox rollout takes it",
        )
    _place(plain, skyrl)
    return Training(mode, _dotlist(plain, skyrl), plain)


def _expect_needed(unresolved: Any) -> None:
    """Raises `InputError` for what a recipe wants to be told. `???` would not do: over a default it changes nothing."""
    needed = {key: NEEDED.fullmatch(str(value)) for key, value in flat(unresolved).items()}
    missing = {key: found[1] for key, found in needed.items() if found}
    missing |= {key: "" for key, value in flat(unresolved).items() if value == "???"}
    if missing:
        key, why = next(iter(missing.items()))
        hint = " ".join(f"{key}=…" for key in missing) + " on the command line"
        raise InputError(f"`{key}` is not set" + (f": {why}" if why else ""), hint=hint)


def spelled(override: str) -> str:
    """The override with the key that the tree has."""
    key, equals, value = override.partition("=")
    for alias, name in ALIASES.items():
        if key == alias and name:
            return f"{name}={value}"
        if not name and key.startswith(f"{alias}."):
            return key.removeprefix(f"{alias}.") + equals + value
    return override


def _skyrl() -> Declared:
    from skyrl_minisandbox.training.config import OURS, TrainConfig

    return declared(TrainConfig, without=OURS)


def _place(plain: dict[str, Any], skyrl: Declared) -> None:
    if not plain["out"]:
        return
    for key, name in PLACES.items():
        section, _, last = key.rpartition(".")
        if plain[section][last] == skyrl.defaults[section][last]:
            plain[section][last] = f"{plain['out']}/{name}"


def _dotlist(plain: dict[str, Any], skyrl: Declared) -> list[str]:
    """Values are JSON, which the dotlist reads as they are meant: `"null"` is a text and `null` is none."""
    from skyrl_minisandbox.training.config import OURS

    whole = skyrl.open | frozenset(skyrl.optional)
    usual = flat(skyrl.defaults, whole)
    set_now = flat({key: plain[key] for key in plain if key in skyrl.defaults}, whole)
    lines = [_line(key, value) for key, value in set_now.items() if key not in usual or value != usual[key]]
    for item in dataclasses.fields(EnvConfig):
        lines.append(_line(f"{OURS}.{item.name}", plain[item.name]))
    return lines


def _line(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
