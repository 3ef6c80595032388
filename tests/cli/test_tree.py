"""The Hydra tree: equal to the dataclasses, documented, and it explains what it does not understand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cli.help import configuration_page
from skyrl_minisandbox.cli.settings import OWN, load_settings
from skyrl_minisandbox.cli.tree import compose, config_directory, groups, headline, keys
from skyrl_minisandbox.config import EnvConfig, make_config
from skyrl_minisandbox.errors import InputError
from tests.support import REPOSITORY

FILES = sorted(config_directory().rglob("*.yaml"))


def test_the_tree_s_defaults_are_the_dataclasses_defaults() -> None:
    assert load_settings([]).env == EnvConfig()


def test_the_tree_has_exactly_the_dataclasses_keys() -> None:
    def names(config: Any, prefix: str = "") -> set[str]:
        found = set()
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            nested = dataclasses.is_dataclass(value)
            found |= names(value, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}"}
        return found

    def leaves(tree: Any, prefix: str = "") -> set[str]:
        found = set()
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}"}
        return found

    tree = load_settings([]).tree
    assert leaves({key: value for key, value in tree.items() if key not in OWN}) == names(EnvConfig())


@pytest.mark.parametrize("group,choice", [(g, c) for g, cs in groups().items() for c in cs])
def test_every_choice_composes(group: str, choice: str) -> None:
    composed = compose([f"{group}={choice}"])
    if group != "policy":
        make_config({key: value for key, value in composed.items() if key not in OWN})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(config_directory())))
def test_every_key_has_a_sentence(path: Path) -> None:
    assert headline(path)
    for key in keys(path):
        if key.name not in ("name", "kind"):
            assert key.sentence.endswith("."), key.name


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_settings(["scaffold=gold", "tasks.ids=[a]"])
    assert list(tmp_path.iterdir()) == []


def test_the_surface_s_keys_do_what_they_say(tmp_path: Path) -> None:
    settings = load_settings(
        [
            f"out={tmp_path}/run",
            f"images.store={tmp_path}/s",
            f"images.cache={tmp_path}/c",
            "images.pythons=[/opt/pythons]",
            "tasks=swebench",
            "tasks.ids=[django__django-1,b]",
            "tasks.repos=/repos",
            "cluster=local",
            "cluster.nodes=3",
            "scaffold=gold",
            "policy=openai",
            "policy.base_url=http://localhost:1/v1",
            "policy.model=m",
            "reward=binary",
            "grading=official",
            "seed=7",
        ]
    )
    env = settings.env
    assert (env.out, env.images.store, env.images.cache) == tuple(f"{tmp_path}/{n}" for n in ("run", "s", "c"))
    assert env.images.pythons == ["/opt/pythons"]
    assert (env.tasks.name, env.tasks.ids, env.tasks.repos) == ("swebench", ["django__django-1", "b"], "/repos")
    assert (env.cluster.kind, env.cluster.nodes) == ("local", 3)
    assert (env.scaffold.name, env.reward.name, env.grading.mode, settings.seed) == ("gold", "binary", "official", 7)
    assert settings.policy["base_url"] == "http://localhost:1/v1"


def test_the_default_store_and_cache_follow_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    images = load_settings([]).env.images
    assert images.store == "/elsewhere/skyrl-minisandbox/store"
    assert images.cache == "/elsewhere/skyrl-minisandbox/cache"


def test_a_dotted_path_may_stand_where_a_choice_does() -> None:
    settings = load_settings(["scaffold=my.agents.Mine", "scaffold.options.depth=3", "policy=my.Policy", "policy.x=a"])
    assert settings.env.scaffold.name == "my.agents.Mine"
    assert settings.env.scaffold.options == {"depth": 3}
    assert settings.policy == {"name": "my.Policy", "x": "a"}


ALL_KEYS = "minisandbox VERB --help lists every key with its default"


@pytest.mark.parametrize(
    "overrides,message,hint",
    [
        (
            ["tasks.idz=[a]"],
            "unknown key `tasks.idz`",
            f"did you mean `tasks.ids` or `tasks.validation` or `tasks.path`? {ALL_KEYS}",
        ),
        (["nodes=2"], "unknown key `nodes`", f"did you mean `cluster.nodes`? {ALL_KEYS}"),
        (["quux=1"], "unknown key `quux`", ALL_KEYS),
        (
            ["scaffold=golf"],
            "unknown choice `scaffold=golf`",
            "did you mean `scaffold=gold`? choices: empty, gold, menu, mini, wrong; "
            "or a dotted path `package.module.Name`",
        ),
        (["cluster=yarn"], "unknown choice `cluster=yarn`", "choices: local, ray"),
        (["+seed=1"], "cannot read `+seed=1`", "write key=value, without `+`, `~` or `@`"),
        (["seed=1,2"], "`seed=1,2` has several values; one run has one", "a list is written seed=[1,2]"),
        (
            ["policy=openai", "policy.model=m"],
            "`policy.base_url` is not set",
            "policy.base_url=… on the command line",
        ),
        (["seed=-1"], "`seed=-1` must be a whole number, 0 or above", ""),
        (["cluster.nodes=many"], "`cluster.nodes=many` must be a whole number", ""),
        (
            ["sandbox.memory=4Q"],
            "`sandbox.memory=4Q` is not a size",
            "write a number of bytes or `sandbox.memory=4GiB`",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_named_with_what_can(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        load_settings(overrides)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_the_page_in_docs_is_made_from_the_tree() -> None:
    page = REPOSITORY / "docs" / "configuration.md"
    assert page.read_text() == configuration_page(), "python -m skyrl_minisandbox.cli.help >docs/configuration.md"
