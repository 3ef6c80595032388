"""`minisandbox shell task=ID`: a shell in a sandbox of a task's image."""

from __future__ import annotations

import shlex
import sys

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.workbench import Workbench
from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import CommandResult, Sandbox


def run(request: Request) -> int:
    """Lines go to a bash that keeps its directory and variables; or run `command=` and exit as it does."""
    bench = Workbench(load_settings(request.overrides))
    task = bench.one_task(request.own.get("task"))
    image = bench.images([task])[task.id]
    with bench.opener(image) as open_sandbox, open_sandbox() as sandbox:
        if "command" in request.own:
            return _show(sandbox.run(request.own["command"], cwd=task.recipe.workdir, timeout=3600))
        return _lines(sandbox, task.recipe.workdir)


def _lines(sandbox: Sandbox, workdir: str) -> int:
    """Read commands until `exit` or the end of input. What was written in the sandbox goes with it."""
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        print("a line is a command of its own; `exit` ends the shell and drops the sandbox", file=sys.stderr)
    shell = sandbox.shell()
    shell.run(f"cd {shlex.quote(workdir)}", timeout=30)
    code = 0
    while True:
        try:
            line = input(f"{workdir}$ " if interactive else "")
        except EOFError:
            return code
        except KeyboardInterrupt:
            print(file=sys.stderr)
            return code
        if line.split() and line.split()[0] in ("exit", "logout"):
            words = line.split()
            return int(words[1]) if len(words) > 1 and words[1].isdigit() else code
        try:
            code = _show(shell.run(line, timeout=3600))
        except SandboxGone:
            print("the sandbox is gone", file=sys.stderr)
            return 1


def _show(result: CommandResult) -> int:
    sys.stdout.write(result.output)
    sys.stdout.flush()
    notes = [
        (result.timed_out, "timed out"),
        (result.oom_killed, "a process was killed for memory"),
        (result.disk_full, "the disk of the sandbox is full"),
        (result.truncated, "output was cut"),
        (bool(result.notice), result.notice),
    ]
    for true, text in notes:
        if true:
            print(f"[{text}]", file=sys.stderr)
    return result.exit_code
