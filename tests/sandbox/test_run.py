"""`run`: stateless commands, and what becomes of them."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import pytest

from skyrl_minisandbox.errors import SandboxError, SandboxGone
from skyrl_minisandbox.sandbox import Limits, Sandbox, SandboxSpec
from tests.support import seconds

MIB = 1 << 20


def test_streams_and_exit_code_are_apart(sandbox: Sandbox) -> None:
    result = sandbox.run("echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit_code) == (b"out\n", b"err\n", 3)
    assert sorted(result.output.split()) == ["err", "out"]


def test_binary_output_and_input_survive(sandbox: Sandbox) -> None:
    data = bytes(range(256)) * 2000
    assert sandbox.run(["cat"], input=data).stdout == data
    assert sandbox.run(["cat"], input=io.BytesIO(data)).stdout == data


def test_input_that_nobody_reads_does_not_hang(sandbox: Sandbox) -> None:
    assert sandbox.run(["true"], input=b"x" * 8_000_000, timeout=seconds(20)).exit_code == 0
    assert sandbox.run(["sleep", "30"], input=b"x" * 8_000_000, timeout=seconds(0.3)).timed_out
    assert sandbox.run("echo next").output == "next\n"


def test_a_list_is_no_shell(sandbox: Sandbox) -> None:
    assert sandbox.run(["echo", "$HOME;", "a  b"]).output == "$HOME; a  b\n"


def test_environment_is_what_was_given(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox(env={"A": "1", "B": "2"})
    result = sandbox.run("env -0", env={"B": "3"})
    env = dict(pair.split("=", 1) for pair in result.stdout.decode().split("\0") if pair)
    assert (env.pop("A"), env.pop("B")) == ("1", "3")
    assert set(env) <= {"PATH", "HOME", "TERM", "LANG", "PWD", "SHLVL", "_"}


def test_a_missing_program_or_directory_is_a_result(sandbox: Sandbox) -> None:
    assert sandbox.run(["no-such-program"]).exit_code == 127
    assert "no-such-program" in sandbox.run(["no-such-program"]).output
    result = sandbox.run("pwd", cwd="/no/such")
    assert (result.exit_code, result.output) == (126, "cannot start in /no/such: No such file or directory\n")


def test_a_command_that_is_too_long_is_a_result(sandbox: Sandbox) -> None:
    for length in (200_000, 3_000_000):
        result = sandbox.run(["echo", "x" * length])
        assert result.exit_code == 126 and "Argument list too long" in result.output
    assert sandbox.run("echo on").output == "on\n"


def test_a_signal_is_told_as_a_shell_tells_it(sandbox: Sandbox) -> None:
    assert sandbox.run("kill -TERM $$").exit_code == 143


def test_a_timeout_kills_the_tree_and_keeps_the_output(sandbox: Sandbox) -> None:
    result = sandbox.run("echo before; (sleep 4321 & sleep 4321); echo after", timeout=seconds(0.4))
    assert (result.timed_out, result.exit_code, result.output) == (True, 124, "before\n")
    assert "4321" not in sandbox.run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '").output.replace("cat", "")


def test_a_command_that_ignores_signals_ends_at_its_timeout(sandbox: Sandbox) -> None:
    started = time.monotonic()
    result = sandbox.run("trap '' INT TERM HUP QUIT; while :; do sleep 0.05; done", timeout=seconds(0.3))
    assert result.timed_out and time.monotonic() - started < seconds(10)


def test_a_background_job_does_not_hold_the_result_and_lives_on(sandbox: Sandbox) -> None:
    result = sandbox.run("(while :; do echo alive; sleep 0.01; done) & echo $!", timeout=seconds(20))
    assert not result.timed_out
    pid = result.output.split()[0] if result.output.split()[0].isdigit() else result.output.split()[-1]
    time.sleep(0.2)
    assert sandbox.run(f"kill -0 {pid}").exit_code == 0


def test_very_many_background_jobs_are_no_exception(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox(limits=Limits(processes=100, disk=MIB, memory=1 << 30))
    # dash, as bash tries a refused fork again for 15 seconds
    codes = [sandbox.run(["dash", "-c", "sleep 600 & true"], timeout=seconds(30)).exit_code for _ in range(120)]
    assert codes[:50] == [0] * 50 and codes[-1] != 0  # at the process limit a command is refused, as a shell does
    sandbox.freeze()
    assert sandbox.run("echo on").output == "on\n"


def test_output_beyond_the_limit_keeps_head_and_tail(sandbox: Sandbox) -> None:
    result = sandbox.run("echo first; head -c 50000000 /dev/zero | tr '\\0' x; echo; echo last")
    assert result.truncated and result.exit_code == 0
    assert result.stdout.startswith(b"first\n") and result.stdout.endswith(b"\nlast\n")
    assert len(result.stdout) < 3 * sandbox.spec.limits.output
    assert b"bytes of output were cut here" in result.stdout


def test_one_command_may_have_another_output_limit(sandbox: Sandbox) -> None:
    size = 2 * sandbox.spec.limits.output
    whole = sandbox.run(f"head -c {size} /dev/zero; echo told >&2", output=2 * size)
    assert not whole.truncated and (len(whole.stdout), whole.stderr) == (size, b"told\n")
    short = sandbox.run("head -c 50000 /dev/zero", output=1000)
    assert short.truncated and len(short.stdout) < 2000
    assert sandbox.run(f"head -c {size} /dev/zero").truncated


def test_commands_of_several_threads_do_not_mix(sandbox: Sandbox) -> None:
    wrong: list[str] = []

    def work(name: str) -> None:
        for turn in range(10):
            if sandbox.run(["echo", f"{name}-{turn}"]).output != f"{name}-{turn}\n":
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_close_ends_a_command_under_way(open_sandbox: Callable[..., Sandbox]) -> None:
    sandbox = open_sandbox()
    timer = threading.Timer(0.2, sandbox.close)
    timer.start()
    with pytest.raises(SandboxGone, match="closed"):
        sandbox.run("sleep 60")
    timer.join()
    with pytest.raises(SandboxGone, match="closed"):
        sandbox.run("true")
    sandbox.close()


def test_interrupt_ends_the_command_and_keeps_the_sandbox(sandbox: Sandbox) -> None:
    timer = threading.Timer(0.2, sandbox.interrupt)
    timer.start()
    assert sandbox.run("sleep 60", timeout=seconds(30)).exit_code == 137
    timer.join()
    assert sandbox.run("echo on").output == "on\n"


def test_interrupt_is_heard_while_a_command_does_not_take_its_input(sandbox: Sandbox) -> None:
    timer = threading.Timer(0.3, sandbox.interrupt)
    timer.start()
    assert sandbox.run(["sleep", "60"], input=bytes(32 << 20), timeout=seconds(30)).exit_code == 137
    timer.join()
    assert sandbox.run("echo on").output == "on\n"


def test_what_cannot_go_together_is_refused_with_both_names(spec: SandboxSpec) -> None:
    import dataclasses

    odd = dataclasses.replace(spec, limits=Limits(memory=1 << 30, disk=1 << 30))
    with pytest.raises(SandboxError, match=r"limits.disk .* limits.memory"):
        Sandbox(odd)
    with pytest.raises(SandboxError, match="at least one layer"):
        Sandbox(dataclasses.replace(spec, layers=()))


def test_a_layer_that_is_not_there_is_named(spec: SandboxSpec) -> None:
    import dataclasses
    from pathlib import Path

    with pytest.raises(SandboxError, match="layer /no/such/layer"):
        Sandbox(dataclasses.replace(spec, layers=(Path("/no/such/layer"),)))
