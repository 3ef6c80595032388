"""The store says what is wrong with it, and two writers at once both succeed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import CorruptLayer, MachineError
from skyrl_minisandbox.images.image import Image
from skyrl_minisandbox.images.layer import Layer, pack_tree
from skyrl_minisandbox.images.store import BlobMissing, Store, StoreNotInitialised, StoreTooNew
from tests.images.conftest import image_of
from tests.support import needs


def test_an_image_comes_back_as_it_was_stored(make_layer: Callable[..., Layer], store: Store) -> None:
    layers = make_layer({"a": "1"}, "base"), make_layer({"b": "2"}, "packages")
    image = Image(
        digest="",
        layers=layers,
        env={"PATH": "/bin", "A": "x=y"},
        workdir="/w",
        binds=(("/usr", "/usr"),),
        keep=("/usr/local",),
        base={"kind": "host"},
        recipe="ab" * 32,
        name="task-1",
        lock={"packages": ["p==1"]},
    )
    stored = store.add(image, base="f" * 64)
    again = Store(store.path).find("ab" * 32, base="f" * 64)
    assert again == stored and again is not None
    assert again.digest.startswith("sha256:")
    assert {**vars(again), "digest": ""} == vars(image)


def test_it_is_an_oci_image_layout(make_layer: Callable[..., Layer], store: Store) -> None:
    image = store.add(image_of(make_layer({"a": "1"})))
    assert json.loads((store.path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((store.path / "index.json").read_text())["manifests"]
    manifest = json.loads((store.path / "blobs/sha256" / entry["digest"][7:]).read_text())
    assert entry["digest"] == image.digest
    assert [layer["mediaType"] for layer in manifest["layers"]] == ["application/vnd.oci.image.layer.v1.tar+zstd"]
    config = json.loads((store.path / "blobs/sha256" / manifest["config"]["digest"][7:]).read_text())
    assert config["rootfs"]["diff_ids"] == [layer.diff_id for layer in image.layers]


def test_a_rebuilt_image_takes_the_place_of_the_old_one(make_layer: Callable[..., Layer], store: Store) -> None:
    store.add(image_of(make_layer({"a": "1"})))
    new = store.add(image_of(make_layer({"a": "2"})))
    assert store.images() == [new]


def test_images_on_different_bases_stand_side_by_side(make_layer: Callable[..., Layer], store: Store) -> None:
    one = store.add(image_of(make_layer({"a": "1"})), base="one")
    two = store.add(image_of(make_layer({"a": "2"})), base="two")
    assert store.find("r" * 64, base="one") == one and store.find("r" * 64, base="two") == two
    assert store.find("r" * 64, base="three") is None


def test_an_image_that_another_process_adds_is_found_without_opening_the_store_again(
    make_layer: Callable[..., Layer], store: Store
) -> None:
    first = store.add(image_of(make_layer({"a": "1"}), recipe="1" * 64))
    assert store.find("1" * 64) == first
    assert store.find("2" * 64) is None
    second = Store(store.path).add(image_of(make_layer({"a": "2"}), recipe="2" * 64))
    assert store.find("2" * 64) == second
    again = Store(store.path).add(image_of(make_layer({"a": "3"}), recipe="1" * 64))
    assert store.find("1" * 64) == again != first
    assert {image.digest for image in store.images()} == {second.digest, again.digest}


def test_a_directory_with_other_files_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreNotInitialised, match="other files") as caught:
        Store(tmp_path)
    assert "images.store=DIR" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_reading_only_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotInitialised):
        Store(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_a_newer_format_is_refused_by_its_number(store: Store) -> None:
    (store.path / "minisandbox.json").write_text('{"format": 99}')
    with pytest.raises(StoreTooNew, match="format 99"):
        Store(store.path)


def test_a_missing_blob_is_named(make_layer: Callable[..., Layer], store: Store) -> None:
    layer = make_layer({"a": "1"}, "packages")
    store.drop_blob(layer.digest)
    with pytest.raises(BlobMissing, match=rf"{layer.digest[:19]}….*packages.*of image django-1"):
        store.blob(layer, "django-1")


def test_an_image_whose_layer_is_gone_is_not_found_so_that_it_is_built_again(
    make_layer: Callable[..., Layer], store: Store
) -> None:
    layer = make_layer({"a": "1"})
    store.put_step("k" * 64, layer, {"packages": ["p==1"]})
    store.add(image_of(layer))
    assert store.find("r" * 64) is not None and store.step("k" * 64) == (layer, {"packages": ["p==1"]})
    store.drop_blob(layer.digest)
    assert store.find("r" * 64) is None and store.step("k" * 64) is None


def test_a_damaged_config_is_told_as_such(make_layer: Callable[..., Layer], store: Store) -> None:
    image = store.add(image_of(make_layer({"a": "1"})))
    path = store.path / "blobs/sha256" / image.digest[7:]
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(CorruptLayer, match=image.digest[:19]):
        store.get(image.digest)


ADD = """
import sys
from skyrl_minisandbox.images.store import Store
from skyrl_minisandbox.images.layer import Layer
from tests.images.conftest import image_of
store, layer = Store(sys.argv[1]), Layer(*sys.argv[2:4], int(sys.argv[4]))
for number in range(20):
    store.add(image_of(layer, recipe=f"{sys.argv[5]}{number}"))
"""


def test_two_processes_that_write_at_once_both_succeed(make_layer: Callable[..., Layer], store: Store) -> None:
    layer = make_layer({"a": "1"})
    arguments = [str(store.path), layer.digest, layer.diff_id, str(layer.size)]
    processes = [subprocess.Popen([sys.executable, "-c", ADD, *arguments, letter]) for letter in "ab"]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert {image.recipe for image in store.images()} == {
        f"{letter}{number}" for letter in "ab" for number in range(20)
    }


@needs("root")
def test_building_into_a_store_that_cannot_be_written_says_so(mounted: Callable[..., Path]) -> None:
    place = mounted("tmpfs", "size=1m")
    Store(place / "store")
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True, timeout=60)
    store = Store(place / "store")
    assert store.images() == []
    with pytest.raises(MachineError, match="is read-only here") as caught, store.lock("recipe"):
        pass
    assert "images.store=DIR" in caught.value.hint


@needs("root")
def test_a_full_disk_is_told_and_nothing_half_is_left(mounted: Callable[..., Path], tmp_path: Path) -> None:
    store = Store(mounted("tmpfs", "size=1m") / "store")
    tree = tmp_path / "tree"
    tree.mkdir()
    with open("/dev/urandom", "rb") as noise:
        (tree / "big").write_bytes(noise.read(3 << 20))
    with pytest.raises(MachineError, match="no room left") as caught:
        store.put_layer(lambda sink: pack_tree(tree, sink), "big")  # type: ignore[arg-type]
    assert str(store.path) in caught.value.message
    assert list((store.path / "aside").iterdir()) == [] and list((store.path / "blobs/sha256").iterdir()) == []


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
@pytest.mark.parametrize("which", ["manifest", "config"])
def test_an_image_whose_description_is_damaged_can_be_built_again(
    make_layer: Callable[..., Layer], store: Store, which: str, damage: str
) -> None:
    image = image_of(make_layer({"a": "1"}))
    stored = store.add(image)
    path = store.path / "blobs/sha256" / stored.digest.partition(":")[2]
    if which == "config":
        path = path.with_name(json.loads(path.read_bytes())["config"]["digest"].partition(":")[2])
    path.unlink()
    if damage == "corrupt":
        path.write_bytes(b"{}")
    assert store.find(image.recipe) is None
    assert store.add(image) == stored == store.find(image.recipe)


@pytest.mark.parametrize("made", [1, 3, 5])
def test_a_store_that_another_process_is_just_making_is_no_foreign_directory(tmp_path: Path, made: int) -> None:
    for name in ("locks", "blobs", "steps", "logs", "aside")[:made]:
        (tmp_path / "store" / name).mkdir(parents=True)
    assert Store(tmp_path / "store").images() == []
