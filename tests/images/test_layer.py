"""The same tree is always the same layer, and only the right bytes are ever unpacked."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import CorruptLayer
from skyrl_minisandbox.images.layer import MTIME, Layer, LayerWriter, pack_tree, unpack
from skyrl_minisandbox.images.store import Store
from tests.support import needs


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode = kind, 0o755 if kind == tarfile.DIRTYPE else 0o644
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def unpacked(store: Store, data: bytes, target: Path, *, piece: int = 1 << 20, **options: bool | int) -> Layer:
    def write(sink: LayerWriter) -> None:
        for start in range(0, len(data), piece):
            sink.write(data[start : start + piece])

    layer = store.put_layer(write, "made")
    target.mkdir()
    unpack(store.blob(layer), layer, target, **options)  # type: ignore[arg-type]
    return layer


def test_the_same_tree_has_the_same_digests_whenever_and_by_whomever_it_was_made(store: Store, tmp_path: Path) -> None:
    layers = []
    for moment, order in ((1_000_000_000, "ab"), (1_700_000_000, "ba")):
        tree = tmp_path / f"t{moment}"
        tree.mkdir()
        for name in order:
            (tree / name).write_text(name)
            os.utime(tree / name, (moment, moment))
        layers.append(store.put_layer(lambda sink, tree=tree: pack_tree(tree, sink, "opt/x"), "x"))  # type: ignore[misc]
    assert layers[0] == layers[1]


def test_time_stamps_and_user_names_of_a_foreign_tar_are_dropped(store: Store, tmp_path: Path) -> None:
    long_name = "d/" + "n" * 150  # needs a pax header, which holds more than the time
    data = tar_of(
        (member("a", mtime=1234.5, uname="someone", gname="some", uid=os.getuid(), gid=os.getgid()), b"content"),
        (member("d", tarfile.DIRTYPE, uid=os.getuid(), gid=os.getgid()), b""),
        (member(long_name, mtime=99.25, uid=os.getuid(), gid=os.getgid()), b"x" * 1000),
    )
    whole = unpacked(store, data, tmp_path / "one")
    pieces = unpacked(store, data, tmp_path / "two", piece=7)
    assert whole == pieces
    for name, content in (("a", b"content"), (long_name, b"x" * 1000)):
        assert (tmp_path / "one" / name).read_bytes() == content
        assert (tmp_path / "one" / name).stat().st_mtime == MTIME


def test_a_stream_that_ends_within_a_member_is_no_layer(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "layer")
    writer.write(tar_of((member("a"), b"x" * 5000))[:2000])
    with pytest.raises(CorruptLayer):
        writer.finish()
    writer.close()


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped"])
def test_a_blob_that_is_not_its_digests_bytes_is_refused(
    make_layer: Callable[..., Layer], store: Store, tmp_path: Path, damage: str
) -> None:
    layer = make_layer({"file": "some text\n" * 500})
    blob = store.blob(layer)
    data = bytearray(blob.read_bytes())
    if damage == "cut":
        data = data[:-18]
    elif damage == "longer":
        data += b"\0" * 5
    else:
        data[len(data) // 2] ^= 0x40
    blob.write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptLayer) as caught:
        unpack(blob, layer, tmp_path / "out")
    assert layer.digest[:19] in caught.value.message
    if damage == "cut":
        assert "18 bytes short" in caught.value.message


def test_another_layers_content_under_a_right_blob_digest_is_refused(
    make_layer: Callable[..., Layer], store: Store, tmp_path: Path
) -> None:
    one, other = make_layer({"a": "1"}), make_layer({"a": "2"})
    lying = Layer(one.digest, other.diff_id, one.size, "lying")
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptLayer, match="content hashes"):
        unpack(store.blob(one), lying, tmp_path / "out")


@pytest.mark.parametrize("as_root", [pytest.param(True, marks=needs("root")), False])
def test_whiteouts_take_overlays_form(store: Store, tmp_path: Path, as_root: bool) -> None:
    data = tar_of(
        (member("d", tarfile.DIRTYPE), b""),
        (member("d/.wh.gone"), b""),
        (member("o", tarfile.DIRTYPE), b""),
        (member("o/.wh..wh..opq"), b""),
        (member("o/kept"), b"k"),
    )
    out = tmp_path / "out"
    unpacked(store, data, out, as_root=as_root)
    gone = (out / "d/gone").lstat()
    assert stat.S_ISCHR(gone.st_mode) and gone.st_rdev == 0
    name = "trusted.overlay.opaque" if as_root else "user.overlay.opaque"
    assert os.getxattr(out / "o", name) == b"y"
    assert sorted(os.listdir(out / "o")) == ["kept"] and os.listdir(out / "d") == ["gone"]


@needs("root")
def test_root_keeps_owners_and_modes(store: Store, tmp_path: Path) -> None:
    data = tar_of((member("a", uid=1000, gid=1001, mode=0o4751, uname="someone"), b""))
    unpacked(store, data, tmp_path / "out")
    found = (tmp_path / "out/a").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1000, 1001, 0o4751)


@needs("root")
def test_owners_can_be_shifted_where_a_mount_cannot_map_them(store: Store, tmp_path: Path) -> None:
    data = tar_of((member("a", uid=1000, gid=5, mode=0o4755), b""), (member("l", tarfile.SYMTYPE, linkname="a"), b""))
    unpacked(store, data, tmp_path / "out", shift=100_000)
    found = (tmp_path / "out/a").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (101_000, 100_005, 0o4755)
    assert (tmp_path / "out/l").lstat().st_uid == 100_000


def test_what_a_plain_user_unpacks_is_its_own_and_can_be_removed(store: Store, tmp_path: Path) -> None:
    data = tar_of(
        (member("d", tarfile.DIRTYPE, mode=0o555, uid=4321), b""), (member("d/f", mode=0o000, uid=4321), b"text")
    )
    out = tmp_path / "out"
    unpacked(store, data, out, as_root=False)
    assert (out / "d/f").stat().st_uid == os.geteuid()
    assert (out / "d").stat().st_mode & 0o700 == 0o700 and (out / "d/f").stat().st_mode & 0o600 == 0o600


def test_devices_of_an_image_are_left_out(store: Store, tmp_path: Path) -> None:
    data = tar_of(
        (member("dev", tarfile.DIRTYPE), b""), (member("dev/null", tarfile.CHRTYPE, devmajor=1, devminor=3), b"")
    )
    unpacked(store, data, tmp_path / "out", as_root=False)
    assert os.listdir(tmp_path / "out/dev") == []
