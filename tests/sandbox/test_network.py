"""What needs a network, a terminal or a package manager inside: servers, `script`, shared memory, pip, dpkg, apt."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec
from skyrl_minisandbox.sandbox.features import machine_spec
from tests.support import require, seconds

OpenSandbox = Callable[..., Sandbox]


@pytest.fixture
def python(sandbox: Sandbox) -> str:
    if sandbox.run(["python3", "-c", ""]).exit_code:
        pytest.skip("no python3 below /usr")
    return "python3"


SERVE = "python3 -m http.server --bind 127.0.0.1 8123 > /tmp/log 2>&1 &"
FETCH = (
    "import sys, time, urllib.request\n"
    "for _ in range(int(sys.argv[1])):\n"
    "    try: print(urllib.request.urlopen('http://127.0.0.1:8123/lower.txt', timeout=20).read().decode()); break\n"
    "    except OSError: time.sleep(0.1)\n"
    "else: print('nobody answers')\n"
)


def test_a_test_server_inside_answers_inside_and_nowhere_else(open_sandbox: OpenSandbox, python: str) -> None:
    one, two = open_sandbox(), open_sandbox()
    one.shell().run(f"cd /testbed; {SERVE}", timeout=seconds(20))
    patience = str(int(seconds(200)))
    assert one.run([python, "-c", FETCH, patience], timeout=seconds(60)).output == "from the layer\n\n"
    assert two.run([python, "-c", FETCH, "2"], timeout=seconds(60)).output == "nobody answers\n"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", 8123), 5)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_every_address_of_loopback_can_be_served(sandbox: Sandbox, python: str, address: str) -> None:
    if address == "::1" and not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("a kernel without IPv6")
    if address == "localhost":
        sandbox.write_file("/etc/hosts", b"127.0.0.1 localhost\n")
    family = "AF_INET6" if address == "::1" else "AF_INET"
    script = (
        f"import socket; s = socket.create_server(({address!r}, 0), family=socket.{family}); "
        "c = socket.create_connection(s.getsockname()[:2], 5); print('connected')"
    )
    assert sandbox.run([python, "-c", script], timeout=seconds(30)).output == "connected\n"


def test_datagrams_and_sockets_in_files_work(sandbox: Sandbox, python: str) -> None:
    script = """
import socket
a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); a.bind(("127.0.0.1", 0))
b = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); b.sendto(b"udp", a.getsockname()); print(a.recv(9))
s = socket.socket(socket.AF_UNIX); s.bind("/tmp/socket"); s.listen()
c = socket.socket(socket.AF_UNIX); c.connect("/tmp/socket"); s.accept()[0].send(b"unix"); print(c.recv(9))
"""
    assert sandbox.run([python, "-c", script], timeout=seconds(30)).output == "b'udp'\nb'unix'\n"


def test_the_outside_is_refused_at_once(sandbox: Sandbox, python: str) -> None:
    script = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 20)\nexcept OSError as e: print(e.errno)"
    result = sandbox.run([python, "-c", script], timeout=seconds(30))
    assert result.output == "101\n" and not result.timed_out  # ENETUNREACH


def test_a_build_reaches_the_machines_network(open_sandbox: OpenSandbox, python: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer = threading.Thread(target=lambda: server.accept()[0].sendall(b"from the machine"))
        answer.start()
        sandbox = open_sandbox(network="host")
        port = server.getsockname()[1]
        script = f"import socket; print(socket.create_connection(('127.0.0.1', {port}), 20).recv(99))"
        assert sandbox.run([python, "-c", script], timeout=seconds(30)).output == "b'from the machine'\n"
        answer.join(seconds(20))


# Terminals and shared memory


def test_pty_spawn_gives_a_terminal_with_a_size(sandbox: Sandbox, python: str) -> None:
    script = "import pty; pty.spawn(['sh', '-c', 'stty rows 33 cols 77; stty size; tty; test -t 0 && echo terminal'])"
    result = sandbox.run([python, "-c", script], timeout=seconds(30))
    assert result.output.split() == ["33", "77", "/dev/pts/0", "terminal"]


def test_script_works(sandbox: Sandbox) -> None:
    if shutil.which("script") is None:
        pytest.skip("no `script`")
    for way in (sandbox.run, sandbox.shell().run):
        result = way("script -qec 'tty; echo out > /dev/tty' /dev/null", timeout=seconds(30))
        assert result.output.split() == ["/dev/pts/0", "out"]


def test_a_user_inside_has_a_terminal_too(sandbox: Sandbox, python: str) -> None:
    if sandbox.run("true", user="user").exit_code:
        pytest.skip("a single id is mapped: there is root alone")
    script = "import pty; pty.spawn(['tty'])"
    assert sandbox.run([python, "-c", script], user="user", timeout=seconds(30)).output.strip() == "/dev/pts/0"


def test_shared_memory_and_locks_of_multiprocessing_work(sandbox: Sandbox, python: str) -> None:
    script = """
import multiprocessing as m
from multiprocessing import shared_memory
def add(name, lock):
    block = shared_memory.SharedMemory(name=name)
    for _ in range(200):
        with lock:
            block.buf[0] = (block.buf[0] + 1) % 251
    block.close()
if __name__ == "__main__":
    context = m.get_context("fork")
    block, lock = shared_memory.SharedMemory(create=True, size=1 << 20), context.Lock()
    workers = [context.Process(target=add, args=(block.name, lock)) for _ in range(4)]
    [w.start() for w in workers]; [w.join() for w in workers]
    print(block.buf[0], 800 % 251)
    block.close(); block.unlink()
"""
    sandbox.write_file("/tmp/shared.py", script.encode())
    result = sandbox.run([python, "/tmp/shared.py"], timeout=seconds(60))
    assert result.output == "47 47\n", result.output


# Package managers


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox with the interpreter of these tests, and room for what is installed."""
    require("userns", "overlay")
    layer = tmp_path_factory.mktemp("packages")
    spec, _ = machine_spec(layer, tmp_path_factory.mktemp("scratch"))
    with Sandbox(SandboxSpec(spec.layers, spec.binds, env=spec.env, scratch=spec.scratch, limits=Limits())) as made:
        yield made


def wheel() -> bytes:
    """A pure wheel of one module, as the specification of binary distributions has it."""
    data = io.BytesIO()
    info = "tiny_thing-1.0.dist-info"
    files = {
        "tiny_thing.py": "VALUE = 42\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(data, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return data.getvalue()


def test_pip_installs_a_local_wheel_into_a_fresh_environment(roomy: Sandbox) -> None:
    python = os.path.realpath(sys.executable)
    if roomy.run([python, "-c", "import ensurepip, venv"]).exit_code:
        pytest.skip("this interpreter has no ensurepip")
    roomy.write_file("/root/tiny_thing-1.0-py3-none-any.whl", wheel())
    quoted = shlex.quote(python)
    result = roomy.shell().run(
        f"cd /root && {quoted} -m venv v && v/bin/pip install --no-index ./tiny_thing-1.0-py3-none-any.whl && "
        "v/bin/python -c 'import tiny_thing; print(tiny_thing.VALUE)' && v/bin/pip uninstall -y tiny-thing",
        timeout=seconds(120),
    )
    assert result.exit_code == 0 and "\n42\n" in result.output and "Successfully uninstalled" in result.output


@pytest.fixture
def deb(tmp_path: Path) -> bytes:
    """A package with files of a system user, and scripts that make one."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no `dpkg-deb`")
    root = tmp_path / "tiny"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "opt/tiny").mkdir(parents=True)
    (root / "opt/tiny/file").write_text("installed\n")
    (root / "DEBIAN/control").write_text(
        "Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.invalid>\n"
        "Description: a test\n"
    )
    script = root / "DEBIAN/postinst"
    script.write_text("#!/bin/sh\nset -e\nchown 33:33 /opt/tiny/file\nchgrp 4 /opt/tiny\ntouch /opt/tiny/configured\n")
    script.chmod(0o755)
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "--build", str(root), str(tmp_path / "tiny.deb")],
        check=True, capture_output=True, timeout=seconds(60),
    )
    return (tmp_path / "tiny.deb").read_bytes()


def prepare(sandbox: Sandbox, deb: bytes) -> None:
    """An empty dpkg database, and the package in a repository of its own."""
    made = sandbox.run(
        "mkdir -p /var/lib/dpkg/info /var/lib/dpkg/updates /var/log /var/cache/apt/archives/partial "
        "/var/lib/apt/lists/partial /etc/apt/preferences.d /etc/apt/apt.conf.d /etc/apt/trusted.gpg.d && "
        ": > /var/lib/dpkg/status"
    )
    assert made.exit_code == 0, made.output
    sandbox.write_file("/srv/repo/tiny.deb", deb)
    index = (
        "Package: tiny\nVersion: 1.0\nArchitecture: all\nMaintainer: nobody <nobody@example.invalid>\n"
        f"Filename: ./tiny.deb\nSize: {len(deb)}\nSHA256: {hashlib.sha256(deb).hexdigest()}\nDescription: a test\n\n"
    )
    sandbox.write_file("/srv/repo/Packages", index.encode())
    sandbox.write_file("/etc/apt/sources.list", b"deb [trusted=yes] copy:/srv/repo ./\n")


def test_dpkg_installs_configures_and_removes(roomy: Sandbox, deb: bytes) -> None:
    """As root-inside of a range of ids, and of a single id, where owners that do not exist are answered as set."""
    prepare(roomy, deb)
    result = roomy.run("dpkg -i /srv/repo/tiny.deb", timeout=seconds(60))
    assert result.exit_code == 0, result.output
    assert roomy.run("cat /opt/tiny/file; ls /opt/tiny").output == "installed\nconfigured\nfile\n"
    owner = roomy.run("stat -c %u:%g /opt/tiny/file").output.strip()
    assert owner == ("33:33" if not roomy._launcher.facts["single_id"] else "0:0")
    assert roomy.run("dpkg -P tiny; ls /opt/tiny/file", timeout=seconds(60)).exit_code != 0


def test_apt_get_updates_downloads_and_installs(roomy: Sandbox, deb: bytes) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("no `apt-get`")
    prepare(roomy, deb)
    options = ""
    if roomy._launcher.facts["single_id"]:
        options = "-o APT::Sandbox::User=root"  # there is no other user to download as
    else:
        passwd = roomy.read_file("/etc/passwd") + b"_apt:x:42:65534::/nonexistent:/usr/sbin/nologin\n"
        roomy.write_file("/etc/passwd", passwd)
    result = roomy.run(
        f"apt-get {options} update && apt-get {options} install -y tiny",
        env={"DEBIAN_FRONTEND": "noninteractive"}, timeout=seconds(120),
    )
    assert result.exit_code == 0, result.output
    assert roomy.run("ls /opt/tiny/configured").exit_code == 0
