"""A command that is out of time ends with everything that it started, and with nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from skyrl_minisandbox.sandbox import Limits, Sandbox
from tests.support import seconds

# Forks twice and is in a session of its own, as daemons do; its parent is gone, and its name is `sleep N`.
DAEMON = "(setsid setsid sleep {0} >/dev/null 2>&1 &) ; "
BOMB = "python3 -c 'import os\nwhile True:\n try: os.fork(); os.setsid()\n except OSError: pass'"


def living(sandbox: Sandbox, mark: str) -> bool:
    """Whether a `sleep MARK` comes to live inside, within some time."""
    deadline = time.monotonic() + seconds(10)
    while not (found := lives(sandbox, mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def lives(sandbox: Sandbox, mark: str) -> bool:
    return sandbox.run(f"grep -qzx '[{mark[0]}]{mark[1:]}' /proc/[0-9]*/cmdline 2>/dev/null").exit_code == 0


def of_each(sandbox: Sandbox, mark: str, command: str) -> str:
    """What a command prints for each `sleep MARK` inside, whose /proc directory is $p."""
    mark = f"[{mark[0]}]{mark[1:]}"
    loop = f"for p in /proc/[0-9]*; do if grep -qzx '{mark}' $p/cmdline 2>/dev/null; then {command}; fi; done"
    return sandbox.run(loop).output


def states(sandbox: Sandbox) -> list[str]:
    """One letter each: of the daemons 1111 and 2222."""
    return [of_each(sandbox, mark, "sed -n 's/^State:.//p' $p/status")[:1] for mark in ("1111", "2222")]


def test_a_timeout_ends_the_daemons_of_its_command_and_no_older_ones(sandbox: Sandbox) -> None:
    sandbox.run(DAEMON.format(1111) + "sleep 2222 & true")
    assert living(sandbox, "1111") and living(sandbox, "2222")
    result = sandbox.run(DAEMON.format(3333) + "sleep 4444 & nohup sleep 5555 & echo begun; sleep 6666", timeout=1)
    assert result.timed_out and result.output.startswith("begun")
    assert not any(lives(sandbox, mark) for mark in ("3333", "4444", "5555", "6666"))
    assert living(sandbox, "1111") and living(sandbox, "2222")


def test_a_timeout_in_a_shell_spares_its_earlier_jobs_and_the_other_shells(sandbox: Sandbox) -> None:
    shell, other = sandbox.shell(), sandbox.shell()
    other.run("HERE=other; sleep 1111 & true")
    shell.run("HERE=mine; sleep 2222 & " + DAEMON.format(3333) + "true")
    # A job of before that goes on making processes is still the older one.
    shell.run("(while :; do sleep 4444 & wait; done) & true")
    assert all(living(sandbox, mark) for mark in ("1111", "2222", "3333", "4444"))
    assert shell.run(DAEMON.format(5555) + "(trap '' INT TERM HUP; sleep 6666) ", timeout=1).timed_out
    assert not any(lives(sandbox, mark) for mark in ("5555", "6666"))
    assert all(living(sandbox, mark) for mark in ("1111", "2222", "3333", "4444"))
    assert shell.run("echo $HERE").output == "mine\n" and other.run("echo $HERE").output == "other\n"


def test_a_job_of_before_may_lose_its_parent_while_a_command_runs_out_of_time(sandbox: Sandbox) -> None:
    shell = sandbox.shell()
    shell.run("(sleep 0.5; (sleep 1111 &) ) & true")
    assert sandbox.run("sleep 30", timeout=2).timed_out  # 1111 is younger than this one, and an orphan
    assert living(sandbox, "1111")


@pytest.mark.parametrize("where", ["run", "shell"])
def test_a_fork_bomb_that_is_out_of_time_is_ended(open_sandbox: Callable[..., Sandbox], where: str) -> None:
    sandbox = open_sandbox(limits=Limits(memory=1 << 30, disk=1 << 26, processes=150))
    sandbox.run(DAEMON.format(1111) + DAEMON.format(2222))
    assert living(sandbox, "1111") and living(sandbox, "2222")
    of_each(sandbox, "2222", "kill -STOP ${p#/proc/}")
    assert states(sandbox) == ["S", "T"]
    run = sandbox.run if where == "run" else sandbox.shell().run
    began = time.monotonic()
    assert run(BOMB, timeout=2).timed_out
    assert time.monotonic() - began < seconds(20)
    assert states(sandbox) == ["S", "T"], "they are as they were"
    deadline = time.monotonic() + seconds(10)  # all are killed; a machine that is busy takes a moment to end them
    while (left := int(sandbox.run("ls -d /proc/[0-9]* | wc -l").output)) >= 10 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert left < 10


def test_what_runs_inside_is_a_child_of_init_when_its_parent_has_gone(sandbox: Sandbox) -> None:
    """No subreaper between: programs ask for a parent of 1 to see that theirs has died."""
    orphan = "import os, time\nif os.fork(): time.sleep(1)\nelif not os.fork(): time.sleep(0.3); print(os.getppid())"
    assert sandbox.run(["python3", "-c", orphan]).output == "1\n"
    ended = sandbox.run("(setsid sh -c 'echo $$ > /tmp/pid' &); sleep 0.5; kill -0 $(cat /tmp/pid)")
    assert ended.exit_code != 0  # reaped, though nothing here waits for strangers


@pytest.mark.parametrize(
    "command",
    ["sleep 100; touch late", "for i in 1 2 3; do sleep 100; touch late; done", "while :; do :; done; touch late",
     "sleep 100 | cat; touch late", "if sleep 100; then :; else touch late; fi", "v=$(sleep 100); touch late",
     "eval 'sleep 100; touch late'", "(sleep 100; touch late)", "sleep 100 || touch late"],
)
def test_a_shell_does_not_go_on_with_a_command_that_took_too_long(sandbox: Sandbox, command: str) -> None:
    shell = sandbox.shell()
    shell.run("rm -f late; here=1; sleep 300 &")
    result = shell.run(command, timeout=0.3)
    assert result.timed_out and result.exit_code == 124
    assert shell.run("sleep 0.2; ls late; echo $here; jobs -r | wc -l").output.split()[-2:] == ["1", "1"]
    assert sandbox.run(["test", "-e", "late"]).exit_code != 0
