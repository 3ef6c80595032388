"""Help: `-h` fits a screen, `--help` adds every key, from the comments of the configuration itself."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from skyrl_minisandbox.cli.tree import config_directory, groups, headline, keys

if TYPE_CHECKING:
    from skyrl_minisandbox.cli.main import Verb

WIDTH = 100
COMMON = (
    ("tasks=pypi|swebench|toy", "the dataset; tasks.ids=[a,b] for some of it, tasks.path=FILE"),
    ("scaffold=mini|menu|gold|empty|wrong", "the agent; a dotted path for one of your own"),
    ("policy=script|openai", "who answers it; policy.base_url=URL policy.model=NAME"),
    ("reward=binary|fraction|shaped", "a grade as a number; grading=protected|official makes the grade"),
    ("cluster=ray|local", "where it runs; cluster.nodes=N"),
    ("images.store=DIR images.cache=DIR", "where images lie"),
    ("out=DIR", "the run directory"),
)


def overview(verbs: Mapping[str, Verb]) -> str:
    """`minisandbox -h`."""
    width = max(len(name) for name in verbs)
    lines = ["usage: minisandbox VERB [group=choice key=value …]", ""]
    lines += [f"  {name:{width}}  {verb.summary}" for name, verb in verbs.items()]
    lines += ["", "often used:"]
    lines += _columns(COMMON)
    lines += [
        "",
        "`minisandbox VERB -h` for one verb, `--help` for every key. Results go to stdout, progress to",
        "stderr. Exit codes: 0 done, 1 some result is not what was asked, 2 input, 3 the machine lacks",
        "something, 130 interrupted.",
    ]
    return "\n".join(lines)


def short_help(name: str, verb: Verb) -> str:
    """`minisandbox VERB -h`."""
    word = f" {'|'.join(verb.words)}" if verb.words else ""
    own = f" {verb.argument[0]}" if verb.argument[0] else ""
    own += "".join(f" {key}=…" for key in verb.keys) + "".join(f" [{option}]" for option in verb.options)
    lines = [f"usage: minisandbox {name}{word}{own}{' [--json]' if verb.json else ''} [group=choice key=value …]"]
    lines += ["", verb.summary, ""]
    if verb.argument[0]:
        lines += _columns([verb.argument])
    if verb.keys or verb.options:
        lines += _columns([(f"{key}=…", sentence) for key, sentence in verb.keys.items()])
        lines += _columns(list(verb.options.items()))
    lines += _columns(COMMON)
    lines += ["", f"`minisandbox {name} --help` prints every key with its default."]
    return "\n".join(lines)


def long_help(name: str, verb: Verb) -> str:
    """`minisandbox VERB --help`: the short one, then the configuration tree."""
    root = config_directory()
    lines = [*short_help(name, verb).splitlines()[:-2], "", "keys:"]
    for key in keys(root / "config.yaml"):
        lines += _entry(f"{key.name}={key.default}", key.sentence)
    for group, choices in groups().items():
        for choice in choices:
            path = root / group / f"{choice}.yaml"
            lines += ["", f"{group}={choice}" if len(choices) > 1 else f"{group}:", *_wrap(headline(path), 2)]
            for key in keys(path):
                if key.name not in ("name", "kind", "mode"):
                    lines += _entry(f"{group}.{key.name}={key.default}", key.sentence)
    return "\n".join(lines)


def _columns(rows: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> list[str]:
    return [f"  {left:34} {right}" for left, right in rows]


def _entry(head: str, sentence: str) -> list[str]:
    return [f"  {head}", *_wrap(sentence, 6)]


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def configuration_page() -> str:
    """docs/configuration.md: every key, its default and its sentence, from the tree's own comments."""
    root = config_directory()
    lines = [
        "# Configuration",
        "",
        "Made from the comments in `configs/` by `python -m skyrl_minisandbox.cli.help`; a test holds it equal.",
        "",
        "`minisandbox VERB group=choice key=value …`. Where a group is a plug-in (`tasks`, `scaffold`,",
        "`policy`, `reward`) a dotted path `package.module.Name` may stand for the choice. The groups",
        "`images`, `tasks`, `scaffold`, `reward`, `grading`, `sandbox`, `rollout` and `cluster` are also the keys",
        "of the Env's configuration in SkyRL (`environment.skyrl_gym.minisandbox`).",
        "",
        *_table((key.name, key.default, key.sentence) for key in keys(root / "config.yaml")),
    ]
    for group, choices in groups().items():
        for choice in choices:
            path = root / group / f"{choice}.yaml"
            title = f"{group}={choice}" if len(choices) > 1 else group
            rows = [
                (f"{group}.{key.name}", key.default, key.sentence)
                for key in keys(path)
                if key.name not in ("name", "kind", "mode")
            ]
            lines += ["", f"## `{title}`", "", *_wrap(headline(path), 0)]
            lines += ["", *_table(rows)] if rows else []
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    lines = ["| key | default | |", "|---|---|---|"]
    for name, default, sentence in rows:
        escaped = sentence.replace("|", r"\|")
        lines.append(f"| `{name}` | `{default}` | {escaped} |")
    return lines


if __name__ == "__main__":
    print(configuration_page(), end="")
