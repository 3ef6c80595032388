"""Files in and out, and what differs from the layers."""

from __future__ import annotations

import errno
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from skyrl_minisandbox.sandbox import Sandbox


def exported(sandbox: Sandbox, prefix: str = "") -> dict[str, tarfile.TarInfo]:
    buffer = io.BytesIO()
    sandbox.export_layer(buffer, prefix=prefix)
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        return {member.name: member for member in tar}


def test_bytes_in_are_bytes_out(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 10_000
    sandbox.write_file("/new/directory/file", data, mode=0o600)
    assert sandbox.read_file("/new/directory/file") == data
    assert sandbox.run("stat -c %a /new/directory/file").output == "600\n"
    sandbox.write_file("relative", b"")
    assert sandbox.read_file("/testbed/relative") == b""


@pytest.mark.parametrize(
    ("path", "number"),
    [("/no/such", errno.ENOENT), ("/testbed", errno.EISDIR), ("/tmp/fifo", errno.EINVAL), ("/dev/zero", errno.EINVAL)],
)
def test_what_is_no_file_is_an_error_and_does_not_hang(sandbox: Sandbox, path: str, number: int) -> None:
    sandbox.run("mkfifo /tmp/fifo")
    with pytest.raises(OSError) as error:
        sandbox.read_file(path)
    assert error.value.errno == number
    assert sandbox.run("echo on").output == "on\n"


def test_writing_to_a_fifo_or_a_full_disk_is_an_error(sandbox: Sandbox) -> None:
    sandbox.run("mkfifo /tmp/fifo")
    with pytest.raises(OSError):
        sandbox.write_file("/tmp/fifo", b"x")
    with pytest.raises(OSError) as error:
        sandbox.write_file("/tmp/big", b"x" * (80 << 20))
    assert error.value.errno == errno.ENOSPC
    assert sandbox.run("rm /tmp/big; echo on").output == "on\n"


def test_a_file_larger_than_asked_for_is_refused(sandbox: Sandbox) -> None:
    sandbox.run("truncate -s 32M /tmp/sparse")
    with pytest.raises(OSError) as error:
        sandbox.read_file("/tmp/sparse", limit=1 << 20)
    assert error.value.errno == errno.EFBIG


def test_a_link_to_a_host_path_stays_inside(sandbox: Sandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("host")
    sandbox.run(["ln", "-s", str(secret), "/tmp/link"])
    with pytest.raises(FileNotFoundError):
        sandbox.read_file("/tmp/link")


def test_the_layer_is_never_written(sandbox: Sandbox, layer: Path) -> None:
    sandbox.run("echo changed > lower.txt; rm -rf src; mkdir src; touch src/new")
    assert (layer / "testbed/lower.txt").read_text() == "from the layer\n"
    assert (layer / "testbed/src/module.py").exists()


def test_export_tells_changes_removals_links_and_owners(sandbox: Sandbox) -> None:
    sandbox.run(
        "echo changed > lower.txt; rm -rf src; mkdir src; echo new > src/new; ln -s /etc/passwd link; "
        "ln src/new hard; mkfifo fifo; echo x > 'name with space'; touch /tmp/elsewhere"
    )
    found = exported(sandbox, "testbed")
    assert set(found) == {
        "testbed/lower.txt", "testbed/src", "testbed/src/.wh.module.py", "testbed/src/new", "testbed/link",
        "testbed/hard", "testbed/fifo", "testbed/name with space",
    }
    assert found["testbed/link"].linkname == "/etc/passwd" and found["testbed/link"].issym()
    assert found["testbed/fifo"].isfifo()
    assert {member.uid for member in found.values()} == {0}
    assert "tmp/elsewhere" in exported(sandbox)


def test_export_tells_a_removed_file_and_a_removed_prefix(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox()
    sandbox.run("rm lower.txt")
    assert set(exported(sandbox, "testbed")) == {"testbed/.wh.lower.txt"}
    sandbox.run("cd /; rm -rf /testbed")
    assert set(exported(sandbox, "testbed")) == {".wh.testbed"}
    sandbox.run("mkdir /testbed; touch /testbed/only", cwd="/")
    assert set(exported(sandbox, "testbed")) == {"testbed/.wh.lower.txt", "testbed/.wh.src", "testbed/only"}


def test_export_ends_what_runs_first(sandbox: Sandbox) -> None:
    shell = sandbox.shell()
    shell.run("cd /tmp; (while :; do date > /testbed/now; done) & true")
    exported(sandbox)
    assert sandbox.run("ls /proc | grep -c '^[0-9]'").output.strip() in ("4", "3", "5")
    assert shell.run("pwd").output == "/tmp\n"


def test_a_file_too_large_to_export_is_an_error(sandbox: Sandbox) -> None:
    sandbox.run("truncate -s 32M sparse")
    with pytest.raises(OSError) as error:
        sandbox.export_layer(io.BytesIO(), max_bytes=1 << 20)
    assert error.value.errno == errno.EFBIG


def test_an_upper_on_disk_is_gone_after_close(open_sandbox: Callable[..., Sandbox], tmp_path: Path) -> None:
    sandbox = open_sandbox(upper=tmp_path / "upper", private_tmp=True)
    sandbox.run("mkdir -p a/b; touch a/b/c /tmp/x; chmod 000 a/b")
    assert (tmp_path / "upper/upper/testbed/a").exists()
    names = set(exported(sandbox))
    assert "testbed/a/b/c" in names and "tmp/x" not in names
    sandbox.close()
    assert not (tmp_path / "upper").exists()


def test_a_tree_deeper_than_any_stack_is_exported(sandbox: Sandbox) -> None:
    sandbox.run(["python3", "-c", "import os\nfor _ in range(3000):\n os.mkdir('d'); os.chdir('d')"])
    names = exported(sandbox, "testbed")
    assert 1000 < len(names) < 2100  # what is beyond PATH_MAX is left out


def test_more_members_than_allowed_are_an_error(sandbox: Sandbox) -> None:
    sandbox.run("touch a b c d e")
    sandbox.export_layer(io.BytesIO(), prefix="testbed", max_members=5)
    with pytest.raises(OSError) as error:
        sandbox.export_layer(io.BytesIO(), prefix="testbed", max_members=4)
    assert error.value.errno == errno.EFBIG


def test_a_path_that_is_none_is_an_error_and_no_end(sandbox: Sandbox) -> None:
    with pytest.raises(OSError):
        sandbox.read_file("/a\0b")
    with pytest.raises(OSError):
        sandbox.write_file("/a\0b", b"x")
    assert sandbox.run("echo on").output == "on\n"
