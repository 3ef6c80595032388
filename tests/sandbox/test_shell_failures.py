"""What breaks an agent's terminal gives the right result here, in the shell and in `run`, and the shell goes on.

The rows come from what other shells for agents are known to fail at; those in test_shell.py are not repeated.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable

import pytest

from skyrl_minisandbox.sandbox import CommandResult, Sandbox, Shell
from tests.support import needs, seconds

MIB = 1 << 20
Execute = Callable[..., CommandResult]


@pytest.fixture
def shell(sandbox: Sandbox) -> Shell:
    """A shell that holds something which must not get lost."""
    made = sandbox.shell()
    assert made.run("cd /tmp; export KEPT=yes; kept() { echo function; }").exit_code == 0
    return made


@pytest.fixture(params=["shell", pytest.param("run", marks=pytest.mark.ci)])
def execute(request: pytest.FixtureRequest, sandbox: Sandbox) -> Execute:
    """Both ways to run a command; the fast tier has test_run.py for the second."""
    return sandbox.shell().run if request.param == "shell" else sandbox.run


def goes_on(shell: Shell) -> bool:
    return shell.run("pwd; echo $KEPT; kept", timeout=seconds(20)).output == "/tmp\nyes\nfunction\n"


# What ends a shell, or leaves it in a state of its own


def test_set_e_ends_the_shell_at_a_later_failure_only(shell: Shell) -> None:
    assert shell.run("set -e").exit_code == 0
    assert shell.run("echo on").output == "on\n"
    result = shell.run("false; echo never", timeout=seconds(20))
    assert (result.exit_code, result.output, result.timed_out) == (1, "", False)
    assert "started anew" in result.notice
    assert goes_on(shell)


@pytest.mark.parametrize(
    ("command", "exit_code", "output"),
    [
        ("exec bash", 0, ""),
        ("exec bash -c 'echo in; exit 7'", 7, "in\n"),
        ("exit 256", 0, ""),
        ("trap 'echo bye' EXIT; exit 4", 4, "bye\n"),
        ("f() { exit 6; }; f", 6, ""),
        ("kill -TERM $$; sleep 1", 143, ""),
    ],
)
def test_an_end_gives_its_code_and_output_and_a_fresh_shell(
    shell: Shell, command: str, exit_code: int, output: str
) -> None:
    result = shell.run(command, timeout=seconds(20))
    assert (result.exit_code, result.output, result.timed_out) == (exit_code, output, False)
    assert "started anew in /tmp" in result.notice
    assert goes_on(shell)


@pytest.mark.parametrize(
    ("command", "exit_code"),
    [("bash", 0), ("sh", 0), ("bash -i 2>/dev/null", 0), ("python3", 0), ("return 5", 5), ("(exit 9)", 9),
     ("! true", 1), ("false || (exit 8)", 8), ("sort; wc -c", 0), ("export PS1='$ ' PROMPT_COMMAND='exit 3'", 0),
     ("fg", 1), ("logout", 1), ("exec 2>&1 >/dev/null", 0), ("exec </dev/null", 0), ("trap '' INT TERM TSTP", 0)],
)
def test_what_does_not_end_the_shell_gives_its_code_and_no_notice(shell: Shell, command: str, exit_code: int) -> None:
    result = shell.run(command, timeout=seconds(20))
    assert (result.exit_code, result.timed_out, result.notice) == (exit_code, False, "")
    assert shell.run("echo $?; pwd").output == f"{exit_code}\n/tmp\n"
    assert goes_on(shell)


@pytest.mark.parametrize(
    "setting",
    ["IFS=0123456789", "IFS=", "set -f", "set -C", "set -u; unset PWD", "PWD=elsewhere", "set -a", "set -x 2>/dev/null",
     "set -o pipefail", "set -o posix", "PATH=", "trap 'echo d >/dev/null' DEBUG", "trap 'true' ERR", "exec 19>&-",
     "umask 777", "printf() { :; }", "export() { :; }", "shopt -s nullglob failglob extglob dotglob", "LC_ALL=C",
     "HISTFILE=/tmp/h; set -o history"],
)
def test_no_setting_of_the_shell_bends_a_result(shell: Shell, setting: str) -> None:
    shell.run(setting, timeout=seconds(20))
    for code in (0, 1, 10, 77, 255):
        result = shell.run(f"(exit {code})", timeout=seconds(20))
        assert (result.exit_code, result.timed_out) == (code, False)
    shell.run("declare -x LATER=on", timeout=seconds(20))
    shell.run("exit 3", timeout=seconds(20))
    assert shell.run("echo $KEPT $LATER", timeout=seconds(20)).output == "yes on\n"


@pytest.mark.parametrize(
    "setting",
    ["set -n", "builtin() { :; }", "readonly __ms=1", "kill -STOP $$",
     "shopt -s expand_aliases; alias builtin=false"],
)
def test_a_shell_that_was_made_dumb_gives_way_to_a_fresh_one(shell: Shell, setting: str) -> None:
    shell.run(setting, timeout=seconds(0.5))
    shell.run("true", timeout=seconds(0.5))
    assert shell.run("echo on", timeout=seconds(20)).output == "on\n"


def test_a_shell_that_ends_at_once_every_time_is_a_result_each_time(sandbox: Sandbox) -> None:
    shell = sandbox.shell(env={"BASH_ENV": "/tmp/env"})
    sandbox.write_file("/tmp/env", b"exit 5\n")
    for _ in range(3):
        result = shell.run("echo never", timeout=seconds(20))
        assert (result.exit_code, result.output, result.timed_out) == (5, "", False)
    sandbox.write_file("/tmp/env", b"")
    assert shell.run("echo on", timeout=seconds(20)).output == "on\n"


# What reads a terminal


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("python3 && echo ended", "ended\n"),
        ("python3 -c 'input()' 2>&1 | tail -n 1", "EOFError: EOF when reading a line\n"),
        ("read -r x || echo no input", "no input\n"),
        ("cat - | wc -c", "0\n"),
        ("bash -s && echo ended", "ended\n"),
        ("tty", "not a tty\n"),
        ("test -t 0 || test -t 1 || echo no terminal", "no terminal\n"),
        ("cat /dev/tty 2>/dev/null || echo no terminal", "no terminal\n"),
        ("select x in a b; do echo $x; done 2>/dev/null; echo ended", "\nended\n"),
    ],
)
def test_who_reads_the_terminal_finds_its_end(execute: Execute, command: str, output: str) -> None:
    result = execute(command, timeout=seconds(20))
    assert (result.output, result.timed_out) == (output, False)


@needs("git")
def test_git_commit_without_a_message_tells_what_it_lacks(execute: Execute) -> None:
    result = execute(
        "git init -q /tmp/r && cd /tmp/r && git config user.email a@b.c && git config user.name n"
        " && touch f && git add f && git commit", timeout=seconds(20),
    )
    assert result.exit_code == 1 and "supply the message" in result.output
    result = execute("cd /tmp/r && EDITOR=cat GIT_EDITOR='sed -i 1imessage' git commit -q && git log --format=%s",
                     timeout=seconds(20))
    assert (result.exit_code, result.output) == (0, "message\n")


FULL_SCREEN = {
    "vi": "vi lower.txt",
    "less": "less +F lower.txt",
    "top": "top",
    "more": "more lower.txt",
    "nano": "nano lower.txt",
    "curses": "python3 -c 'import curses; curses.wrapper(lambda w: w.getch())'",
}


@pytest.mark.parametrize(
    "terminal",
    [pytest.param(False, id="no terminal"), pytest.param(True, id="terminal", marks=pytest.mark.ci)],
)
@pytest.mark.parametrize("name", FULL_SCREEN)
def test_a_full_screen_program_ends_at_the_latest_at_its_timeout(execute: Execute, name: str, terminal: bool) -> None:
    """On a terminal of its own too (`script`, `pexpect`): it then waits for a key that never comes."""
    command = FULL_SCREEN[name]
    if terminal:
        command = f"TERM=xterm python3 -c 'import pty, sys; pty.spawn(sys.argv[1:])' {command}"
    result = execute(f"cd /testbed; echo before; {command}", timeout=seconds(0.5))
    assert result.stdout.startswith(b"before\n") and (result.timed_out or result.exit_code in range(256))
    assert execute("cat /testbed/lower.txt; echo on", timeout=seconds(20)).output == "from the layer\non\n"


# What is long, odd or binary


def test_a_command_longer_than_an_argument_may_be(shell: Shell) -> None:
    text = "x" * 200_000
    command = f"text={text}; echo ${{#text}}; cat > big <<'EOF'\n{text}\nEOF\nwc -c < big"
    result = shell.run(command, timeout=seconds(30))
    assert result.output == "200000\n200001\n"
    assert goes_on(shell)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ('echo "foo!bar" !! !$', "foo!bar !! !$\n"),
        ("printf '%s' 'a\tb\t\tc'", "a\tb\t\tc"),
        ("cat <<-EOF\n\t\tindented\n\tEOF\n", "indented\n"),
        ("cat <<'A' <<\"B\"\n$one\nA\n$two\nB", "$two\n"),
        ("python3 - <<'EOF'\nfor n in range(2):\n\tprint(n, '\\t|')\nEOF", "0 \t|\n1 \t|\n"),
        ("case $((1+1)) in 1) echo one;; 2|3) echo two;& *) echo through;; esac", "two\nthrough\n"),
        ("for ((i=0; i<3; i++)); do echo -n \"$i \"; done", "0 1 2 "),
        ("[[ abc =~ ^a(.)c$ ]] && echo ${BASH_REMATCH[1]}", "b\n"),
        ("a=(1 2 '3 4'); echo ${#a[@]} \"${a[2]}\"", "3 3 4\n"),
        ("cat <(echo one) <(echo two)", "one\ntwo\n"),
        ("echo 'unbalanced \" quote' \"and ' this\"", "unbalanced \" quote and ' this\n"),
        ("echo a\\\nb", "ab\n"),
        ("echo one; # echo two\necho three", "one\nthree\n"),
        ("{ echo group; } ; ( echo sub )", "group\nsub\n"),
        ("true\r\n", None),
        ("echo é ü 日本 🎉", "é ü 日本 🎉\n"),
    ],
)
def test_syntax_that_line_editors_and_parsers_garble_is_plain_here(
    execute: Execute, command: str, output: str | None
) -> None:
    result = execute(command, timeout=seconds(20))
    if output is None:  # a carriage return is part of the name, as bash has it
        assert result.exit_code == 127 and "command not found" in result.output
    else:
        assert (result.output, result.exit_code) == (output, 0)


def test_output_has_nothing_that_the_command_did_not_write(execute: Execute) -> None:
    assert execute("true").stdout == b""
    assert execute("printf a").stdout == b"a"
    assert execute("echo a; echo b").stdout == b"a\nb\n"
    assert execute("printf '\\033[31mred\\033[0m\\r\\n'").stdout == b"\x1b[31mred\x1b[0m\r\n"


def test_output_that_is_no_text_survives(execute: Execute) -> None:
    data = bytes(range(256)) * 3
    program = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 3)"
    result = execute(f"python3 -c '{program}'", timeout=seconds(20))
    assert result.stdout == data
    assert isinstance(result.output, str) and "A" in result.output


def test_run_keeps_stdout_and_stderr_apart(sandbox: Sandbox) -> None:
    result = sandbox.run("for n in 1 2 3; do echo out $n; echo err $n >&2; done; printf '\\377' >&2")
    assert result.stdout == b"out 1\nout 2\nout 3\n"
    assert result.stderr == b"err 1\nerr 2\nerr 3\n\xff"


def test_nothing_writes_a_history(sandbox: Sandbox, shell: Shell) -> None:
    shell.run("echo secret; set -o history; echo more; exit", timeout=seconds(20))
    shell.run("echo again", timeout=seconds(20))
    assert sandbox.run("ls -A /root | grep -i hist").output == ""


# What outlives its command


@pytest.mark.parametrize(
    "start",
    ["nohup sleep 987 &", "setsid sleep 987 &", "(sleep 987 &)", "(setsid sleep 987 &) &", "sleep 987 & disown"],
)
def test_what_is_left_running_does_not_hold_the_result_and_ends_with_the_sandbox(
    sandbox: Sandbox, execute: Execute, start: str
) -> None:
    result = execute(f"{start}\necho started", timeout=seconds(20))
    assert (result.timed_out, result.exit_code) == (False, 0) and "started" in result.output
    assert runs(sandbox, 987)
    sandbox.freeze()
    assert count(sandbox, 987) == 0


def count(sandbox: Sandbox, number: int) -> int:
    """How many `sleep NUMBER` run inside."""
    lines = sandbox.run("for file in /proc/[0-9]*/cmdline; do tr '\\0' ' ' < $file; echo; done 2>/dev/null").stdout
    return lines.splitlines().count(f"sleep {number} ".encode())


def runs(sandbox: Sandbox, number: int) -> bool:
    """Wait until `sleep NUMBER` runs inside: what was started may be just before its exec."""
    deadline = time.monotonic() + seconds(20)
    while time.monotonic() < deadline:
        if count(sandbox, number) == 1:
            return True
        time.sleep(0.02)
    return False


DAEMON = "python3 -c 'import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); os.chdir(\"/\"); " \
    "os.execvp(\"sleep\", [\"sleep\", \"{}\"])' </dev/null >/dev/null 2>&1"


def test_a_timeout_kills_the_daemons_of_its_command_and_no_others(sandbox: Sandbox, execute: Execute) -> None:
    assert execute(DAEMON.format(611), timeout=seconds(20)).exit_code == 0
    assert execute("sleep 622 & true", timeout=seconds(20)).exit_code == 0
    assert runs(sandbox, 611) and runs(sandbox, 622)
    result = execute(f"{DAEMON.format(733)}; (setsid sleep 744 &); sleep 755 & sleep 766", timeout=seconds(1))
    assert result.timed_out
    assert {number: count(sandbox, number) for number in (611, 622, 733, 744, 755, 766)} == {
        611: 1, 622: 1, 733: 0, 744: 0, 755: 0, 766: 0,
    }
    assert execute("echo on", timeout=seconds(20)).output == "on\n"


@pytest.mark.parametrize(
    "command",
    [
        "trap '' INT TSTP TERM HUP QUIT; echo partial; sleep 300; sleep 300",
        "echo partial; python3 -c 'import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 15, 20)]; "
        "time.sleep(300)'",
        "echo partial; yes > /dev/null",
        "echo partial; mkfifo /tmp/p; cat /tmp/p",
        "echo partial; (sleep 300; sleep 300) | cat | cat",
        "echo partial; while :; do sleep 0.01; done",
        "echo partial; ulimit -c 0; python3 -c 'import os; os.kill(os.getpid(), 19)'",
    ],
)
def test_whatever_ignores_signals_ends_at_its_timeout_and_its_output_is_kept(execute: Execute, command: str) -> None:
    result = execute(command, timeout=seconds(0.5))
    assert (result.timed_out, result.exit_code) == (True, 124)
    assert result.stdout.startswith(b"partial\n")
    assert execute("echo on", timeout=seconds(20)).output == "on\n"


def test_a_timeout_keeps_both_streams_of_run(sandbox: Sandbox) -> None:
    result = sandbox.run("echo out; echo err >&2; printf '\\377\\0'; sleep 300", timeout=0.7)
    assert (result.timed_out, result.stdout, result.stderr) == (True, b"out\n\xff\0", b"err\n")


# Input and user


def test_input_of_fifty_megabytes_arrives_whole(sandbox: Sandbox) -> None:
    data = os.urandom(MIB) * 50
    result = sandbox.run(["sha256sum"], input=data, timeout=seconds(60))
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()
    result = sandbox.run(["sha256sum"], input=io.BytesIO(data), timeout=seconds(60))
    assert result.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_input_comes_from_a_pipe_as_it_is_written(sandbox: Sandbox) -> None:
    read, write = os.pipe()

    def fill() -> None:
        with open(write, "wb", buffering=0) as file:
            for number in range(20):
                file.write(f"{number}\n".encode())
                time.sleep(0.01)

    thread = threading.Thread(target=fill)
    thread.start()
    with open(read, "rb", buffering=0) as file:
        result = sandbox.run(["cat"], input=file, timeout=seconds(30))
    thread.join()
    assert result.output.split() == [str(number) for number in range(20)]


@pytest.mark.parametrize("command", ["head -c 3", "exec <&-; printf abc", "head -c 3; exec sleep 0.2"])
def test_input_that_the_command_closes_early_is_no_error(sandbox: Sandbox, command: str) -> None:
    result = sandbox.run(command, input=b"abc" + b"x" * (20 * MIB), timeout=seconds(60))
    assert (result.stdout, result.exit_code, result.timed_out) == (b"abc", 0, False)
    assert sandbox.run(["cat"], input=b"next").stdout == b"next"


def test_an_empty_input_is_an_end_and_none_is_one_too(sandbox: Sandbox) -> None:
    assert sandbox.run(["wc", "-c"], input=b"").output == "0\n"
    assert sandbox.run(["wc", "-c"]).output == "0\n"


def test_a_user_is_who_runs_or_the_result_says_why_not(sandbox: Sandbox) -> None:
    single = sandbox.run("cat /proc/self/uid_map").output.split()[2] == "1"
    for user in ("user", "1000"):
        for result in (sandbox.run("id -u; echo $HOME", user=user), sandbox.shell(user=user).run("id -u; echo $HOME")):
            if single:
                assert result.exit_code == 126
            else:
                assert (result.output, result.exit_code) == ("1000\n/tmp\n", 0)
    if single:
        assert "not mapped" in sandbox.run("id", user="user").output
    for unknown in ("nobody-here", "99999", "", "-1", "9" * 40, "a b"):
        result = sandbox.run("id", user=unknown)
        assert result.exit_code == 126 and result.output
    assert sandbox.run("id -u", user="root").output == sandbox.run("id -u", user="0").output == "0\n"


@pytest.mark.parametrize("setting", ["PWD=elsewhere", "unset PWD", "PWD=", "PWD=/no/such"])
def test_a_directory_that_the_agent_made_up_is_nothing_to_end_a_sandbox_for(
    sandbox: Sandbox, shell: Shell, setting: str
) -> None:
    shell.run(setting, timeout=seconds(20))
    sandbox.snapshot()
    assert shell.run("echo $KEPT; kept", timeout=seconds(20)).output == "yes\nfunction\n"
