"""Entry point: find the verb, run it, say what went wrong. Imports nothing heavy before a verb is known."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NamedTuple

from skyrl_minisandbox.errors import InputError, MiniSandboxError

INTERRUPTED = 130


class Verb(NamedTuple):
    """What the command line must know of a verb before importing it.

    summary: one line for `minisandbox -h`. words: the sub-verbs, if it has any.
    keys: keys that only this verb knows, with a sentence each; all others are the configuration's.
    json: it prints data, and knows `--json`. options: further ones, one or two words, with a sentence each.
    argument: what it takes beside keys, with a sentence: one word that is not `key=value`, or a file.
    """

    summary: str
    words: tuple[str, ...] = ()
    keys: Mapping[str, str] = {}
    json: bool = False
    options: Mapping[str, str] = {}
    argument: tuple[str, str] = ("", "")


VERBS: dict[str, Verb] = {
    "doctor": Verb(
        "what works on this machine, and what mends what does not",
        json=True,
        options={"--sandbox": "try to break out of a sandbox in every way that we know"},
    ),
    "tasks": Verb(
        "the tasks of a dataset; `export` writes those that passed validation for SkyRL",
        words=("list", "show", "export"),
        keys={
            "task": "show: the id of the task",
            "validation": "export: a `validation.json`; `none`: take them unjudged",
            "val_fraction": "export: the part for validation, 0 to 1; 0.1",
            "split": "export: by `repository` (whole ones), or by `task`",
            "match": "export: only ids in which this regular expression is found",
            "min_tests": "export: at least so many tests",
            "max_tests": "export: at most so many tests",
            "max_characters": "export: of the problem statement, at most",
        },
        json=True,
    ),
    "image": Verb(
        "build the images of the tasks; list and show what is in the store",
        words=("build", "ls", "show"),
        keys={"task": "the id of the task whose image to show"},
        json=True,
    ),
    "validate": Verb(
        "check that tasks judge: empty fails, gold passes, it repeats, no future in it",
        json=True,
        options={"--gates-only": "the four gates and nothing else: about half of the time"},
    ),
    "rollout": Verb("run a scaffold on tasks and grade what it leaves"),
    "grade": Verb(
        "run the tests on finished patches",
        keys={"predictions": "JSONL or JSON in SWE-bench's format"},
        json=True,
    ),
    "explain": Verb(
        "why the outcome of a rollout is what it is",
        json=True,
        options={"--all": "every test, also those that pass before and after"},
        argument=("ROLLOUT", "its id or that of its task, or the path of a grades/ID.json"),
    ),
    "shell": Verb(
        "a shell in a sandbox of a task's image",
        keys={"task": "the id of the task", "command": "run this instead of an interactive shell"},
    ),
    "train": Verb(
        "train a model with SkyRL",
        options={
            "--cfg job": "print the whole configuration, run nothing",
            "--multirun": "a run for each combination of values, as in seed=1,2,3",
            "-m": "the same",
        },
    ),
}


class Request(NamedTuple):
    """A command line, taken apart.

    word: the sub-verb, or "". own: the verb's own keys. overrides: the configuration's. options: those given.
    argument: the word that the verb takes, or "".
    """

    verb: str
    word: str
    own: Mapping[str, str]
    overrides: tuple[str, ...]
    json: bool
    options: frozenset[str] = frozenset()
    argument: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every error of ours is printed here and nowhere else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except MiniSandboxError as error:
        print(f"minisandbox: {error.render()}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("minisandbox: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our stdout has seen enough; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from skyrl_minisandbox.cli.help import overview

        print(overview(VERBS))
        return 0 if arguments else InputError.exit_code
    if arguments[0] in ("-V", "--version"):
        from skyrl_minisandbox import __version__

        print(f"minisandbox {__version__}")
        return 0
    name = arguments.pop(0)
    if name not in VERBS:
        raise InputError(f"unknown verb `{name}`", hint=f"minisandbox VERB …; verbs: {', '.join(VERBS)}")
    if any(one in ("-h", "--help") for one in arguments):
        from skyrl_minisandbox.cli.help import long_help, short_help

        print(long_help(name, VERBS[name]) if "--help" in arguments else short_help(name, VERBS[name]))
        return 0
    request = read(name, arguments)
    if sys.platform != "linux" and name != "tasks":
        from skyrl_minisandbox.errors import MachineError

        raise MachineError("sandboxes need Linux", hint="run it on a Linux machine; `minisandbox tasks` works here")
    _end_on_signals()
    module = importlib.import_module(f"skyrl_minisandbox.cli.{name}")
    code: int = module.run(request)
    return code


def read(name: str, arguments: Sequence[str]) -> Request:
    """Take the arguments of a verb apart. Raises `InputError`."""
    verb = VERBS[name]
    rest = _joined(verb, arguments)
    word = ""
    if verb.words:
        if not rest or rest[0] not in verb.words:
            said = f"`{rest[0]}`" if rest else "nothing"
            raise InputError(
                f"minisandbox {name}: expected one of {', '.join(verb.words)}, got {said}",
                hint=f"minisandbox {name} {verb.words[0]}",
            )
        word = rest.pop(0)
    known = (*verb.options, *(["--json"] if verb.json else []))
    own: dict[str, str] = {}
    overrides = []
    argument = ""
    for one in rest:
        key, equals, value = one.partition("=")
        if one in known:
            continue
        if one.startswith("-"):
            hint = f"options: {', '.join((*known, '-h', '--help'))}"
            raise InputError(f"minisandbox {name}: unknown option `{one}`", hint=hint)
        if verb.argument[0] and not argument and (not equals or os.path.exists(one)):
            argument = one
        elif equals and key in verb.keys:
            own[key] = value
        else:
            overrides.append(one)
    return Request(name, word, own, tuple(overrides), "--json" in rest, frozenset(rest) & set(verb.options), argument)


def _joined(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """The arguments, an option of two words as one: `--cfg job`, or `--cfg=job`."""
    rest: list[str] = []
    for one in arguments:
        if rest and f"{rest[-1]} {one}" in verb.options:
            rest[-1] += f" {one}"
        else:
            two = one.replace("=", " ", 1)
            rest.append(two if one.startswith("-") and two in verb.options else one)
    return rest


def _end_on_signals() -> None:
    """SIGINT and SIGTERM end the command in order; a second one ends the process at once.

    What that leaves goes with the process all the same: sandboxes hang on a socket that the kernel closes.
    """

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` want it
            signal.signal(number, end)


if __name__ == "__main__":
    sys.exit(main())
