"""Help: `-h` fits a screen, `--help` adds every key, from the comments of the configuration itself."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from skyrl_minisandbox.cli.tree import TRAINING, Key, config_directory, groups, headline, keys

if TYPE_CHECKING:
    from skyrl_minisandbox.cli.main import Verb

WIDTH = 100
MANY = 4
"""Keys that a line of usage has no room for."""
COMMON = (
    ("tasks=pypi|swebench|toy", "the dataset; tasks.ids=[a,b] for some of it, tasks.path=FILE"),
    ("scaffold=mini|gold|empty|wrong|…", "the agent; a dotted path for one of your own"),
    ("policy=script|openai", "who answers it; policy.base_url=URL policy.model=NAME"),
    ("reward=binary|fraction|shaped", "a grade as a number; grading=protected|official makes the grade"),
    ("cluster=ray|local", "where it runs; cluster.nodes=N"),
    ("images.store=DIR images.cache=DIR", "where images lie"),
    ("out=DIR", "the run directory"),
)


TRAINING_COMMON = (
    ("experiment=NAME", "a recipe over everything else: qwen3_8b_8gpu, cpu, …"),
    ("model=qwen3_8b|…|DIR|ORG/NAME", "the model, and what of the rest goes with it"),
    ("mode=sync|async|generate", "train, train while generating, or only evaluate"),
    ("data.train_data=[FILE]", "what `tasks export` wrote; data.val_data for evaluation"),
    ("trainer.… generator.…", "all of SkyRL's keys"),
    ("scaffold=mini reward=binary", "as in `minisandbox rollout`"),
    ("training.running=N", "rollouts at once, and what becomes of failed ones: training.*"),
    ("out=DIR", "checkpoints, exports and logs; the same again continues"),
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
    own += "".join(f" {key}=…" for key in verb.keys) if len(verb.keys) < MANY else " [key=…]"
    own += "".join(f" [{option}]" for option in verb.options)
    lines = [f"usage: minisandbox {name}{word}{own}{' [--json]' if verb.json else ''} [group=choice key=value …]"]
    lines += ["", verb.summary, ""]
    if verb.argument[0]:
        lines += _columns([verb.argument])
    if verb.keys or verb.options:
        lines += _columns([(f"{key}=…", sentence) for key, sentence in verb.keys.items()])
        lines += _columns(list(verb.options.items()))
    lines += _columns(TRAINING_COMMON if name == "train" else COMMON)
    lines += ["", f"`minisandbox {name} --help` prints every key with its default."]
    return "\n".join(lines)


def long_help(name: str, verb: Verb) -> str:
    """`minisandbox VERB --help`: the short one, then the configuration tree."""
    root = config_directory()
    training = name == "train"
    lines = [*short_help(name, verb).splitlines()[:-2], "", "keys:"]
    for key in keys(root / ("train.yaml" if training else "config.yaml")):
        lines += _entry(f"{key.name}={key.default}", key.sentence)
    for group, choices in groups(training=training).items():
        for choice in choices:
            path = root / group / f"{choice}.yaml"
            title = f"{group}={choice}" if len(choices) > 1 or group in TRAINING else f"{group}:"
            lines += ["", title, *_wrap(headline(path), 2)]
            for name_, key in _of_group(group, path):
                lines += _entry(f"{name_}={key.default}", key.sentence)
    if training:
        lines += _skyrl_keys()
    return "\n".join(lines)


def _of_group(group: str, path: Path) -> Iterator[tuple[str, Key]]:
    """The keys of one choice and their names in the tree."""
    for key in keys(path):
        if group in TRAINING:  # they set keys of other groups
            yield key.name, key
        elif key.name not in ("name", "kind", "mode"):
            yield f"{group}.{key.name}", key


def _skyrl_keys() -> list[str]:
    """SkyRL's own keys and sentences, of the version that is installed."""
    lines = ["", "SkyRL's keys:"]
    if importlib.util.find_spec("skyrl") is None:
        return [*lines, "  shown where SkyRL is installed: pip install 'skyrl-minisandbox[skyrl]'"]
    from skyrl_minisandbox.training.config import OURS, TrainConfig
    from skyrl_minisandbox.training.declared import declared, flat, sentences

    found = declared(TrainConfig, without=OURS)
    said = sentences(TrainConfig)
    for key, value in flat(found.defaults, found.open).items():
        lines += _entry(f"{key}={'null' if value is None else value}", said.get(key, ""))
        for inside, usual in found.optional.get(key, {}).items():
            lines += _entry(f"{key}.{inside}={'null' if usual is None else usual}", said.get(f"{key}.{inside}", ""))
    return lines


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
        "`images`, `tasks`, `scaffold`, `reward`, `grading`, `sandbox`, `rollout`, `cluster` and `training` are also",
        "the keys of the Env's configuration in SkyRL (`environment.skyrl_gym.minisandbox`). `model` and",
        "`experiment` are groups of `minisandbox train` alone ([training.md](training.md)).",
        "",
        *_table((key.name, key.default, key.sentence) for key in keys(root / "config.yaml")),
        "",
        "## `train`",
        "",
        *_wrap(headline(root / "train.yaml"), 0),
        "",
        *_table((key.name, key.default, key.sentence) for key in keys(root / "train.yaml")),
    ]
    for group, choices in groups(training=True).items():
        for choice in choices:
            path = root / group / f"{choice}.yaml"
            title = f"{group}={choice}" if len(choices) > 1 else group
            rows = [(name, key.default, key.sentence) for name, key in _of_group(group, path)]
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
