"""The wire, fuzzed: whatever an init that the agent took over sends ends its own sandbox, and touches nothing else."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import CommandResult, Sandbox, SandboxSpec, wire
from skyrl_minisandbox.sandbox.wire import Answer, Ask
from tests.sandbox.stand_in import DONE, MEMBER, OF_FILES, REQUESTS, StandIn, examples, payloads, streams, watched
from tests.support import REPOSITORY, atheris_directory, needs, seconds

MIB = 1 << 20


@pytest.fixture(scope="module")
def witness(spec: SandboxSpec) -> Iterator[Sandbox]:
    """Another sandbox of the same launcher. It answers all the time."""
    with Sandbox(spec) as sandbox:
        yield sandbox


def answers(witness: Sandbox) -> bool:
    return bool(watched(witness, lambda: witness.run("echo on", timeout=seconds(30)).output).value == "on\n")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def held() -> tuple[int, int]:
    """What this process holds: threads and descriptors."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def nothing_more(before: tuple[int, int]) -> bool:
    """Whether no more is held than before; less is what the collector took of an earlier test."""
    return all(now <= then for now, then in zip(held(), before, strict=True))


def judge(spec: SandboxSpec, witness: Sandbox, name: str, stream: bytes) -> None:
    """One request, answered by hostile bytes and EOF."""
    before = held()
    with StandIn(spec) as evil:
        evil.send(stream)
        ended = watched(evil.sandbox, lambda: REQUESTS[name](evil.sandbox))
        if ended.error is None:
            assert ended.value is None or isinstance(ended.value, CommandResult | bytes | list) or name == "snapshot"
        elif isinstance(ended.error, SandboxGone):
            assert str(ended.error).startswith("the sandbox ")
            if "was ended" in str(ended.error):
                assert not alive(evil.init)
            again = watched(evil.sandbox, lambda: evil.sandbox.run("true"))
            assert isinstance(again.error, SandboxGone), again
        else:
            assert isinstance(ended.error, OSError) and name in OF_FILES, repr(ended.error)
    assert not alive(evil.init)
    assert answers(witness)
    assert nothing_more(before), (held(), before)


@needs("hypothesis", "userns", "overlay")
@examples(100)
@given(name=st.sampled_from(sorted(REQUESTS)), stream=streams())
def test_hostile_bytes_end_only_their_sandbox(spec: SandboxSpec, witness: Sandbox, name: str, stream: bytes) -> None:
    judge(spec, witness, name, stream)


@pytest.mark.ci
@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_bytes_end_only_their_sandbox_more_often(spec: SandboxSpec, witness: Sandbox, name: str) -> None:
    @examples(80)
    @given(stream=streams())
    def fuzz(stream: bytes) -> None:
        judge(spec, witness, name, stream)

    fuzz()


@pytest.mark.parametrize("name", REQUESTS)
def test_the_wrong_kind_of_answer_ends_the_sandbox(spec: SandboxSpec, witness: Sandbox, name: str) -> None:
    wrong = {
        "run": Answer.BYTES, "run for ever": Answer.ERROR, "input": Answer.SHELL, "shell": Answer.READY,
        "long command": Answer.ENDED, "read": Answer.STDOUT, "write": Answer.BYTES, "freeze": Answer.BYTES,
        "put tree": Answer.STDERR, "get tree": Answer.SHELL, "get tree to nowhere": Answer.ENDED,
        "snapshot": Answer.BYTES,
    }
    with StandIn(spec) as evil:
        evil.send(wire.frame(wrong[name], 1, wire.ERRNO.pack(2) + b"text") + wire.frame(Answer.DONE, 1, DONE))
        ended = watched(evil.sandbox, lambda: REQUESTS[name](evil.sandbox))
        assert isinstance(ended.error, SandboxGone) and "was ended" in str(ended.error)
        assert not alive(evil.init)
    assert answers(witness)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_end_of_the_wire_ends_every_request(spec: SandboxSpec, name: str) -> None:
    for stream in (b"", b"\0", wire.frame(Answer.DONE, 1, DONE)[:-1]):
        with StandIn(spec) as evil:
            evil.send(stream)
            ended = watched(evil.sandbox, lambda: REQUESTS[name](evil.sandbox))
            assert isinstance(ended.error, SandboxGone)


def test_an_answer_that_comes_before_its_question_ends_the_sandbox(spec: SandboxSpec, witness: Sandbox) -> None:
    with StandIn(spec) as evil:
        evil.send(b"".join(wire.frame(Answer.DONE, number, DONE) for number in (1, 2, 3)))
        assert evil.sandbox.run("true", timeout=5).exit_code == 0
        ended = watched(evil.sandbox, lambda: evil.sandbox.run("false", timeout=5))
        assert isinstance(ended.error, SandboxGone)
        assert not alive(evil.init)
    assert answers(witness)


def _pieces(kind: int, payload: bytes) -> Callable[[], Iterator[bytes]]:
    return lambda: itertools.repeat(wire.frame(kind, 1, payload))


# A tree's root, then a file without end, and members without end.
_ROOT = bytes([2]) + b"\0\0" + bytes(8) + b"\0\0" + b"\0\0"
_FILE = bytes([1]) + b"\0\0" + bytes(8) + b"\0\1" + b"\0\0" + b"a"
_PIECE = (1 << 16).to_bytes(4, "big") + b"x" * (1 << 16)
_LINK = bytes([3]) + b"\0\0" + bytes(8) + b"\0\1" + b"\0\1" + b"aa"
FLOODS: dict[str, tuple[str, Callable[[], Iterator[bytes]]]] = {
    "output": ("run for ever", _pieces(Answer.STDOUT, b"x" * MIB)),
    "errors": ("shell", _pieces(Answer.STDERR, b"x" * 1000)),
    "empty output": ("run for ever", _pieces(Answer.STDOUT, b"")),
    "empty output before a deadline": ("run", _pieces(Answer.STDERR, b"")),
    "a file": ("read", _pieces(Answer.BYTES, b"x" * MIB)),
    "an empty file": ("read", _pieces(Answer.BYTES, b"")),
    "names": ("put tree", _pieces(Answer.BYTES, b"name" * 1000)),
    "empty names": ("put tree", _pieces(Answer.BYTES, b"")),
    "ended processes": ("snapshot", _pieces(Answer.ENDED, b"line" * 50)),
    "shells": ("snapshot", _pieces(Answer.SHELL, b"\0" * 7)),
    "an empty tree": ("get tree", _pieces(Answer.BYTES, b"")),
    "a tree with a file": (
        "get tree",
        lambda: itertools.chain([wire.frame(Answer.BYTES, 1, _ROOT + _FILE)],
                                itertools.repeat(wire.frame(Answer.BYTES, 1, _PIECE))),
    ),
    "a tree of links": (
        "get tree",
        lambda: itertools.chain([wire.frame(Answer.BYTES, 1, _ROOT)],
                                itertools.repeat(wire.frame(Answer.BYTES, 1, _LINK))),
    ),
    "a tree that cannot be laid down": (
        "get tree to nowhere",
        lambda: itertools.chain([wire.frame(Answer.BYTES, 1, _ROOT + _FILE)],
                                itertools.repeat(wire.frame(Answer.BYTES, 1, _PIECE))),
    ),
    "answers to nobody": ("run for ever", lambda: itertools.repeat(wire.frame(Answer.DONE, 7, DONE))),
    "zeros": ("run for ever", lambda: itertools.repeat(bytes(1 << 16))),
}


@pytest.mark.parametrize("name", FLOODS)
def test_bytes_without_end_end_the_sandbox_and_memory_stays_flat(
    spec: SandboxSpec, witness: Sandbox, name: str
) -> None:
    request, flood = FLOODS[name]
    before = held()
    with StandIn(spec) as evil:
        tracemalloc.start()
        try:
            evil.swallow()
            evil.flood(flood())
            ended = watched(evil.sandbox, lambda: REQUESTS[request](evil.sandbox), 30)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert isinstance(ended.error, SandboxGone) and "was ended" in str(ended.error), ended
        assert peak < 40 * MIB
        assert not alive(evil.init)
    assert answers(witness)
    assert nothing_more(before), (held(), before)


def _member(kind: int, path: bytes, target: bytes = b"") -> bytes:
    content = b"\0\0\0\1x\0\0\0\0" if kind == 1 else b""
    return MEMBER.pack(kind, 0o755, 0, len(path), len(target)) + path + target + content


@pytest.mark.parametrize(
    "stream",
    [
        _member(1, b"") + _member(1, b"beside"),
        _member(2, b"") + _member(2, b"a") + _member(1, b"a/../../beside"),
        _member(2, b"") + _member(3, b"a", b"..") + _member(1, b"a/beside"),
    ],
    ids=["beside a file", "by a parent", "through a link"],
)
def test_a_tree_from_inside_stays_in_its_place(spec: SandboxSpec, tmp_path: Path, stream: bytes) -> None:
    with StandIn(spec) as evil:
        evil.send(wire.frame(Answer.BYTES, 1, stream) + wire.frame(Answer.DONE, 1, DONE))
        ended = watched(evil.sandbox, lambda: evil.sandbox.get_tree("/testbed", tmp_path / "target"))
        assert isinstance(ended.error, SandboxGone | OSError), ended
    assert os.listdir(tmp_path) == ["target"]


@pytest.mark.parametrize("name", ["run", "shell", "read", "write", "freeze", "put tree", "get tree", "snapshot"])
@pytest.mark.parametrize(
    "drips", [pytest.param(False, id="silent"), pytest.param(True, id="dripping", marks=pytest.mark.ci)]
)
def test_an_init_that_does_not_answer_is_ended_at_the_deadline(
    spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch, name: str, drips: bool
) -> None:
    monkeypatch.setattr("skyrl_minisandbox.sandbox.box.ANSWER_SLACK", 0.3)
    monkeypatch.setattr("skyrl_minisandbox.sandbox.sandbox._HALT_SLACK", 0.3)

    def drip() -> Iterator[bytes]:
        for byte in wire.HEADER.pack(wire.MAX_PAYLOAD, Answer.STDOUT, 1) + bytes(10_000):
            yield bytes([byte])
            time.sleep(0.02)

    with StandIn(spec) as evil:
        evil.swallow()
        if drips:
            evil.flood(drip())
        request = REQUESTS[name] if name not in ("run", "shell") else lambda sandbox: sandbox.run("true", timeout=0.1)
        ended = watched(evil.sandbox, lambda: request(evil.sandbox), 30)
        assert isinstance(ended.error, SandboxGone) and "in time" in str(ended.error), ended
        assert not alive(evil.init)


@pytest.mark.parametrize("name", ["input", "long command", "write", "put tree"])
def test_an_init_that_does_not_read_is_ended_at_the_deadline(
    spec: SandboxSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr("skyrl_minisandbox.sandbox.box.ANSWER_SLACK", 0.3)
    (tmp_path / "file").write_bytes(b"x" * (4 * MIB))
    much = b"x" * (4 * MIB)
    requests: dict[str, Callable[[Sandbox], object]] = {
        "input": lambda sandbox: sandbox.run(["cat"], input=much, timeout=0.2),
        "long command": lambda sandbox: sandbox.shell().run(much.decode(), timeout=0.2),
        "write": lambda sandbox: sandbox.write_file("/testbed/new", much),
        "put tree": lambda sandbox: sandbox.put_tree(tmp_path, "/testbed/tree"),
    }
    with StandIn(spec) as evil:
        ended = watched(evil.sandbox, lambda: requests[name](evil.sandbox), 30)
        assert isinstance(ended.error, SandboxGone), ended
        assert not alive(evil.init)


# Towards init


def asks() -> st.SearchStrategy[bytes]:
    """What no owner of ours sends: init may answer with an error or end, but never hangs."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=8) | st.floats(allow_nan=True),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    )
    keys = st.sampled_from(["argv", "env", "cwd", "user", "timeout", "input", "shell", "command", "size", "path",
                            "limit", "mode", "max_bytes", "max_members"])
    objects = st.dictionaries(keys, values, max_size=6).map(lambda value: json.dumps(value).encode())
    whole = st.builds(
        wire.frame, st.one_of(st.sampled_from([*map(int, Ask)]), st.integers(0, 255)), st.integers(0, 3),
        st.one_of(objects, payloads()),
    )
    return st.lists(st.one_of(whole, whole, st.binary(max_size=40)), max_size=6).map(b"".join)


def towards_init(spec: SandboxSpec, witness: Sandbox, stream: bytes) -> None:
    with Sandbox(spec) as sandbox:
        sandbox._box._sock.sendall(stream)
        sandbox._box._sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + seconds(30)
        while alive(sandbox.pid) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert not alive(sandbox.pid)
    assert answers(witness)


@examples(40)
@given(stream=asks())
def test_garbage_towards_init_neither_holds_it_nor_outlives_it(
    spec: SandboxSpec, witness: Sandbox, stream: bytes
) -> None:
    towards_init(spec, witness, stream)


@pytest.mark.ci
@examples(300)
@given(stream=asks())
def test_garbage_towards_init_neither_holds_it_nor_outlives_it_more_often(
    spec: SandboxSpec, witness: Sandbox, stream: bytes
) -> None:
    towards_init(spec, witness, stream)


# The reader of frames, on both sides


@examples(200)
@given(
    parts=st.lists(st.tuples(st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.binary(max_size=50)), max_size=9),
    cuts=st.lists(st.integers(0, 600), max_size=9),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    parts: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(wire.frame(*part) for part in parts)
    reader = wire.FrameReader()
    found = []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        found += reader.feed(stream[start:end])
    assert found == parts


@examples(200)
@given(chunks=st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_frames_or_an_error_and_are_not_kept(chunks: list[bytes]) -> None:
    reader = wire.FrameReader()
    taken = given_back = 0
    for chunk in chunks:
        taken += len(chunk)
        try:
            for kind, request, payload in reader.feed(chunk):
                assert 0 <= kind < 256 and 0 <= request < 1 << 32 and len(payload) <= wire.MAX_PAYLOAD
                given_back += wire.HEADER.size + len(payload)
        except wire.ProtocolError:
            return
        assert len(reader._buffer) == taken - given_back <= wire.HEADER.size + wire.MAX_PAYLOAD


@pytest.mark.night
@needs("atheris")
def test_a_coverage_guided_fuzzer_finds_nothing(tmp_path: Path) -> None:
    """tests/sandbox/fuzz_wire.py for MINISANDBOX_FUZZ_SECONDS, 60 unless told."""
    limit = int(os.environ.get("MINISANDBOX_FUZZ_SECONDS") or 60)
    (tmp_path / "corpus").mkdir()
    path = os.pathsep.join([str(atheris_directory()), str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("fuzz_wire.py"), f"-max_total_time={limit}", "-max_len=4096",
         "-timeout=20", "-rss_limit_mb=1024", f"-artifact_prefix={tmp_path}/", tmp_path / "corpus"],
        env={**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True,
        errors="replace", timeout=seconds(limit + 120), check=False,
    )
    told = done.stdout[-3000:] + done.stderr[-3000:]
    print(told[-300:])
    assert done.returncode == 0 and re.search(r"Done [1-9][0-9]{3,} runs", told), told
