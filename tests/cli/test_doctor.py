"""`minisandbox doctor --sandbox`: what a person and a program read, and the exit code."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from skyrl_minisandbox.cli import doctor
from skyrl_minisandbox.cli.main import main
from skyrl_minisandbox.sandbox.self_check import Finding, self_check
from tests.cli.conftest import Command
from tests.support import needs

FEW = ("host-file", "host-tcp", "namespaces", "shell-memory", "limit-output")
NO_USERNS = ["unshare", "-Ur", "bash", "-c", 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"', "bash"]


@pytest.mark.ci
@needs("userns", "overlay")
def test_a_program_reads_every_promise_and_nothing_is_left(minisandbox: Command) -> None:
    done = minisandbox("doctor", "--sandbox", "--json")
    rows = json.loads(done.out)
    assert len(rows) > 50 and len({row["name"] for row in rows}) == len(rows)
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Finding)}
    assert {row["verdict"] for row in rows} <= {"OK", "WEAK", "BAD", "not run"}
    broken = [row["name"] for row in rows if Finding(**row).broken]
    assert done.code == (1 if broken else 0)
    assert "trying owner-killed …" in done.err
    assert broken == [], done.out


@needs("userns", "overlay")
def test_a_person_reads_a_table_and_what_is_behind_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "self_check", functools.partial(self_check, only=FEW))
    assert main(["doctor", "--sandbox"]) == 0
    out = capsys.readouterr().out
    table, _, rest = out.partition("\n\n")
    assert table.splitlines()[0].split() == ["verdict", "name", "promise"]
    assert "OK       host-file     no file of the machine is read" in table
    assert rest.splitlines()[-1].endswith("OK") or " OK, " in rest.splitlines()[-1]
    assert all(len(line) <= 100 for line in out.splitlines())


@needs("userns", "overlay")
def test_a_planted_weakness_exits_1_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weaker = functools.partial(self_check, only=FEW, change=lambda spec: dataclasses.replace(spec, network="host"))
    monkeypatch.setattr(doctor, "self_check", weaker)
    assert main(["doctor", "--sandbox"]) == 1
    out, err = capsys.readouterr()
    assert "BAD      host-tcp: connected" in out
    assert err.splitlines()[-1] == "broken: host-tcp, namespaces"


def test_a_weakness_that_is_accepted_is_no_break_and_another_one_is() -> None:
    accepted = Finding("shell-memory", "", "WEAK", "it opens", accepted="known")
    assert not accepted.broken and dataclasses.replace(accepted, accepted="").broken
    assert Finding("x", "", "BAD", accepted="known").broken and not Finding("x", "", "not run", "why").broken


@needs("userns", "overlay")
def test_a_cache_that_is_there_holds_the_sandboxes_and_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[list[Path]] = []
    few = functools.partial(self_check, only=FEW)

    def watched(**options: Any) -> list[Finding]:
        return few(**{**options, "say": lambda _: used.append(list(tmp_path.iterdir()))})

    monkeypatch.setattr(doctor, "self_check", watched)
    assert main(["doctor", "--sandbox", f"images.cache={tmp_path}"]) == 0
    assert all(used) and not list(tmp_path.iterdir())


@needs("userns")
def test_without_user_namespaces_the_machine_is_at_fault(minisandbox: Command) -> None:
    done = minisandbox("doctor", "--sandbox", prefix=NO_USERNS)
    assert (done.code, done.out) == (3, "")
    assert "minisandbox: no user namespace can be made here" in done.err and "\nhint: " in done.err


def test_an_option_that_is_none_names_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--sandbx"]) == 2
    assert "hint: options: --sandbox, --json, -h, --help" in capsys.readouterr().err
    assert main(["shell", "--sandbox"]) == 2
    assert "hint: options: -h, --help" in capsys.readouterr().err
