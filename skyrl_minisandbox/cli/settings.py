"""What a verb works with: the Env's configuration and the few keys that only the command line has."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.tree import compose, resolved
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.errors import InputError

OWN = ("policy", "seed", "parallel", "builds")
"""Keys of the tree that are no part of `EnvConfig`."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """One command's configuration.

    env: what the Env gets. policy: `name` and the keyword arguments of the driver's policy.
    parallel: rollouts in flight, 0 for the cluster's slots. builds: images built at once.
    tree: the same as plain data, for `config.yaml`.
    """

    env: EnvConfig
    policy: dict[str, Any]
    seed: int
    parallel: int
    builds: int
    tree: dict[str, Any]


def load_settings(overrides: Sequence[str]) -> Settings:
    """Compose and check the configuration. Raises `InputError`."""
    from omegaconf import OmegaConf

    composed = compose(overrides)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise InputError(
            f"`{missing[0]}` is not set",
            hint=" ".join(f"{key}=…" for key in missing) + " on the command line",
        )
    tree = resolved(composed)
    if tree["policy"]["name"] == "inverted":
        raise InputError(
            "`policy=inverted` is the model that `minisandbox train` trains; here it has none to ask",
            hint="policy=script, or policy=openai with a model that is served",
        )
    env = make_config({key: value for key, value in tree.items() if key not in OWN})
    numbers = {key: _count(tree[key], key) for key in ("seed", "parallel", "builds")}
    if numbers["builds"] == 0:
        raise InputError("`builds=0` must be above 0", hint="builds=1 builds one image after the other")
    return Settings(env=env, policy=dict(tree["policy"]), tree=tree, **numbers)


def _count(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"`{key}={value}` must be a whole number, 0 or above")
    return value


def run_directory(out: str) -> Path:
    """`out`, or `runs/<date>-<time>` below the working directory, with a number where that exists."""
    if out:
        return Path(out)
    base = Path.cwd() / "runs" / time.strftime("%Y%m%d-%H%M%S")
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path
