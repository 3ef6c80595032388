"""mini-swe-agent, unmodified, around a sandbox.

Its `DefaultAgent` runs with a model and an environment of ours, in its text format (one
` ```mswea_bash_command ` block an answer). Prompts, templates, limits and the parser are mini's own, read
from its installed package. litellm is never imported: it would cost 130 MB and 4 s in every worker process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.policies.policy import Policy, PolicyStopped
from skyrl_minisandbox.record import EndedBy
from skyrl_minisandbox.sandbox import CommandResult, Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task

CONFIG = "swebench_backticks.yaml"
"""mini's own configuration for SWE-bench in the text format, below its `config/benchmarks`."""

LONGEST_ARGUMENT = 100_000
"""Bytes of a command given as an argument; Linux ends at 128 KiB (MAX_ARG_STRLEN). Longer ones use stdin."""

_EXITS = {
    "Submitted": EndedBy.SUBMIT,
    "LimitsExceeded": EndedBy.TURN_LIMIT,
    "TimeExceeded": EndedBy.TIME,
}

_import_lock = threading.Lock()


class MiniScaffold(Scaffold):
    """mini-swe-agent's default agent.

    step_limit: most queries before it ends with `turn_limit`; None for mini's own (250), 0 for none.
    command_timeout: seconds for one command; None for mini's own (60).
    output_limit: characters of one command's output that are kept in the trajectory; beyond it head and
    tail are. What
        the model sees is cut further by mini's template (10,000).

    After `PolicyStopped` it returns what there is so far: no patch of its own, and the trajectory.
    """

    def __init__(
        self,
        *,
        step_limit: int | None = None,
        command_timeout: float | None = None,
        output_limit: int = 200_000,
    ) -> None:
        self._mini = import_mini()
        config = self._mini.config
        self._step_limit = config["agent"]["step_limit"] if step_limit is None else step_limit
        self._timeout = config["environment"]["timeout"] if command_timeout is None else command_timeout
        self._output_limit = output_limit

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Let the agent work until it submits, reaches a limit or is stopped."""
        mini = self._mini
        environment = _Environment(
            mini,
            sandbox,
            SimpleNamespace(
                cwd=task.recipe.workdir,
                env=dict(mini.config["environment"]["env"]),
                timeout=self._timeout,
                output_limit=self._output_limit,
            ),
        )
        agent = mini.DefaultAgent(
            _Model(mini, policy),
            environment,
            system_template=mini.config["agent"]["system_template"],
            instance_template=mini.config["agent"]["instance_template"],
            step_limit=self._step_limit,
            cost_limit=0.0,
        )
        try:
            exit_info = agent.run(task.problem_statement)
        except PolicyStopped as stopped:
            return Submission(patch=None, ended_by=stopped.ended_by, trajectory=agent.save(None))
        status = exit_info.get("exit_status", "")
        ended_by = _EXITS.get(status, EndedBy.ERROR)
        patch: str | None = None
        if ended_by is EndedBy.SUBMIT and not environment.submission_cut:
            patch = exit_info.get("submission", "")
        return Submission(
            patch=patch,
            ended_by=ended_by,
            error=f"mini-swe-agent ended with {status}" if ended_by is EndedBy.ERROR else "",
            trajectory=agent.save(None),
        )


class _Model:
    """mini's Model protocol over a Policy. `config` has the fields that its templates and its parser take."""

    def __init__(self, mini: SimpleNamespace, policy: Policy) -> None:
        self._mini = mini
        self._policy = policy
        self.config = SimpleNamespace(
            model_name="policy",
            action_regex=mini.action_regex,
            observation_template=mini.config["model"]["observation_template"],
            format_error_template=mini.config["model"]["format_error_template"],
        )

    def query(self, messages: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
        text = self._policy.query([{"role": m["role"], "content": m["content"]} for m in messages])
        try:
            actions = self._mini.parse_regex_actions(
                text,
                action_regex=self.config.action_regex,
                format_error_template=self.config.format_error_template,
            )
        except self._mini.FormatError as error:
            # mini keeps the error but not the answer; its contract asks for the answer in `extra`.
            error.messages[0]["extra"].update(response=text, cost=0.0)
            raise
        return {
            "role": "assistant",
            "content": text,
            "extra": {"actions": actions, "cost": 0.0, "timestamp": time.time()},
        }

    def format_message(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    def format_observation_messages(
        self,
        message: dict[str, Any],
        outputs: list[dict[str, Any]],
        template_vars: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self._mini.format_observation_messages(
            outputs,
            observation_template=self.config.observation_template,
            template_vars=template_vars,
        )
        return messages

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        return vars(self.config).copy()

    def serialize(self) -> dict[str, Any]:
        return {"info": {"config": {"model": vars(self.config).copy(), "model_type": _path(self)}}}


class _Environment:
    """mini's Environment protocol over a Sandbox: every action is a new `bash -c`."""

    def __init__(self, mini: SimpleNamespace, sandbox: Sandbox, config: SimpleNamespace) -> None:
        self._mini = mini
        self._sandbox = sandbox
        self.config = config
        self.submission_cut = False

    def execute(self, action: dict[str, Any], cwd: str = "", *, timeout: float | None = None) -> dict[str, Any]:
        """Run `action["command"]`. Whatever it does is in the result; only a submission is raised."""
        command: str = action.get("command", "")
        try:
            data = command.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can carry and a byte string cannot
            data = command.encode("utf-8", "replace")
            command = data.decode("utf-8")
        seconds = timeout or self.config.timeout
        by_argument = len(data) <= LONGEST_ARGUMENT and b"\0" not in data
        result = self._sandbox.run(
            ["bash", "-c", command if by_argument else 'eval "$(cat)"'],
            input=None if by_argument else data,
            cwd=cwd or self.config.cwd,
            env=self.config.env,
            timeout=seconds,
        )
        self._raise_if_submitted(result)
        return {
            "output": _middle_out(result.output, self.config.output_limit),
            "returncode": -1 if result.timed_out else result.exit_code,
            "exception_info": _what_happened(result, seconds),
        }

    def _raise_if_submitted(self, result: CommandResult) -> None:
        lines = result.output.lstrip().splitlines(keepends=True)
        if not lines or lines[0].strip() != "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT" or result.exit_code != 0:
            return
        # Bytes that are no text must survive on their way to `git apply`.
        text = result.merged.decode("utf-8", "surrogateescape").lstrip()
        submission = "".join(text.splitlines(keepends=True)[1:])
        self.submission_cut = result.truncated
        raise self._mini.Submitted(
            {
                "role": "exit",
                "content": submission,
                "extra": {"exit_status": "Submitted", "submission": submission},
            }
        )

    def get_template_vars(self, **kwargs: Any) -> dict[str, Any]:
        return vars(self.config) | kwargs

    def serialize(self) -> dict[str, Any]:
        return {"info": {"config": {"environment": vars(self.config).copy(), "environment_type": _path(self)}}}


def _what_happened(result: CommandResult, seconds: float) -> str:
    """What mini shows as `<exception>`; empty when the command just ended."""
    events = []
    if result.timed_out:
        events.append(f"The command did not end within {seconds:g} seconds and was killed.")
    if result.oom_killed:
        events.append("A process was killed because the sandbox has no memory left.")
    if result.disk_full:
        events.append("The disk of the sandbox is full.")
    return " ".join(events)


def _middle_out(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters elided]\n{text[-half:]}"


def _path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def import_mini() -> SimpleNamespace:
    """The parts of mini-swe-agent that we use, read once: its YAML takes 10 ms. Raises `InputError` when the extra is
    missing."""
    with _import_lock:
        return _import_mini()


@functools.cache
def _import_mini() -> SimpleNamespace:
    try:
        with _silent_start():
            package = import_module("minisweagent")
            agent = import_module("minisweagent.agents.default")
            exceptions = import_module("minisweagent.exceptions")
            text = import_module("minisweagent.models.utils.actions_text")
            # The one place without litellm where mini's default action format is written down.
            model = import_module("minisweagent.models.openrouter_textbased_model")
    except ImportError as error:
        raise InputError(
            f"scaffold `mini` needs mini-swe-agent, which cannot be imported here: {error}",
            hint="pip install 'skyrl-minisandbox[mini]'",
        ) from error
    config_file = Path(str(package.package_dir)) / "config" / "benchmarks" / CONFIG
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        fields = model.OpenRouterTextbasedModelConfig.model_fields
        return SimpleNamespace(
            DefaultAgent=agent.DefaultAgent,
            FormatError=exceptions.FormatError,
            Submitted=exceptions.Submitted,
            parse_regex_actions=text.parse_regex_actions,
            format_observation_messages=text.format_observation_messages,
            action_regex=fields["action_regex"].default,
            config=config,
            version=package.__version__,
        )
    except (OSError, AttributeError, KeyError, yaml.YAMLError) as error:
        version = getattr(package, "__version__", "?")
        raise InputError(
            f"mini-swe-agent {version} is not one that scaffold `mini` knows: {error}",
            hint="pip install 'mini-swe-agent>=2.4,<3'",
        ) from error


@contextlib.contextmanager
def _silent_start() -> Iterator[None]:
    """Importing minisweagent prints a banner, makes a directory in ~/.config and loads an .env: not here."""
    ours = {"MSWEA_SILENT_STARTUP": "1"}
    with tempfile.TemporaryDirectory(prefix="minisandbox-") as directory:
        ours["MSWEA_GLOBAL_CONFIG_DIR"] = directory
        before = {key: os.environ.get(key) for key in ours}
        os.environ.update(ours)
        try:
            yield
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
