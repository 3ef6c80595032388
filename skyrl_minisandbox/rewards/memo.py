"""Verdicts that are kept, so that a patch that was graded before is not run again (`reward.memo=true`).

    CACHE/memo/KEY      SHA-256 of the rest (32 bytes), then zlib of the report as JSON

KEY is a digest of everything that a verdict hangs on: image, tests, gold patch (it decides which files are put
back), grading mode, limits, patch, and the code that judges. What is kept is a verdict of tests that ran to their end:
never an `infra_error`, a sandbox that died, or a time-out, which may all come out otherwise next time. A patch
that is empty or does not apply costs nothing to judge and is not kept either.

One lookup goes to memory first, then to the directory, which all workers of a node share. Both are bounded, the
one used longest ago goes first. An entry is written aside and renamed; one that is damaged is a miss and is
removed. Nothing here is needed: where the directory cannot be written the memo works in memory alone, and says so
once. What it does not do is let one of two gradings that run at the same time wait for the other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.errors import MachineError
from skyrl_minisandbox.images.locks import write_atomic
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards.report import TestReport
from skyrl_minisandbox.sandbox.spec import Limits
from skyrl_minisandbox.tasks.task import Task

logger = logging.getLogger(__name__)

MOST_ENTRIES = 4096
"""Files in the directory: a training step of a thousand rollouts several times over."""

MOST_BYTES = 256 << 20
"""Of all files. A report with its log is 2 to 60 kB; the images beside it are gigabytes."""

LARGEST_ENTRY = 4 << 20
"""Bytes of one, compressed. A larger one has a log like nothing that a test suite prints."""

_LARGEST_REPORT = 64 << 20  # of one, decompressed: several times what a sandbox keeps of an output
_MEMORY_ENTRIES = 256
_MEMORY_BYTES = 16 << 20
_ABANDONED = 3600.0  # seconds after which a file that was written aside has no writer any more
_DIGEST = hashlib.sha256().digest_size

KEPT = frozenset({Outcome.RESOLVED, Outcome.UNRESOLVED, Outcome.TAMPERED})

NOTE = "kept from an earlier grading of the same patch (reward.memo)"


def memo_key(
    task: Task,
    image: str,
    patch: str,
    *,
    grading: GradingConfig,
    limits: Limits,
    timeout: float | None = None,
    needs: Iterable[str] = (),
) -> str:
    """The hex digest that a verdict is kept under.

    image: digest of the image that it is graded in. The other arguments as `grade` and `Sandbox` take them.
    """
    facts = {
        "code": _code(),
        "image": image,
        "workdir": task.recipe.workdir,
        "tests": task.tests.model_dump(mode="json"),
        "gold_patch": task.gold_patch,
        "grading": dataclasses.asdict(grading),
        "limits": dataclasses.asdict(limits),
        "timeout": timeout,
        "needs": sorted(needs),
        "patch": patch,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()  # ASCII: lone surrogates too


@functools.cache
def _code() -> str:
    """Digest of this room's own sources: a judge that was mended must not be told what it said before."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Memo:
    """The verdicts of one node. Any number of them, in any number of processes, may share a directory."""

    def __init__(self, directory: Path, *, most_entries: int = MOST_ENTRIES, most_bytes: int = MOST_BYTES) -> None:
        self.directory = directory
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._lock = threading.Lock()  # guards the three below
        self._memory: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        self._memory_bytes = 0
        self._told = False

    def get(self, key: str) -> TestReport | None:
        """The report that was kept under `key`, with a note that says so; None when there is none."""
        data = self._remembered(key)
        if data is None:
            data = self._read(key)
            if data is None:
                return None
        report = _decode(data)
        if report is None:
            with contextlib.suppress(OSError):
                (self.directory / key).unlink(missing_ok=True)
            return None
        self._remember(key, data)
        return dataclasses.replace(report, notes=(*report.notes, NOTE))

    def put(self, key: str, report: TestReport) -> bool:
        """Keep `report` where it is one that may be kept; returns whether it was. Never raises for the disk."""
        if report.outcome not in KEPT or report.sandbox_died:
            return False
        data = _encode(report)
        if len(data) > LARGEST_ENTRY:
            return False
        self._remember(key, data)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self.directory / key, data)
            self._prune()
        except (OSError, MachineError) as error:
            with self._lock:
                told, self._told = self._told, True
            if not told:
                logger.warning("verdicts are kept in memory alone, %s cannot be written: %s", self.directory, error)
        return True

    def _read(self, key: str) -> bytes | None:
        path = self.directory / key
        try:
            with open(path, "rb") as file:
                data = file.read(LARGEST_ENTRY + 1)
            os.utime(path)  # used now: the last to go
        except OSError:
            return None
        return data

    def _prune(self) -> None:
        """Remove what was used longest ago until the bounds hold. Another process may do the same meanwhile."""
        found: list[tuple[float, int, str]] = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    if not entry.name.startswith("."):
                        found.append((state.st_mtime, state.st_size, entry.path))
                    elif time.time() - state.st_mtime > _ABANDONED:
                        os.unlink(entry.path)
        count, size = len(found), sum(each for _, each, _ in found)
        for _, each, path in sorted(found):
            if count <= self._most_entries and size <= self._most_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            count, size = count - 1, size - each

    def _remembered(self, key: str) -> bytes | None:
        with self._lock:
            if key not in self._memory:
                return None
            self._memory.move_to_end(key)
            return self._memory[key]

    def _remember(self, key: str, data: bytes) -> None:
        with self._lock:
            self._memory_bytes += len(data) - len(self._memory.pop(key, b""))
            self._memory[key] = data
            while len(self._memory) > _MEMORY_ENTRIES or self._memory_bytes > _MEMORY_BYTES:
                _, gone = self._memory.popitem(last=False)
                self._memory_bytes -= len(gone)


@functools.cache
def memo_at(directory: Path) -> Memo:
    """The one of this process for a directory, so that its rollouts share what is in memory."""
    return Memo(directory)


def _encode(report: TestReport) -> bytes:
    packed = zlib.compress(json.dumps(report.to_json()).encode(), 6)
    return hashlib.sha256(packed).digest() + packed


def _decode(data: bytes) -> TestReport | None:
    """None for what is not, whole, what `_encode` made of a report that may be kept."""
    digest, packed = data[:_DIGEST], data[_DIGEST:]
    if hashlib.sha256(packed).digest() != digest:
        return None
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(packed, _LARGEST_REPORT)
        if not unpacker.eof:
            return None
        report = TestReport.from_json(json.loads(text))
    except (zlib.error, ValueError, TypeError, KeyError, AttributeError):
        return None
    return report if report.outcome in KEPT else None
