"""x11, x12, x27, x28: what the host does, while the inside changes the ground below it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.errors import SandboxError
from skyrl_minisandbox.sandbox import Sandbox
from tests.security.conftest import Yard, within
from tests.support import seconds

MIB = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_libc = ctypes.CDLL(None, use_errno=True)

# Swaps a name with a link to each place in turn, until told to stop.
SWAP = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None)
name, targets = sys.argv[1], sys.argv[2:]
for number, target in enumerate(targets):
    os.symlink(target, f"{name}.{number}")
swaps = 0
open("/tmp/started", "w").close()
while not os.path.exists("/tmp/stop"):
    for number in range(len(targets)):
        for _ in range(2):
            libc.renameat2(-100, name.encode(), -100, f"{name}.{number}".encode(), 2)
        swaps += 1
open("/tmp/swaps", "w").write(str(swaps))
"""


@contextlib.contextmanager
def swapping(sandbox: Sandbox, name: str, *targets: str) -> Iterator[None]:
    sandbox.write_file("/opt/swap.py", SWAP.encode())
    start = f"setsid python3 /opt/swap.py {name} {' '.join(targets)} >/dev/null 2>&1 &"
    wait = "while [ ! -e /tmp/started ]; do sleep 0.02; done"
    done = sandbox.run(f"rm -f /tmp/stop /tmp/swaps /tmp/started; {start} {wait}", timeout=seconds(20))
    assert done.exit_code == 0, done
    yield
    wait = "touch /tmp/stop; while [ ! -s /tmp/swaps ]; do sleep 0.02; done; cat /tmp/swaps"
    assert int(sandbox.run(wait, timeout=seconds(20)).output) > 10


def _listing(directory: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in directory.iterdir())


def _put_while_swapped(yard: Yard, place: Path, count: int) -> None:
    victim = place / "victim"
    victim.mkdir(mode=0o777)
    victim.chmod(0o777)
    (victim / "file").write_text("the host's")
    source = place / "source"
    source.mkdir()
    for name in ("file", "other"):
        (source / name).write_text("from the owner")
    before = _listing(victim)
    sandbox = yard.open()
    sandbox.run("mkdir -p /testbed/to/directory")
    targets = (str(victim), "/proc/1/root", f"/proc/1/root{victim}", f"../../..{victim}", "/proc/self/cwd", "/etc")
    done = number = 0
    # A machine that is busy may leave the link in place for long: so many, and until some arrived.
    deadline = time.monotonic() + seconds(60)
    with swapping(sandbox, "/testbed/to/directory", *targets):
        while number < count or (done < 10 and time.monotonic() < deadline):
            number += 1
            with contextlib.suppress(OSError):
                if number % 4:
                    sandbox.write_file("/testbed/to/directory/file", b"from the owner")
                else:
                    sandbox.put_tree(source, "/testbed/to/directory")
                done += 1
            assert number % 100 or _listing(victim) == before
    assert _listing(victim) == before
    assert not [name for name in ("file", "other") if os.path.lexists(f"/{name}")]
    assert done >= 10
    assert sandbox.run("echo on").output == "on\n"


def test_what_goes_in_lands_inside_whatever_is_swapped(yard: Yard, tmp_path: Path) -> None:
    """x11"""
    _put_while_swapped(yard, tmp_path, 1000)


@pytest.mark.ci
def test_ten_thousand_files_land_inside_whatever_is_swapped(yard: Yard, tmp_path: Path) -> None:
    """x11"""
    _put_while_swapped(yard, tmp_path, 10_000)


def _get_while_swapped(yard: Yard, place: Path, count: int) -> None:
    sandbox = yard.open()
    sandbox.run("mkdir -p /testbed/from && echo inside > /testbed/from/file && mkdir /testbed/from/sub && "
                "echo inside > /testbed/from/sub/file && ln -s /etc/passwd /testbed/from/link")
    secret = yard.facts["secret"]
    targets = (secret, f"/proc/1/root{secret}", "/proc/1/environ", f"../../../../..{secret}", "/proc/self/mem")
    target = place / "got"
    with swapping(sandbox, "/testbed/from/file", *targets):
        for number in range(count):
            with contextlib.suppress(OSError):
                data = sandbox.read_file("/testbed/from/file", limit=MIB)
                assert data == b"inside\n", data[:100]
            if number % 10 == 0:
                with contextlib.suppress(OSError):
                    sandbox.get_tree("/testbed/from", target, max_bytes=MIB, max_members=100)
                _check_got(target, yard.facts["secret_text"])
    directory = ("/", f"/proc/1/root{os.path.dirname(secret)}", "/proc/1/cwd", "../../../../../..")
    with swapping(sandbox, "/testbed/from/sub", *directory):
        for _ in range(count // 10):
            with contextlib.suppress(OSError):
                sandbox.get_tree("/testbed/from", target, max_bytes=MIB, max_members=100)
            _check_got(target, yard.facts["secret_text"])
    assert {path.name for path in place.iterdir()} == {"got"}


def _check_got(target: Path, secret: str) -> None:
    """Nothing of the host in it, and no link followed: what was copied are files, directories and links."""
    for directory, _, names in os.walk(target):
        for name in names:
            path = Path(directory, name)
            assert path.is_symlink() or path.read_bytes() == b"inside\n", path


def test_what_comes_out_is_the_insides_whatever_is_swapped(yard: Yard, tmp_path: Path) -> None:
    """x12"""
    _get_while_swapped(yard, tmp_path, 400)


@pytest.mark.ci
def test_ten_thousand_files_that_come_out_are_the_insides(yard: Yard, tmp_path: Path) -> None:
    """x12"""
    _get_while_swapped(yard, tmp_path, 10_000)


def test_a_tree_with_odd_names_and_links_stays_in_its_target(yard: Yard, tmp_path: Path) -> None:
    """x12: names that lead elsewhere, a link and a file below it, names that are no text."""
    sandbox = yard.open()
    odd = (
        "import os\n"
        "os.makedirs('/testbed/odd/below'); os.chdir('/testbed/odd')\n"
        f"os.symlink('{tmp_path}', 'outside'); os.symlink('/', 'root'); os.symlink('..', 'up')\n"
        "for name in (b'\\xff\\xfe', b'new\\nline', b'...', b' ', b'a' * 255): open(name, 'w').write('x')\n"
        "open('below/outside', 'w').write('x')\n"
    )
    assert sandbox.run(["python3", "-c", odd]).exit_code == 0
    target = tmp_path / "got"
    sandbox.get_tree("/testbed/odd", target)
    # Now what was a link is a directory with a file, which must not be written through the link that is there.
    sandbox.run("cd /testbed/odd && rm outside && mkdir outside && echo forged > outside/forged")
    with contextlib.suppress(OSError):
        sandbox.get_tree("/testbed/odd", target)
    assert {path.name for path in tmp_path.iterdir()} == {"got"}
    assert (target / "root").is_symlink() and len(os.listdir(os.fsencode(target))) == 9


LINKED = ("proc", "sys", "dev", "dev/shm", "tmp", "etc", "etc/resolv.conf", "usr", "testbed")


def _evil_layer(place: Path, name: str, target: str) -> Path:
    layer = place / "evil"
    (layer / name).parent.mkdir(parents=True, exist_ok=True)
    (layer / name).symlink_to(target)
    for directory, _, _ in os.walk(place):
        os.chmod(directory, 0o755)
    return layer


@pytest.mark.parametrize("name", LINKED)
def test_a_link_where_a_mount_belongs_leads_nowhere(yard: Yard, tmp_path: Path, name: str) -> None:
    """x27, CVE-2021-30465"""
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    victim.chmod(0o777)
    layer = _evil_layer(tmp_path, name, str(victim))
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    try:
        sandbox = yard.open(layers=(*yard.spec.layers, layer))
    except SandboxError as error:
        assert "link at /" in str(error) or "could not be set up" in str(error)
    else:
        sandbox.run(f"touch /{name}/made /tmp/made /dev/shm/made; mkdir -p {victim}/made")
        assert sandbox.run("cat /proc/kcore /proc/kallsyms 2>/dev/null").stdout == b""
    assert sorted(path.name for path in victim.rglob("*")) == ["sub"]
    assert abs(len(Path("/proc/self/mountinfo").read_text().splitlines()) - mounts) < 20


@contextlib.contextmanager
def _host_swaps(path: Path, link: Path) -> Iterator[None]:
    """The layer itself changes while sandboxes are made of it: a directory and a link, in turns."""
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            _libc.renameat2(_AT_FDCWD, os.fsencode(path), _AT_FDCWD, os.fsencode(link), _RENAME_EXCHANGE)
            stop.wait(0.0005)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _create_while_swapped(yard: Yard, place: Path, count: int) -> None:
    core_pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    victim = place / "victim"
    victim.mkdir(mode=0o777)
    layer = place / "layer"
    for name in ("proc", "dev/pts", "dev/shm", "tmp"):
        (layer / name).mkdir(parents=True)
    for name in ("dev/null", "dev/console", "dev/ptmx"):
        (layer / name).symlink_to("/proc/sys/kernel/core_pattern")
    for name in ("proc", "dev", "tmp"):
        (layer / f"{name}.link").symlink_to(victim if name == "tmp" else "/proc/sys/kernel")
    for directory, _, _ in os.walk(place):
        os.chmod(directory, 0o755)
    rows = ["f08", "f13", "f14", *(f"k0{number}" for number in range(1, 8))]
    made = refused = 0
    for number in range(count):
        name = ("proc", "dev", "tmp")[number % 3]
        with _host_swaps(layer / name, layer / f"{name}.link"):
            try:
                sandbox = yard.open(layers=(*yard.spec.layers, layer))
            except SandboxError:
                refused += 1
                continue
        made += 1
        done = yard.python(sandbox, "inside.probes", facts={"rows": rows})
        verdicts = [line.split('"')[3] for line in done.output.splitlines()]
        assert verdicts == ["OK"] * len(rows), done.output
        within(30, sandbox.close)
        assert not list(victim.iterdir())
    assert Path("/proc/sys/kernel/core_pattern").read_text() == core_pattern
    print(f"{made} were made, {refused} refused")
    assert made or count < 100  # on a busy machine a link may be in place each time


def test_masks_hold_whatever_the_image_links_to(yard: Yard, tmp_path: Path) -> None:
    """x28: CVE-2025-31133, CVE-2025-52565, CVE-2025-52881; x27, swapped during creation."""
    _create_while_swapped(yard, tmp_path, 15)


@pytest.mark.ci
def test_masks_hold_in_two_hundred_creations(yard: Yard, tmp_path: Path) -> None:
    _create_while_swapped(yard, tmp_path, 200)


@pytest.mark.night
def test_masks_hold_in_a_thousand_creations(yard: Yard, tmp_path: Path) -> None:
    """x28, as often as the row says."""
    _create_while_swapped(yard, tmp_path, 1000)
