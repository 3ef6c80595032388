"""A persistent bash inside a sandbox, from its owner's side; `bash.py` is the other one."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from skyrl_minisandbox.errors import SandboxGone
from skyrl_minisandbox.sandbox import wire
from skyrl_minisandbox.sandbox.mounts import PRIVATE
from skyrl_minisandbox.sandbox.spec import CommandResult
from skyrl_minisandbox.sandbox.state import ShellState
from skyrl_minisandbox.sandbox.wire import Ask

if TYPE_CHECKING:
    from skyrl_minisandbox.sandbox.sandbox import Sandbox


class Shell:
    """Made by `Sandbox.shell`. It starts with its first command."""

    def __init__(self, sandbox: Sandbox, key: str, env: dict[str, str], cwd: str, user: str | None) -> None:
        self._sandbox, self._key, self._env, self._cwd, self._user = sandbox, key, env, cwd, user
        self._state: ShellState | None = None  # what it goes on with in a box where it has not run yet

    def run(self, command: str, *, timeout: float | None = None) -> CommandResult:
        """Run a command in the shell: directory, variables and functions stay for the next one.

        Output is one stream. `exit`, `exec`, `set -e` and a killed shell give their exit code, and the next command
        finds a fresh shell with the old exports and directory (`notice` says so).
        timeout: seconds; then what the command started is killed, the shell and its earlier background jobs live on.
        """
        sandbox = self._sandbox
        timeout, began = sandbox._deadline(timeout), time.monotonic()
        try:
            data = command.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half a surrogate pair, which a model's JSON can hold and no file
            data = command.encode("utf-8", "replace")
            command = data.decode()
        with sandbox._lock:
            box = sandbox._box
            ask = {**self.ask(), "timeout": timeout, "command": command}
            state, self._state = self._state, None
            if state is not None:
                ask.update(cwd=state.cwd, code=state.code, restored=self._restore(state))
            if len(data) > wire.CHUNK:
                ask["command"], ask["size"] = "", len(data)
            try:
                request = box.send(Ask.SHELL, ask)
                if "size" in ask:
                    box.send_data(request, data)
                result = box.result(request, timeout)
            except SandboxGone as gone:
                result = box.ended(gone, began)
        if state is not None and state.ended:
            ended = ", ".join(f"`{line}`" for line in state.ended[:10])
            notice = f"A snapshot of the sandbox was taken, for which these background processes were ended: {ended}."
            result = dataclasses.replace(result, notice=f"{notice} {result.notice}".strip())
        return result

    def ask(self) -> dict[str, Any]:
        """What its bash is started with, for init."""
        return {"shell": self._key, "env": self._env, "cwd": self._cwd, "user": self._user}

    def _restore(self, state: ShellState) -> bool:
        """Lay the exports and functions where the new bash reads them; whether there are any."""
        if not state.text or len(state.text) > wire.LARGEST_STATE:
            return False
        box = self._sandbox._box
        path = f"{PRIVATE}/{self._key}.state"
        request = box.send(Ask.WRITE, {"path": path, "mode": 0o666})
        box.send_data(request, state.text)
        box.done(request, path)
        return True

    def _copy(self, sandbox: Sandbox) -> Shell:
        """The same shell in a sandbox that starts from the same files."""
        copy = Shell(sandbox, self._key, self._env, self._cwd, self._user)
        copy._state = self._state
        return copy
