"""An index, a store and a cache for each test; directories on other file systems; images that need no network."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.images.build import build_image
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.layer import Layer, pack_tree
from skyrl_minisandbox.images.pip_config import PipConfig
from skyrl_minisandbox.images.recipe import Recipe, Sdist
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.sandbox import Sandbox, shutdown_launcher
from tests.images import index as indexes


@pytest.fixture
def index() -> Iterator[indexes.Index]:
    with indexes.serve() as served:
        yield served


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def make_layer(store: Store, tmp_path: Path) -> Callable[..., Layer]:
    """Store a layer of the given files (a path ending in `/` is a directory)."""
    count = 0

    def make(files: dict[str, str], name: str = "made", mode: int = 0o644) -> Layer:
        nonlocal count
        count += 1
        tree = tmp_path / f"tree{count}"
        tree.mkdir()
        for path, text in files.items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.endswith("/"):
                target.mkdir(exist_ok=True)
            else:
                target.write_text(text)
                target.chmod(mode)
        return store.put_layer(lambda sink: pack_tree(tree, sink), name)  # type: ignore[arg-type]

    return make


def image_of(*layers: Layer, name: str = "small", recipe: str = "r" * 64) -> Image:
    """An image that is on no base."""
    return Image(digest="", layers=layers, env={"PATH": "/usr/bin:/bin"}, workdir="/", recipe=recipe, name=name)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a file system for one test (as root): `mounted("tmpfs", "size=1m")` gives its directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    made: list[Path] = []

    def mount(kind: str, options: str) -> Path:
        target = tmp_path / f"mount{len(made)}"
        target.mkdir()
        if libc.mount(kind.encode(), os.fsencode(target), kind.encode(), 0, options.encode()):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(target))
        made.append(target)
        shutdown_launcher()  # one that is running has the mounts of when it started
        return target

    yield mount
    shutdown_launcher()  # it would keep them
    for target in reversed(made):
        libc.umount2(os.fsencode(target), 2)  # MNT_DETACH


@dataclasses.dataclass
class Local:
    """A loopback index with what builds need, and a store and a cache that a module's builds share."""

    index: indexes.Index
    sources: Sources
    store: Store
    cache: Cache

    def build(self, recipe: Recipe, **more: Any) -> Image:
        """`build_image` with what this has; `more` are further arguments of it."""
        return build_image(recipe, **{"store": self.store, "cache": self.cache, "sources": self.sources, **more})

    def output(self, image: Image, command: str) -> str:
        """What a command that succeeds prints in a sandbox of the image."""
        return output(image, self.store, self.cache, command)


def output(image: Image, store: Store, cache: Cache, command: str) -> str:
    with cache.checkout(image, store) as checkout, Sandbox(checkout.sandbox_spec()) as sandbox:
        result = sandbox.run(command, timeout=60)
        assert result.exit_code == 0, result.output
        return result.output


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """Its index has pip, `tinydep` and the sdist of `tinylib`."""
    directory = tmp_path_factory.mktemp("local")
    with indexes.serve() as index:
        version, data = indexes.bundled_pip()
        index.add("pip", f"pip-{version}-py3-none-any.whl", data)
        index.add("tinydep", *indexes.wheel("tinydep", "1.0", {"tinydep.py": "ANSWER = 42\n"}))
        sources = Sources(directory / "sources", PipConfig(index_urls=(index.url,)))
        yield Local(index, sources, Store(directory / "store"), Cache(directory / "cache"))


def local_recipe(index: indexes.Index, *commands: str, python: str | None = None) -> Recipe:
    """A recipe for which the loopback index is enough, on the base's own Python where it has one."""
    pip, _ = indexes.bundled_pip()
    name, data = indexes.sdist("tinylib", "0.1", {"tinylib.py": "import tinydep\n", ".gitignore": "*.log\n"})
    if python is None and not Path("/usr/bin/python3").exists():
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Recipe(
        base="host",
        python=python,
        packages=("tinydep==1.0", f"pip=={pip}"),
        repository=Sdist(package="tinylib", version="0.1", filename=name, sha256=index.add("tinylib", name, data)),
        commands=commands,
    )
