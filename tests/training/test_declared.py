"""Declared defaults are what stands in the source, not what an instance has made of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from skyrl_minisandbox.training.declared import declared, flat, sentences


@dataclass
class Leaf:
    size: int = 1
    """How big
    it is."""
    twice: int | None = None
    extra: dict[str, Any] = field(default_factory=lambda: {"a": 1})

    def __post_init__(self) -> None:
        if self.twice is None:
            self.twice = 2 * self.size


@dataclass
class Needy:
    name: str
    """What must be said."""


@dataclass
class Branch:
    own: Leaf = field(default_factory=Leaf)
    other: Leaf = field(default_factory=lambda: Leaf(size=5))
    maybe: Optional[Leaf] = None  # noqa: UP045 as SkyRL writes it
    needy: Needy | None = None
    words: list[str] = field(default_factory=lambda: ["x"])


@dataclass
class Tree:
    branch: Branch = field(default_factory=Branch)
    epochs: int = 3


def test_a_derived_value_is_left_to_be_derived() -> None:
    assert declared(Tree).defaults["branch"]["own"] == {"size": 1, "twice": None, "extra": {"a": 1}}


def test_what_a_default_instance_sets_is_kept_and_what_it_derives_is_not() -> None:
    # `twice` is 10 in that instance, and 2 in a fresh one: nothing tells it from a value that was set.
    assert declared(Tree).defaults["branch"]["other"]["size"] == 5


def test_an_optional_section_is_none_and_its_keys_are_known() -> None:
    found = declared(Tree)
    assert found.defaults["branch"]["maybe"] is None and found.defaults["branch"]["needy"] is None
    assert sorted(found.optional["branch.maybe"]) == ["extra", "size", "twice"]
    assert found.optional["branch.needy"] == {"name": "???"}


def test_a_mapping_is_open_wherever_it_stands() -> None:
    assert declared(Tree).open == {"branch.own.extra", "branch.other.extra", "branch.maybe.extra"}


def test_a_section_can_be_left_out() -> None:
    assert sorted(declared(Tree, without="branch.own").defaults["branch"]) == ["maybe", "needy", "other", "words"]


def test_defaults_are_copies() -> None:
    declared(Tree).defaults["branch"]["words"].append("y")
    assert declared(Tree).defaults["branch"]["words"] == ["x"]


def test_sentences_are_the_strings_below_the_fields() -> None:
    said = sentences(Tree)
    assert said["branch.own.size"] == said["branch.maybe.size"] == "How big it is."
    assert said["branch.own.twice"] == said["epochs"] == ""
    assert said["branch.needy.name"] == "What must be said."


def test_flat_stops_where_a_mapping_is_a_value() -> None:
    tree = dataclasses.asdict(Leaf())
    assert flat({"leaf": tree}, frozenset({"leaf.extra"})) == {"leaf.size": 1, "leaf.twice": 2, "leaf.extra": {"a": 1}}
    assert flat({"leaf": tree})["leaf.extra.a"] == 1
