"""The persistent shell: every row that breaks a terminal-driven one gives the right result, and the shell lives on."""

from __future__ import annotations

import time

import pytest

from skyrl_minisandbox.sandbox import Sandbox, Shell
from tests.support import seconds


@pytest.fixture
def shell(sandbox: Sandbox) -> Shell:
    return sandbox.shell()


def test_directory_variables_functions_and_status_stay(shell: Shell) -> None:
    shell.run("cd /tmp; export EXPORTED=1; PLAIN=2; f() { echo from f; }")
    assert shell.run("pwd; echo $EXPORTED $PLAIN; f").output == "/tmp\n1 2\nfrom f\n"
    assert shell.run("false").exit_code == 1
    assert shell.run("echo $?").output == "1\n"


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [("exit 3", 3), ("set -e; false", 1), ("exec true", 0), ("exec bash -c 'exit 7'", 7), ("kill -9 $$", 137)],
)
def test_a_shell_that_ends_gives_its_code_and_a_fresh_one_goes_on(shell: Shell, command: str, exit_code: int) -> None:
    shell.run("cd /tmp; export KEPT=yes; f() { echo f; }")
    result = shell.run(command, timeout=seconds(10))
    assert (result.exit_code, result.timed_out) == (exit_code, False)
    assert "started anew in /tmp" in result.notice
    assert shell.run("pwd; echo $KEPT; f").output == "/tmp\nyes\nf\n"


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("printf 'a\\tb'", "a\tb"),
        ("printf 'a\tb'", "a\tb"),
        ('echo "foo!bar"', "foo!bar\n"),
        ("cat <<'EOF'\n$x `y` !z\nEOF", "$x `y` !z\n"),
        ("case x in x) echo case;; esac", "case\n"),
        ("for ((i=0;i<3;i++)); do echo -n $i; done", "012"),
        ("[[ a == a ]] && echo yes", "yes\n"),
        ("cat; echo end", "end\n"),
        ("read x; echo got:$x", "got:\n"),
        ("export PS1='$ '; echo ok", "ok\n"),
        ("echo $((6*7)) # comment", "42\n"),
    ],
)
def test_what_a_terminal_would_garble_is_right(shell: Shell, command: str, output: str) -> None:
    assert shell.run(command, timeout=seconds(10)).output == output
    assert shell.run("echo next").output == "next\n"


def test_a_syntax_error_is_a_result(shell: Shell) -> None:
    result = shell.run("if true; then")
    assert result.exit_code != 0 and "syntax error" in result.output
    assert shell.run("echo next").output == "next\n"


def test_a_command_of_ten_megabytes(shell: Shell) -> None:
    result = shell.run("cat > /tmp/big <<'EOF'\n" + "y" * 10_000_000 + "\nEOF\nwc -c < /tmp/big", timeout=seconds(30))
    assert result.output == "10000001\n"


def test_an_earlier_background_job_does_not_write_into_a_later_result(shell: Shell) -> None:
    first = shell.run("(sleep 0.2; echo late) & echo started", timeout=seconds(10))
    assert first.output.startswith("started") and "late" not in first.output
    time.sleep(0.4)
    assert shell.run("echo clean").output == "clean\n"


def test_a_timeout_kills_the_command_and_spares_the_shell_and_its_jobs(shell: Shell) -> None:
    job = shell.run("cd /tmp; PLAIN=kept; sleep 300 & echo $!").output.split()[-1]
    result = shell.run("echo before; sleep 300; echo never", timeout=seconds(0.4))
    assert result.timed_out and result.exit_code == 124
    assert result.output.startswith("before\n")
    assert shell.run(f"pwd; kill -0 {job} && echo job lives").output == "/tmp\njob lives\n"


def test_a_loop_without_processes_costs_the_shell_nothing(shell: Shell) -> None:
    shell.run("cd /tmp; KEPT=yes")
    result = shell.run("while :; do :; done", timeout=seconds(0.3))
    assert result.timed_out and not result.notice
    assert shell.run("pwd; echo $KEPT").output == "/tmp\nyes\n"


def test_a_loop_that_listens_to_nothing_costs_the_shell_but_not_its_state(shell: Shell) -> None:
    shell.run("cd /tmp; export KEPT=yes")
    result = shell.run("trap '' $(seq 1 64); while :; do :; done", timeout=seconds(0.3))
    assert result.timed_out and result.notice
    assert shell.run("pwd; echo $KEPT").output == "/tmp\nyes\n"


def test_closing_every_descriptor_loses_at_most_the_shell(shell: Shell) -> None:
    shell.run("cd /tmp")
    shell.run("for n in $(seq 0 255); do eval \"exec $n>&-\" 2>/dev/null; done", timeout=seconds(3))
    assert shell.run("pwd", timeout=seconds(10)).output == "/tmp\n"


def test_two_shells_are_apart(sandbox: Sandbox) -> None:
    one, two = sandbox.shell(), sandbox.shell(cwd="/")
    one.run("X=1; cd /tmp")
    assert two.run("echo $X; pwd").output == "\n/\n"
    assert one.run("echo $X; pwd").output == "1\n/tmp\n"


def test_many_commands_in_turn_are_each_answered_by_their_own_output(shell: Shell) -> None:
    for turn in range(200):
        assert shell.run(f"echo token-{turn}").output == f"token-{turn}\n"


def test_a_pipe_where_our_file_was_holds_nobody(sandbox: Sandbox, shell: Shell) -> None:
    shell.run("true")
    shell.run("cd /dev/.minisandbox; rm -f *; mkfifo s1.command s2.state", timeout=seconds(10))
    assert shell.run("echo on", timeout=seconds(10)).output == "on\n"
    assert sandbox.shell().run("echo on", timeout=seconds(10)).output == "on\n"


def test_a_shell_whose_input_was_filled_gives_way_to_a_fresh_one(shell: Shell) -> None:
    fill = "(printf 'sleep 1000000\\n'; head -c 200000 /dev/zero) > /proc/$p/fd/0"
    shell.run(f"p=$$; (sleep 0.2; {fill}) & true", timeout=seconds(10))
    time.sleep(1)
    refused = shell.run("echo on", timeout=seconds(10))
    assert refused.exit_code == 126 or refused.output == "on\n"
    assert shell.run("echo on", timeout=seconds(10)).output == "on\n"


def test_half_a_surrogate_pair_is_a_result(shell: Shell) -> None:
    assert shell.run("echo 'a\ud800b'").output == "a?b\n"
    assert shell.run("echo on").output == "on\n"


def test_a_command_that_removes_our_files_costs_no_later_output(shell: Shell) -> None:
    assert shell.run("rm -rf /dev/.minisandbox/*; echo gone").output == "gone\n"
    assert shell.run("echo here; for f in /dev/.minisandbox/*; do rm -f $f; mkdir -p $f; done").output == "here\n"
    assert shell.run("echo still here").output == "still here\n"
    shell.run("rm -rf /dev/.minisandbox/*")
    assert shell.run("echo at last").output == "at last\n"
