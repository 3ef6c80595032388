"""Layers are unpacked once, whole, and heal; what is in use stays; a directory that cannot serve is refused."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import CorruptLayer, MachineError
from skyrl_minisandbox.images import cache as cache_module
from skyrl_minisandbox.images import host
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.layer import Layer, unpack
from skyrl_minisandbox.images.locks import acquire
from skyrl_minisandbox.images.store import BlobMissing, Store
from skyrl_minisandbox.sandbox import Bind, Sandbox
from tests.images.conftest import image_of
from tests.support import needs

HOST_BINDS = tuple(Bind(f"/{name}", f"/{name}") for name in ("usr", "lib", "lib64") if os.path.isdir(f"/{name}"))

pytestmark = needs("overlay")  # a checkout makes sure once that the directory can hold an upper


def entries(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.path / "l").iterdir())


def aside(cache: Cache) -> list[str]:
    return sorted(path.name for path in (cache.path / "aside").iterdir())


def test_a_checkout_is_ready_to_mount_and_a_second_one_is_a_hit(
    make_layer: Callable[..., Layer], store: Store, cache: Cache
) -> None:
    image = image_of(make_layer({"a": "low", "b": "low"}), make_layer({"b": "high"}))
    with cache.checkout(image, store) as first:
        assert not first.hit
        assert [(path / "b").read_text() for path in first.layers] == ["low", "high"]
        assert all(len(path.name) == 16 for path in first.layers)
        spec = first.sandbox_spec(env={"X": "1"})
        assert spec.layers == first.layers and spec.env == {"PATH": "/usr/bin:/bin", "X": "1"}
    with cache.checkout(image, store) as second:
        assert second.hit and second.layers == first.layers
    assert aside(cache) == []


def test_many_threads_unpack_a_layer_once(
    make_layer: Callable[..., Layer], store: Store, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = image_of(make_layer({"a": "1"}))
    calls: list[Layer] = []
    real = unpack

    def slow(blob: Path, layer: Layer, target: Path, **more: int) -> None:
        calls.append(layer)
        time.sleep(0.2)  # long enough that every other thread comes to wait
        real(blob, layer, target, **more)

    monkeypatch.setattr(cache_module, "unpack", slow)
    caches = [cache, Cache(cache.path)]  # as two Nodes of one process have it
    checkouts = []
    threads = [
        threading.Thread(target=lambda number=number: checkouts.append(caches[number % 2].checkout(image, store)))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(checkouts) == 16
    assert len({checkout.layers for checkout in checkouts}) == 1


CHECK_OUT = """
import sys
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.images import cache as module
store = Store(sys.argv[1])
real = module.unpack
def told(blob, layer, target, **more):
    print("unpacks", layer.name, flush=True)
    real(blob, layer, target, **more)
module.unpack = told
checkout = Cache(sys.argv[2]).checkout(store.images()[0], store)
print("done", checkout.layers[0].joinpath("a").read_text(), flush=True)
"""


def test_two_processes_unpack_a_layer_once(make_layer: Callable[..., Layer], store: Store, cache: Cache) -> None:
    store.add(image_of(make_layer({"a": "1"}, "shared")))
    command = [sys.executable, "-c", CHECK_OUT, str(store.path), str(cache.path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(line for output in outputs for line in output.splitlines()) == ["done 1", "done 1", "unpacks shared"]


KILLED = """
import os, signal, sys
from skyrl_minisandbox.images.cache import Cache
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.images import cache as module
store, where = Store(sys.argv[1]), sys.argv[3]
def die(*arguments, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if where == "while unpacking":
    real = module.unpack
    module.unpack = lambda *arguments, **more: (real(*arguments, **more), die())
elif where == "before the rename":
    module._sync = die
else:
    real = module.write_atomic
    module.write_atomic = lambda path, data: die() if path.parent.name == "meta" else real(path, data)
Cache(sys.argv[2]).checkout(store.images()[0], store)
"""


@pytest.mark.parametrize("where", ["while unpacking", "before the rename", "before its metadata"])
def test_kill_9_leaves_nothing_that_the_next_opening_does_not_mend(
    make_layer: Callable[..., Layer], store: Store, cache: Cache, where: str
) -> None:
    image = store.add(image_of(make_layer({"a": "1"})))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), str(cache.path), where], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert aside(cache) != []
    again = Cache(cache.path)
    assert aside(again) == []
    with again.checkout(image, store) as checkout:
        assert not checkout.hit and (checkout.layers[0] / "a").read_text() == "1"


def test_opening_does_not_sweep_what_a_living_process_makes(cache: Cache) -> None:
    with cache.upper() as upper:
        upper.mkdir()
        Cache(cache.path)
        assert upper.is_dir()
    assert aside(cache) == []


def test_a_corrupt_blob_is_named_and_makes_way_for_a_new_one(
    make_layer: Callable[..., Layer], store: Store, cache: Cache
) -> None:
    layer = make_layer({"a": "1"}, "packages")
    image = store.add(image_of(layer, name="click-1"))
    blob = store.blob(layer)
    blob.write_bytes(blob.read_bytes()[:-18])
    with pytest.raises(CorruptLayer) as caught:
        cache.checkout(image, store)
    assert caught.value.message.startswith(f"layer {layer.digest[:19]}… (packages) of image click-1 is corrupt")
    assert "18 bytes short" in caught.value.message and "minisandbox image build" in caught.value.hint
    assert entries(cache) == [] and aside(cache) == []
    with pytest.raises(BlobMissing):
        cache.checkout(image, store)
    assert make_layer({"a": "1"}, "packages") == layer  # what a build does next
    with cache.checkout(image, store) as checkout:
        assert (checkout.layers[0] / "a").read_text() == "1"


@pytest.mark.parametrize("damage", ["no metadata", "metadata cut", "tree gone", "top file gone", "another layer's"])
def test_a_damaged_entry_heals(make_layer: Callable[..., Layer], store: Store, cache: Cache, damage: str) -> None:
    image = image_of(make_layer({"a": "1", "d/e": "2"}))
    with cache.checkout(image, store) as checkout:
        tree = checkout.layers[0]
    meta = cache.path / "meta" / f"{tree.name}.json"
    if damage == "no metadata":
        meta.unlink()
    elif damage == "metadata cut":
        meta.write_bytes(meta.read_bytes()[:20])
    elif damage == "tree gone":
        shutil.rmtree(tree)
    elif damage == "top file gone":
        (tree / "a").unlink()
    else:
        meta.write_text(meta.read_text().replace(image.layers[0].diff_id, "sha256:" + "0" * 64))
    with cache.checkout(image, store) as checkout:
        assert not checkout.hit
        assert (checkout.layers[0] / "a").read_text() == "1" and (checkout.layers[0] / "d/e").read_text() == "2"
    assert aside(cache) == []


def test_verify_finds_damage_below_the_top_and_the_next_checkout_mends_it(
    make_layer: Callable[..., Layer], store: Store, cache: Cache
) -> None:
    image = image_of(make_layer({"d/e": "2", "d/f": "3"}, "packages"), make_layer({"x": "1"}))
    with cache.checkout(image, store) as checkout:
        (checkout.layers[0] / "d/e").unlink()
        name = checkout.layers[0].name
    assert cache.verify() == [f"{name} packages"]
    assert cache.verify() == []
    with cache.checkout(image, store) as checkout:
        assert (checkout.layers[0] / "d/e").read_text() == "2"


def test_what_is_checked_out_is_pinned_until_its_last_release(
    make_layer: Callable[..., Layer], store: Store, cache: Cache
) -> None:
    image = image_of(make_layer({"a": "1"}))
    one, two = cache.checkout(image, store), cache.checkout(image, store)
    pin = cache.path / "pins" / one.layers[0].name
    for checkout in (one, two):
        assert acquire(pin, wait=False) is None
        checkout.release()
        checkout.release()
    free = acquire(pin, wait=False)
    assert free is not None and cache.pinned() == frozenset()
    os.close(free)


def test_a_failed_checkout_pins_nothing(make_layer: Callable[..., Layer], store: Store, cache: Cache) -> None:
    good, bad = make_layer({"a": "1"}), make_layer({"b": "2"})
    store.drop_blob(bad.digest)
    with pytest.raises(BlobMissing):
        cache.checkout(image_of(good, bad), store)
    assert cache.pinned() == frozenset()


def test_an_image_over_another_hosts_usr_is_refused_with_both_named(
    make_layer: Callable[..., Layer], store: Store, cache: Cache
) -> None:
    base = {**host.facts(), "glibc": "glibc 2.99"}
    image = Image("", (make_layer({"a": "1"}),), {}, "/", base=base, name="click-1")
    with pytest.raises(MachineError) as caught:
        cache.checkout(image, store)
    assert "click-1" in caught.value.message and "glibc 2.99" in caught.value.message
    assert host.facts()["glibc"] in caught.value.message and "debian" in caught.value.hint


@needs("root")
def test_a_full_disk_is_told_and_what_was_unpacked_is_removed(
    make_layer: Callable[..., Layer], store: Store, mounted: Callable[..., Path]
) -> None:
    image = image_of(make_layer({"zeros": "0" * (3 << 20)}))
    cache = Cache(mounted("tmpfs", "size=2m") / "cache")
    with pytest.raises(MachineError, match="no room left") as caught:
        cache.checkout(image, store)
    assert str(cache.path) in caught.value.message and "images.cache=DIR" in caught.value.hint
    assert aside(cache) == [] and entries(cache) == []


@needs("root")
def test_a_file_system_that_cannot_hold_an_upper_is_refused(mounted: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    # An upper on an overlay is what a container without a volume offers.
    cache = Cache(mounted("overlay", options) / "cache")
    with pytest.raises(MachineError) as caught:
        cache.check_upper()
    assert f"{cache.path} (overlay)" in caught.value.message and "images.cache=DIR" in caught.value.hint
    assert aside(cache) == []


@needs("root")
def test_a_directory_that_held_an_upper_once_is_not_tried_again(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.check_upper()
    monkeypatch.setattr("skyrl_minisandbox.images.probe.try_upper", lambda *arguments: pytest.fail("tried again"))
    Cache(cache.path).check_upper()


@needs("root")
def test_what_an_image_made_setuid_root_cannot_be_reached_by_other_users(
    make_layer: Callable[..., Layer], store: Store
) -> None:
    def reachable(path: Path) -> bool:
        command = ["test", "-e", str(path)]
        return (
            subprocess.run(command, user=65534, group=65534, extra_groups=[], timeout=60, check=False).returncode == 0
        )

    layer = make_layer({"program": "#!/bin/sh\nid -u\n"}, mode=0o4755)
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are closed to others anyway
        os.chmod(directory, 0o755)
        cache = Cache(directory)
        with cache.checkout(image_of(layer), store) as checkout:
            program = checkout.layers[0] / "program"
            assert program.stat().st_mode & 0o4000 and program.stat().st_uid == 0
            assert reachable(cache.path / "CACHEDIR.TAG") and not reachable(program)


def test_backup_programs_leave_the_cache_out(cache: Cache) -> None:
    assert (cache.path / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_cache_that_cannot_be_made_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be made") as caught:
        Cache(tmp_path / "file" / "cache")
    assert "images.cache=DIR" in caught.value.hint


@needs("root")
def test_layers_keep_their_owners_where_mounts_cannot_be_id_mapped(
    make_layer: Callable[..., Layer], store: Store, mounted: Callable[..., Path]
) -> None:
    """ramfs is such a file system; so is what kernels before 5.19 have."""
    cache = Cache(mounted("ramfs", "") / "cache")
    layer = make_layer({"usr/local/": "", "testbed/file": "text"})
    assert cache.shift > 0
    with cache.checkout_layers((layer,), store) as checkout:
        assert checkout.layers[0].name.endswith("s")
        assert (checkout.layers[0] / "testbed/file").stat().st_uid == cache.shift
        spec = dataclasses.replace(checkout.sandbox_spec(), binds=HOST_BINDS)
        with Sandbox(spec) as sandbox:
            assert sandbox.run(["/usr/bin/stat", "-c", "%u", "/testbed/file"]).output == "0\n"
            assert sandbox.run(["/usr/bin/touch", "/testbed/file"]).exit_code == 0


@needs("root")
def test_a_cache_of_another_user_is_refused_with_both_named(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    os.chown(cache.path / "l", 1234, 1234)
    with pytest.raises(MachineError, match=r"belongs to another user \(uid 1234, we are 0\)") as caught:
        Cache(cache.path)
    assert "images.cache=DIR" in caught.value.hint
    assert (cache.path / "l").stat().st_uid == 1234
