"""A small repository in a real image, built in a second and without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.images import Cache, Store, build_image
from skyrl_minisandbox.images.cache import Checkout
from skyrl_minisandbox.images.recipe import Recipe
from skyrl_minisandbox.sandbox import Limits, Sandbox
from tests.rewards import channels
from tests.support import require

_GIT = "git -c user.name=test -c user.email=test@example.invalid"

RECIPE = Recipe(
    base="host",
    workdir="/srv",
    commands=(
        "mkdir -p pkg/deep tests && printf 'one\\ntwo\\nthree\\n' > keep.txt && printf 'a = 1\\n' > pkg/a.py "
        "&& printf 'b = 1\\n' > pkg/b.py && printf 'c = 1\\n' > pkg/deep/c.py && ln -s keep.txt link "
        "&& printf '\\000\\001binary' > data.bin && printf 'kept\\n' > pkg/tracked.pyc "
        "&& printf 'build/\\n' > .gitignore && printf 'old\\n' > tests/check.sh && git init -q . && git add -A -f "
        f"&& {_GIT} commit -q -m base",
    ),
)

Opener = Callable[[], Sandbox]


@contextlib.contextmanager
def sandboxes(
    recipe: Recipe, store_directory: Path, cache_directory: Path, *, disk: int = 64 << 20, memory: int = 512 << 20
) -> Iterator[Opener]:
    """Fresh sandboxes of that recipe's image, with little memory and disk; closed at the end."""
    require("userns", "overlay", "git")
    store, cache = Store(store_directory), Cache(cache_directory)
    image = build_image(recipe, store=store, cache=cache, pythons=(), progress=None)
    limits = Limits(memory=memory, disk=disk, processes=128)
    with cache.checkout(image, store) as checkout, fresh(checkout, limits) as make:
        yield make


@contextlib.contextmanager
def fresh(checkout: Checkout, limits: Limits) -> Iterator[Opener]:
    """Opens sandboxes of what is checked out; closed at the end, all of them."""
    made: list[Sandbox] = []

    def make() -> Sandbox:
        made.append(Sandbox(checkout.sandbox_spec(limits=limits)))
        return made[-1]

    try:
        yield make
    finally:
        for sandbox in made:
            sandbox.close()


@pytest.fixture
def open_sandbox(store_directory: Path, cache_directory: Path) -> Iterator[Opener]:
    """Fresh sandboxes of that image."""
    with sandboxes(RECIPE, store_directory, cache_directory) as make:
        yield make


@pytest.fixture
def plain(store_directory: Path, cache_directory: Path) -> Iterator[Sandbox]:
    """A sandbox with a Python at /opt/env that has nothing but its standard library."""
    with channels.opened(channels.RECIPE, store_directory, cache_directory) as sandbox:
        yield sandbox
