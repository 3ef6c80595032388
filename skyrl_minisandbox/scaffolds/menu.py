"""Shows a task's menu of commands, runs the one that the model names by its letter, and submits.

The smallest scaffold from which a model can learn: one letter decides the reward. For `tasks=toy`, and any task whose
problem statement lists its commands as lines `A. command`.
"""

from __future__ import annotations

from skyrl_minisandbox.errors import TaskError
from skyrl_minisandbox.policies.policy import Message, Policy
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.scaffolds.scaffold import Scaffold, Submission
from skyrl_minisandbox.tasks.task import PublicTask, Task
from skyrl_minisandbox.tasks.toy import menu

SYSTEM = "One of the commands mends the code. Answer with its letter."


class MenuScaffold(Scaffold):
    """One choice, then the end.

    any_answer: every answer chooses. Where it begins with no letter of the menu, its first character does, by its
        code: counted from `A`, modulo the number of commands. For models that cannot write yet: a random one is at
        chance then, and not at zero. An empty answer chooses nothing, and nothing is submitted.
        Otherwise an answer without a letter is told so, and the model asked again.
    command_timeout: seconds for the command.

    Raises `TaskError` for a task without a menu.
    """

    def __init__(self, *, any_answer: bool = False, command_timeout: float = 20.0) -> None:
        self.any_answer = any_answer
        self.command_timeout = command_timeout

    def run(self, task: PublicTask | Task, sandbox: Sandbox, policy: Policy) -> Submission:
        """Ask until a command is chosen, and run it in the task's workdir."""
        commands = menu(task.problem_statement)
        if len(commands) < 2:
            raise TaskError(
                f"the problem statement of task `{task.id}` lists no commands to choose from",
                hint="scaffold=menu is for tasks=toy, and tasks whose statement has lines `A. command`",
            )
        messages: list[Message] = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": task.problem_statement.rstrip()},
        ]
        while True:
            text = policy.query(messages)
            messages.append({"role": "assistant", "content": text})
            letter = choice(text, list(commands), any_answer=self.any_answer)
            if letter or self.any_answer:
                break
            again = f"Answer with one letter, {', '.join(commands)}."
            messages.append({"role": "user", "content": again})
        if letter:
            sandbox.run(commands[letter], cwd=task.recipe.workdir, timeout=self.command_timeout)
        return Submission(patch=None, trajectory=messages)


def choice(text: str, letters: list[str], *, any_answer: bool = False) -> str:
    """The letter that an answer begins with, as a word of its own; "" for none. any_answer: see `MenuScaffold`."""
    text = text.strip()
    word = text.lstrip("`*\"'([")[:2]
    if word[:1] in letters and not word[1:].isalnum():
        return word[:1]
    if any_answer and text:
        return letters[(ord(text[0]) - ord("A")) % len(letters)]
    return ""
