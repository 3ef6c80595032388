"""The config: what is taken, and what a mistake is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from skyrl_minisandbox.config import Config, EnvConfig, ImagesConfig, make_config
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.sandbox.spec import Limits


@dataclasses.dataclass
class Foreign:
    """As SkyRL has it: a dataclass that is not ours, with ours or plain things in it."""

    scaffold: Any
    cluster: Any


@pytest.mark.parametrize(
    "given",
    [
        {"scaffold": {"name": "gold"}, "cluster": {"kind": "local"}},
        {"scaffold": "gold", "cluster": "local"},
        OmegaConf.create({"scaffold": {"name": "gold"}, "cluster": {"kind": "local"}}),
        Foreign("gold", {"kind": "local"}),
    ],
)
def test_what_skyrl_hydra_and_plain_calls_hand_over_is_the_same_config(given: Any) -> None:
    config = make_config(given)
    assert (config.scaffold.name, config.cluster.kind) == ("gold", "local")
    assert make_config(config) is config


def test_no_config_at_all_is_the_default() -> None:
    assert make_config(None) == make_config({}) == EnvConfig()


def test_the_sandbox_is_that_of_the_sandbox_room_by_default() -> None:
    assert EnvConfig().sandbox.limits() == Limits()


def test_every_limit_of_a_sandbox_has_its_key() -> None:
    given = {
        "memory": "1GiB", "processes": 7, "disk": "1M", "output": "2K", "open_files": 99, "inodes": 98, "core": "5",
        "cpu_weight": 3, "command_seconds": 9,
    }
    limits = make_config({"sandbox": given}).sandbox.limits()
    assert dataclasses.asdict(limits) == {
        "memory": 1 << 30, "processes": 7, "disk": 1 << 20, "output": 2048, "open_files": 99, "inodes": 98, "core": 5,
        "cpu_weight": 3, "command_seconds": 9.0,
    }


def test_more_disk_than_memory_needs_an_upper_on_disk() -> None:
    given = {"memory": "1GiB", "disk": "8GiB"}
    with pytest.raises(InputError, match=r"must be below `sandbox\.memory=1GiB`") as raised:
        make_config({"sandbox": given})
    assert raised.value.hint == "sandbox.upper=disk, or more memory"
    assert make_config({"sandbox": {**given, "upper": "disk"}}).sandbox.limits().disk == 8 << 30


def test_paths_are_absolute_and_stores_elsewhere_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = make_config({"images": {"store": "store", "cache": "~/cache"}, "out": "runs/1"})
    assert config.images.store == "/store"
    assert config.images.cache == str(Path.home() / "cache")
    assert config.out == "/runs/1"
    assert ImagesConfig(store="oci://host/name").store == "oci://host/name"


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [
        ({"scafold": "gold"}, "unknown key `scafold`", "did you mean `scaffold`?"),
        ({"tasks": {"idz": []}}, "unknown key `tasks.idz`", "did you mean `ids`?"),
        ({"rollout": {"step": "long"}}, "`rollout.step=long` must be a number", ""),
        ({"rollout": {"step": 0}}, "`rollout.step=0.0` must be above 0", ""),
        ({"rollout": {"step": float("nan")}}, "`rollout.step=nan` must be above 0", ""),
        ({"rollout": {"turns": -1}}, "`rollout.turns=-1` must be 0 (no bound) or above", ""),
        ({"images": 3}, "`images` must have keys of its own, but is 3", ""),
        ({"sandbox": {"memory": "lots"}}, "`sandbox.memory=lots` is not a size", "`sandbox.memory=4GiB`"),
        ({"sandbox": {"inode": 3}}, "unknown key `sandbox.inode`", "did you mean `inodes`?"),
        ({"sandbox": {"upper": "ram"}}, "`sandbox.upper=ram` must be `tmpfs` or `disk`", ""),
        ({"sandbox": {"pool": -1}}, "`sandbox.pool=-1` must be from 0 to 64", ""),
        ({"sandbox": {"cpu_weight": 0}}, "sandbox.cpu_weight is 0; it must be from 1 to 10000", ""),
        ({"sandbox": {"core": "big"}}, "`sandbox.core=big` is not a size", "`sandbox.core=4GiB`"),
        ({"cluster": "slurm"}, "`cluster.kind=slurm` must be `ray` or `local`", ""),
        ({"cluster": {"workers": True}}, "`cluster.workers=True` must be a whole number", ""),
        ({"grading": "kind"}, "`grading.mode=kind` must be one of `protected`, `official`", ""),
    ],
)
def test_a_mistake_names_the_key_and_the_way_out(given: Any, message: str, hint: str) -> None:
    with pytest.raises(InputError) as raised:
        make_config(given)
    assert raised.value.message == message
    assert hint in raised.value.hint


def sections(cls: type[Config]) -> list[type[Config]]:
    found = [cls]
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and issubclass(field.type, Config):
            found += sections(field.type)
    return found


@pytest.mark.parametrize("section", sections(EnvConfig), ids=lambda cls: cls.__name__)
def test_every_key_has_its_sentence(section: type[Config]) -> None:
    own = [f.name for f in dataclasses.fields(section) if not isinstance(f.type, type) or f.type in (str, int, float)]
    assert [name for name in own if f"{name}:" not in (section.__doc__ or "")] == []


def test_the_types_are_real_types_as_skyrl_needs_them() -> None:
    assert all(not isinstance(f.type, str) for cls in sections(EnvConfig) for f in dataclasses.fields(cls))
