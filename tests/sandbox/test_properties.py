"""What goes in comes out the same: files, trees, input, output, command texts and environments, whatever is in them."""

from __future__ import annotations

import dataclasses
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from skyrl_minisandbox.sandbox import Sandbox, SandboxSpec, Shell
from skyrl_minisandbox.sandbox.processes import Capture
from tests.sandbox.stand_in import examples
from tests.support import needs, seconds

pytestmark = needs("hypothesis", "userns", "overlay")

# How often, in the fast tier and in ci.
TIERS = [pytest.param(25, id="fast"), pytest.param(150, id="ci", marks=pytest.mark.ci)]


@pytest.fixture(scope="module")
def shared(spec: SandboxSpec) -> Iterator[Sandbox]:
    """One sandbox for all examples: what one leaves must not bend the next."""
    with Sandbox(spec) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def shell(shared: Sandbox) -> Shell:
    return shared.shell(cwd="/tmp")


def contents() -> st.SearchStrategy[bytes]:
    """Bytes of any kind, and enough of them to need several frames."""
    return st.one_of(
        st.binary(max_size=300),
        st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=7), st.integers(1, 100_000)),
    )


def names() -> st.SearchStrategy[bytes]:
    """What a file may be called: everything but a slash and a NUL."""
    anything = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"_").replace(b"/", b"_"))
    odd = [b"a", b"-rf", b"a b", b"\n", b"\xff\xfe", b"*", b"'\"", b".wh.a", b"...", b"x" * 255, "é".encode()]
    return st.one_of(st.sampled_from(odd), anything).filter(lambda name: name not in (b".", b".."))


def texts() -> st.SearchStrategy[str]:
    """What can be an argument: no NUL, bytes that are no UTF-8 as surrogate escapes."""
    raw = st.binary(max_size=60).map(lambda data: data.replace(b"\0", b"\t"))
    plain = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
    odd = st.sampled_from(["!", "\t", "\r\n", "$(id)`id`", "'\"\\", "EOF", "-n", "%s"])
    return st.one_of(plain, raw.map(os.fsdecode), odd)


# Files


@pytest.mark.parametrize("count", TIERS)
def test_a_file_comes_out_as_it_went_in(shared: Sandbox, count: int) -> None:
    @examples(count)
    @given(name=names(), data=contents(), mode=st.integers(0, 0o777))
    @example(name=b"\xff", data=b"", mode=0)
    @example(name=b"big", data=os.urandom(3 << 20), mode=0o644)
    def holds(name: bytes, data: bytes, mode: int) -> None:
        path = "/tmp/files/" + os.fsdecode(name)
        shared.write_file(path, data, mode=mode)
        assert shared.read_file(path) == data
        found = shared.run(["stat", "-c", "%a %s", "--", path])
        assert found.output == f"{mode:o} {len(data)}\n"

    holds()


# Trees: (kind, content or target, mode) by path


@dataclasses.dataclass(frozen=True)
class Node:
    """A file (its content), a link (its target) or a directory (what is in it)."""

    mode: int
    content: bytes | None = None
    target: bytes | None = None
    inside: tuple[tuple[bytes, Node], ...] = ()


def nodes() -> st.SearchStrategy[Node]:
    modes = st.integers(0, 0o777)
    targets = st.one_of(names(), st.sampled_from([b"..", b"/etc/passwd", b"../../../etc", b"/proc/self/fd", b"a/../b"]))
    leaf = st.one_of(
        st.builds(Node, modes, content=st.binary(max_size=200)),
        st.builds(lambda mode, times: Node(mode, content=bytes(times << 17)), modes, st.integers(0, 3)),
        st.builds(Node, st.just(0o777), target=targets),
        st.builds(Node, modes),
    )
    return st.recursive(leaf, lambda inner: st.builds(
        Node, modes, inside=st.dictionaries(names(), inner, max_size=5).map(lambda found: tuple(found.items()))
    ), max_leaves=12)


def make(node: Node, path: bytes) -> None:
    if node.content is not None:
        with open(path, "wb") as file:
            file.write(node.content)
    elif node.target is not None:
        os.symlink(node.target, path)
        return
    else:
        os.mkdir(path)
        for name, inner in node.inside:
            make(inner, path + b"/" + name)
    os.utime(path, ns=(0, 1_000_000_000_123_456_789))
    os.chmod(path, node.mode)


def look(path: bytes) -> Node:
    """What lies there, as `make` would have made it. Opened whatever its mode is."""
    status = os.lstat(path)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return Node(0o777, target=os.readlink(path))
    assert status.st_mtime_ns == 1_000_000_000_123_456_789
    os.chmod(path, 0o700)
    if stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            return Node(mode, content=file.read())
    assert stat.S_ISDIR(status.st_mode)
    return Node(mode, inside=tuple((name, look(path + b"/" + name)) for name in os.listdir(path)))


def same(one: Node, two: Node) -> bool:
    if (one.mode, one.content, one.target) != (two.mode, two.content, two.target):
        return False
    left, right = dict(one.inside), dict(two.inside)
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def readable(node: Node) -> Node:
    """A plain user's own tree: what it may read it may pack."""
    return dataclasses.replace(
        node, mode=node.mode | 0o700, inside=tuple((name, readable(inner)) for name, inner in node.inside)
    ) if node.target is None else node


@pytest.mark.parametrize("count", TIERS)
def test_a_tree_comes_out_as_it_went_in(shared: Sandbox, count: int) -> None:
    number = 0

    @examples(count)
    @given(node=nodes().filter(lambda node: node.target is None))
    def holds(node: Node) -> None:
        nonlocal number
        number += 1
        node = node if os.geteuid() == 0 else readable(node)
        with tempfile.TemporaryDirectory() as directory:
            source, target = Path(directory, "source"), Path(directory, "target")
            make(node, os.fsencode(source))
            assert shared.put_tree(source, f"/tmp/tree{number}") == []
            assert shared.get_tree(f"/tmp/tree{number}", target) == []
            assert same(look(os.fsencode(source)), node)  # reading changed nothing
            assert same(look(os.fsencode(target)), node)
        shared.run(["rm", "-rf", f"/tmp/tree{number}"])

    holds()


# Commands


@pytest.mark.parametrize("count", TIERS)
def test_input_comes_out_of_cat_as_it_went_in(shared: Sandbox, count: int) -> None:
    @examples(count)
    @given(data=contents())
    @example(data=bytes(range(256)) * 3000)
    def holds(data: bytes) -> None:
        result = shared.run(["cat"], input=data, timeout=seconds(60))
        assert (result.stdout, result.stderr, result.exit_code) == (data, b"", 0)

    holds()


@pytest.mark.parametrize("count", TIERS)
def test_the_shell_prints_a_file_of_any_bytes(shared: Sandbox, shell: Shell, count: int) -> None:
    @examples(count)
    @given(data=contents())
    def holds(data: bytes) -> None:
        shared.write_file("/tmp/printed", data)
        result = shell.run("cat /tmp/printed", timeout=seconds(60))
        assert (result.stdout, result.exit_code, result.notice) == (data, 0, "")

    holds()


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@pytest.mark.parametrize("count", TIERS)
def test_any_argument_arrives_as_it_was_written(shared: Sandbox, shell: Shell, count: int) -> None:
    @examples(count)
    @given(arguments=st.lists(texts(), min_size=1, max_size=4))
    def holds(arguments: list[str]) -> None:
        wanted = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
        assert shared.run(["printf", "%s\\0", *arguments]).stdout == wanted
        line = "printf '%s\\0' " + " ".join(map(quoted, arguments))
        assert shared.run(line).stdout == wanted
        assert shell.run(line, timeout=seconds(60)).stdout == wanted

    holds()


@pytest.mark.parametrize("count", TIERS)
def test_any_heredoc_arrives_as_it_was_written(shell: Shell, count: int) -> None:
    @examples(count)
    @given(text=texts().filter(lambda text: "E_O_F" not in text))
    def holds(text: str) -> None:
        result = shell.run(f"cat <<'E_O_F'\n{text}\nE_O_F", timeout=seconds(60))
        assert (result.stdout, result.exit_code) == (os.fsencode(text) + b"\n", 0)

    holds()


@pytest.mark.parametrize("count", TIERS)
def test_any_command_text_is_a_result_and_the_shell_goes_on(shell: Shell, count: int) -> None:
    """Also with NULs, half quotes and half surrogate pairs; what it does is bash's."""
    words = ["'", '"', "`", "$(", "<<X", "((", "[[", "{", "}", ")", ";;", "&", "|", "#", "if", "then", "do", "done",
             "case", "esac", "function", "!", "\\", "exit", "return"]
    snippets = st.sampled_from([*words, "\0", "\ud800", "\n", "\t", " "])

    @examples(count)
    @given(parts=st.lists(st.one_of(snippets, st.text("abc 19=$", max_size=5)), max_size=12))
    def holds(parts: list[str]) -> None:
        result = shell.run("".join(parts), timeout=seconds(60))
        assert 0 <= result.exit_code <= 255 and not result.timed_out
        assert shell.run("echo on", timeout=seconds(60)).stdout == b"on\n"

    holds()


@pytest.mark.parametrize("count", TIERS)
def test_any_environment_arrives_as_it_was_given(shared: Sandbox, count: int) -> None:
    keys = st.text("ABCXYZ_abc019", min_size=1, max_size=9).map(lambda key: f"V_{key}")

    @examples(count)
    @given(env=st.dictionaries(keys, texts(), max_size=5))
    def holds(env: dict[str, str]) -> None:
        wanted = {f"{key}={value}".encode(errors="surrogateescape") for key, value in env.items()}
        for stdout in (
            shared.run(["env", "-0"], env=env).stdout, shared.shell(env=env).run("env -0", timeout=seconds(60)).stdout,
        ):
            assert {pair for pair in stdout.split(b"\0") if pair.startswith(b"V_")} == wanted
        shared.freeze()  # shells live as long as their sandbox, and these are many

    holds()


@pytest.mark.parametrize("count", TIERS)
def test_what_a_shell_exports_is_there_after_its_end(shell: Shell, count: int) -> None:
    @examples(count)
    @given(value=texts())
    def holds(value: str) -> None:
        shell.run(f"export VALUE={quoted(value)}", timeout=seconds(60))
        assert shell.run("exit 3", timeout=seconds(60)).exit_code == 3
        result = shell.run("printf '%s' \"$VALUE\"", timeout=seconds(60))
        assert result.stdout == os.fsencode(value)

    holds()


@examples(200)
@given(
    limit=st.integers(2, 400),
    parts=st.lists(st.tuples(st.sampled_from([1, 1, 2]), st.binary(min_size=1, max_size=150)), max_size=30),
)
def test_of_output_beyond_the_limit_head_and_tail_are_kept_and_the_rest_is_counted(
    limit: int, parts: list[tuple[int, bytes]]
) -> None:
    capture = Capture(limit)
    for stream, data in parts:
        capture.add(stream, data)
    for stream in (1, 2):
        whole = b"".join(data for of, data in parts if of == stream)
        marker = f"\n[... {capture.dropped[stream]} bytes of output were cut here ...]\n".encode()
        kept = b"".join(data for of, data in capture.chunks() if of == stream)
        if not capture.dropped[stream]:
            assert kept == whole and len(whole) <= limit
            continue
        head, found, tail = kept.partition(marker)
        assert found and whole.startswith(head) and whole.endswith(tail) and len(head) == limit // 2
        assert len(tail) <= limit // 2 and len(head) + len(tail) + capture.dropped[stream] == len(whole)
        if not any(of != stream for of, _ in parts):
            assert len(tail) == limit // 2
