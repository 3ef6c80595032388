"""Rows that are appended, cut off, and gone on with."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from skyrl_minisandbox.cli.rows_file import RowsFile
from skyrl_minisandbox.errors import InputError, MachineError


def test_what_was_written_is_there_for_the_next_command(tmp_path: Path) -> None:
    first = RowsFile(tmp_path / "out" / "rows.jsonl")
    first.append({"a": 1})
    first.close()
    second = RowsFile(tmp_path / "out" / "rows.jsonl")
    assert second.rows == [{"a": 1}]
    second.append({"a": 2})
    second.close()
    assert RowsFile(second.path).rows == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("tail", [b'{"a": 2', b'{"a": 2}', b"\x00\x00\x00\n", b"[]\n", b'{"a": "\xff"}\n'])
def test_a_row_that_was_cut_off_is_done_again(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    rows = RowsFile(path)
    assert rows.rows == [{"a": 1}]
    rows.append({"a": 3})
    rows.close()
    assert path.read_bytes() == b'{"a": 1}\n{"a": 3}\n'


def test_two_commands_never_write_the_same_file(tmp_path: Path) -> None:
    first = RowsFile(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="is being written by another command"):
        RowsFile(tmp_path / "rows.jsonl")
    first.close()
    RowsFile(tmp_path / "rows.jsonl").close()


def test_a_row_that_does_not_fit_is_named_and_leaves_no_half_of_it(tmp_path: Path) -> None:
    rows = RowsFile(tmp_path / "rows.jsonl")
    rows.append({"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # Python ignores the signal and gets an error
    try:
        with pytest.raises(MachineError, match=r"rows\.jsonl cannot be written: File too large"):
            rows.append({"a": "x" * 1000})
        rows.append({"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    rows.close()
    rows.close()
    assert RowsFile(rows.path).rows == [{"a": 1}, {"a": 2}]
