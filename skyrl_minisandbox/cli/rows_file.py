"""A JSONL file that one command appends to and the next one goes on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from skyrl_minisandbox.errors import InputError, MachineError


class RowsFile:
    """The rows that are there already, and one more whenever something is finished. Thread-safe.

    A row that was cut off (killed in the middle, a full disk) is taken away when the file is opened again, so
    that what it stood for is done again. Only one process at a time may have it.

    Raises `InputError` when another process has it, `MachineError` when it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()  # keeps lines whole
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{path} is being written by another command", hint="wait for it, or name another: out=DIR"
            ) from None
        self.rows = self._read()

    def _read(self) -> list[dict[str, Any]]:
        rows, good = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            row = None
            with contextlib.suppress(ValueError):
                row = json.loads(line) if line.endswith(b"\n") else None
            if not isinstance(row, dict):
                break
            rows.append(row)
            good += len(line)
        if good < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(good)
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Write one row. Raises `MachineError` for a full disk; the rows before it are whole."""
        data = json.dumps(row, default=str).encode() + b"\n"
        with self._lock:
            size = os.fstat(self._file.fileno()).st_size
            try:
                written = 0
                while written < len(data):
                    written += self._file.write(data[written:])
            except OSError as error:
                with contextlib.suppress(OSError):
                    self._file.truncate(size)  # half a row would hide those that come after it
                raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> MachineError:
        return MachineError(
            f"{self.path} cannot be written: {error.strerror}", hint=f"df -h {self.path.parent}; or another out=DIR"
        )

    def close(self) -> None:
        """Let another command have it. Idempotent."""
        self._file.close()
