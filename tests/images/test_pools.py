"""Ready sandboxes by image: bounded in number, each pool with its layers pinned, gone when closed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.images import Cache, Image, Store
from skyrl_minisandbox.images.pools import Pools, Wanted
from skyrl_minisandbox.sandbox import Limits
from skyrl_minisandbox.sandbox.client import LauncherClient, shared
from tests.small import RECIPE, build_small_image
from tests.support import needs, seconds

pytestmark = needs("userns", "overlay", "git")


@pytest.fixture
def cache(store_directory: Path, cache_directory: Path) -> Cache:
    build_small_image(store_directory, cache_directory)
    return Cache(cache_directory)


@pytest.fixture
def image(cache: Cache, store_directory: Path) -> Image:
    found = Store(store_directory).find(RECIPE.digest())
    assert found is not None
    return found


@pytest.fixture
def pools(cache: Cache, store_directory: Path) -> Iterator[Pools]:
    made = Pools(Store(store_directory), cache, most=2)
    yield made
    made.close()


def limits(number: int) -> Wanted:
    return Wanted(Limits(processes=100 + number))


def test_a_second_one_was_ready_and_is_of_the_image(pools: Pools, image: Image) -> None:
    pools.take(image, Wanted(), 1, shared()).close()
    ((pool, _),) = pools._pools.values()
    assert pool.wait_full(seconds(30))
    (waiting,) = pool._ready
    with pools.take(image, Wanted(), 1, shared()) as sandbox:
        assert sandbox is waiting
        assert sandbox.shell().run("pwd; cat answer.sh").output == "/srv\necho wrong\n"


def test_the_least_recently_used_makes_room_and_leaves_nothing(pools: Pools, image: Image) -> None:
    for number in (1, 2):
        pools.take(image, limits(number), 1, shared()).close()
    leaving, _ = next(each for key, each in pools._pools.items() if key[1] == limits(2))
    assert leaving.wait_full(seconds(30))
    waiting = [sandbox.pid for sandbox in leaving._ready]
    for number in (1, 3):
        pools.take(image, limits(number), 1, shared()).close()
    assert [key[1] for key in pools._pools] == [limits(1), limits(3)]
    assert waiting and not [pid for pid in waiting if Path(f"/proc/{pid}").exists()]
    assert not leaving._thread.is_alive()


def test_a_pool_keeps_its_layers_in_use_until_it_is_closed(pools: Pools, cache: Cache, image: Image) -> None:
    def pins() -> int:
        return sum(count for _, count in cache._held.values())

    before = pins()
    pools.take(image, Wanted(), 1, shared()).close()
    assert pins() > before
    pools.close()
    assert pins() == before
    with pytest.raises(SandboxError, match="the pools are closed"):
        pools.take(image, Wanted(), 1, shared())


def test_those_of_a_dead_launcher_go_with_the_next_use(pools: Pools, image: Image) -> None:
    launcher = LauncherClient()
    pools.take(image, Wanted(), 1, launcher).close()
    launcher.close()
    deadline = seconds(10)
    launcher._process.wait(deadline)
    while launcher.alive:
        pass
    pools.take(image, Wanted(), 1, shared()).close()
    assert [key[-1] for key in pools._pools] == [shared()]


def test_what_is_written_goes_to_disk_when_asked(pools: Pools, cache: Cache, image: Image) -> None:
    with pools.take(image, Wanted(on_disk=True), 1, shared()) as sandbox:
        sandbox.write_file("/srv/mark-of-the-upper", b"x")
        assert list(cache.scratch().rglob("mark-of-the-upper"))
    pools.close()
    assert not list(cache.scratch().iterdir())
