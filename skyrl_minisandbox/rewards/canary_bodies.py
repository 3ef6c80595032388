"""What a canary does when it needs nothing of the tested code: a few small facts, one of them perhaps wrong.

The right values are computed here, so a must-pass one passes on every Python and a must-fail one fails on every
Python, whatever the tested code does. Names of the module are mentioned, never called.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from skyrl_minisandbox.rewards.canary_words import Words

_INDENT = 8  # columns before a statement of a method
_TRIES = 50

# An expression over {0}, {1} …, and the values for them. {r} is a global name of the module, only mentioned.
_Fact = tuple[str, Callable[[Words, random.Random], Sequence[object]]]


def _text(between: str) -> Callable[[Words, random.Random], Sequence[object]]:
    return lambda words, rng: [words.phrase(2, 3, between), between]


def _one(words: Words, rng: random.Random) -> Sequence[object]:
    return [words.phrase(1, 2)]


def _two(words: Words, rng: random.Random) -> Sequence[object]:
    return [words.word(), words.word()]


def _any(words: Words, rng: random.Random) -> Sequence[object]:
    return _integers(words, rng) if rng.random() < words.numeric else _two(words, rng)


def _list(words: Words, rng: random.Random) -> Sequence[object]:
    return [[words.word() for _ in range(rng.randint(2, 4))]]


def _numbers(words: Words, rng: random.Random) -> Sequence[object]:
    return [[rng.randint(1, 40) for _ in range(rng.randint(2, 5))]]


def _integers(words: Words, rng: random.Random) -> Sequence[object]:
    return [rng.randint(3, 99), rng.randint(2, 12)]


def _mapping(words: Words, rng: random.Random) -> Sequence[object]:
    return [{words.word(): rng.randint(1, 9), words.word(): words.word()}]


def _word_and_number(words: Words, rng: random.Random) -> Sequence[object]:
    return [words.word(), rng.randint(2, 30)]


_TEXTS: tuple[_Fact, ...] = (
    ("{0}.split({1})", _text("-")),
    ("{0}.split({1})", _text(",")),
    ("{0}.partition({1})[0]", _text(":")),
    ("{0}.rsplit({1}, 1)[-1]", _text(".")),
    ("{0}.count({1})", _text("/")),
    ("{0}.upper()", _one),
    ("{0}.title()", _one),
    ("{0}[::-1]", _one),
    ("len({0})", _one),
    ("{0}.replace({0}[0], {1})", _two),
    ("{0} + {1}", _two),
    ("[{0}, {1}][-1]", _two),
    ("{0}.center(20).strip()", _one),
    ("{0}.encode()", _one),
    ("sorted({0})", _list),
    ("{0} + {0}[:1]", _list),
    ("len({0})", _list),
    ("max({0}, key=len)", _list),
    ("[item.upper() for item in {0}]", _list),
    ("sorted({0})", _mapping),
    ("len({0})", _mapping),
    ("{0}.ljust({1}, '.')", _word_and_number),
    ("dict([({0}, {1})])", _word_and_number),
)

_NUMBERS: tuple[_Fact, ...] = (
    ("sum({0})", _numbers),
    ("max({0}) - min({0})", _numbers),
    ("[item * 2 for item in {0}]", _numbers),
    ("sorted({0}, reverse=True)", _numbers),
    ("divmod({0}, {1})", _integers),
    ("{0} * {1} + 1", _integers),
    ("{0} % {1}", _integers),
    ("str({0}).zfill({1})", _integers),
    ("list(range({1}))", lambda words, rng: [0, rng.randint(2, 6)]),
    ("{0} + {1}", _integers),
    ("{0} - {1}", _integers),
    ("[{0}, {1}][0]", _integers),
    ("max({0}, {1})", _integers),
    ("{0} + [{1}]", lambda words, rng: [[rng.randint(0, 9)], rng.randint(0, 9)]),
    ("{0} // {1}", _integers),
    ("{0} ** 2", _integers),
    ("[{0}, {1}] * 2", _integers),
    ("({0}, {1})[::-1]", _integers),
    ("{0} / 2", _integers),
    ("{0}[1:]", _numbers),
    ("{0}[-1]", _numbers),
    ("len({0})", _numbers),
    ("{0}[0] * 0.5", _numbers),
)

_MENTIONS: tuple[_Fact, ...] = (
    ("len([{r}, {0}, {1}])", _any),
    ("({r}, {0})[1]", _any),
    ("[{r}, {0}, {1}][1:]", _any),
    ("list({{{0}: {r}}})", _any),
    ("dict(kind={r}, name={0})['name']", _any),
    ("[name for name, kind in [({0}, {r}), ({1}, None)] if kind is None]", _any),
    ("sorted({{{0}: {r}, {1}: {r}}})", lambda words, rng: [words.phrase(1, 2), words.phrase(1, 1) + words.word()]),
    ("({0} if {r} is not None else {1})", _any),
)


def write(
    words: Words, rng: random.Random, must: str, method: str, speaks_unittest: bool, size: int, one_line: bool = False
) -> list[str]:
    """The lines of a body, not indented.

    method: the name of the first argument, "" for a function. speaks_unittest: assertions are its methods.
    size: about how many lines.
    """
    used: set[str] = {method}
    speaker = method if speaks_unittest else ""
    facts: list[list[str]] = []
    while not facts or (sum(map(len, facts)) < size and not one_line):
        facts.append(_fact(words, rng, used, False, speaker, not one_line))
    if must == "fail":
        facts[rng.randrange(len(facts))] = _fact(words, rng, used, True, speaker, not one_line)
    lines = [line for fact in facts for line in fact]
    return ["; ".join(lines)] if one_line else lines


def claim(left: str, right: str, method: str, rng: random.Random) -> str:
    """One assertion that two expressions are equal. method: as in `write`, "" for a plain `assert`."""
    if not method:
        return f"assert {left} == {right}"
    if rng.random() < 0.15:
        left, right = right, left
    return f"{method}.assertEqual({left}, {right})"


def another(value: Any, words: Words, rng: random.Random) -> Any:
    """A value of the same type that is not equal."""
    match value:
        case bool():
            return not value
        case float():
            return value + rng.choice((-0.5, 0.5, 1.0, 2.5))
        case int():
            return value + rng.choice((-3, -2, -1, 1, 2, 3, 10))
        case str():
            changed = f"{value} {words.word()}" if rng.random() < 0.3 else _respelled(value, words, rng)
            return changed if changed != value else value + words.word()[:1]
        case bytes():
            return another(value.decode(), words, rng).encode()
        case list() | tuple() if value:
            items = list(value)
            at = rng.randrange(len(items))
            if rng.random() < 0.3 and len(items) > 1:
                del items[at]
            else:
                items[at] = another(items[at], words, rng)
            return type(value)(items)
        case dict() if value:
            key = rng.choice(list(value))
            return {**value, key: another(value[key], words, rng)}
        case list():
            return [words.word()]
    raise TypeError(f"no other value than {value!r} is known")


def _respelled(value: str, words: Words, rng: random.Random) -> str:
    letters = [i for i, c in enumerate(value) if c.isalpha()]
    if not letters:
        return value + words.word()[:1]
    at = rng.choice(letters)
    letter = rng.choice("abcdefghiklmnoprstuw")
    return value[:at] + (letter.upper() if value[at].isupper() else letter) + value[at + 1 :]


def _loop(words: Words, rng: random.Random, used: set[str], wrong: bool, method: str) -> list[str]:
    """The same small fact of several values."""
    values: list[Any] = [words.word() for _ in range(rng.randint(2, 4))]
    of: Callable[[Any], Any]
    if rng.random() < words.numeric:
        values = [rng.randint(0, 20) for _ in values]
        form, of = rng.choice((("{0} * 2", lambda value: value * 2), ("{0} + 1", lambda value: value + 1)))
    else:
        form, of = rng.choice((("len({0})", len), ("{0}.upper()", str.upper), ("{0}[::-1]", lambda value: value[::-1])))
    pairs = [(value, of(value)) for value in values]
    if wrong:
        at = rng.randrange(len(pairs))
        pairs[at] = pairs[at][0], another(pairs[at][1], words, rng)
    item = words.variable(used)
    result = words.variable({*used, item})
    used |= {item, result}
    shown = words.literal(pairs if rng.random() < 0.5 else tuple(pairs))
    return [f"for {item}, {result} in {shown}:", "    " + claim(form.format(item), result, method, rng)]


def _hidden(form: str, words: Words) -> bool:
    """Whether the module has a `max` or `sorted` of its own, or may have by `from x import *`."""
    called = re.findall(r"(?<![.\w])([a-z]+)\(", form)
    return any(words.hides_all or name in words.hidden for name in called)


def _fact(words: Words, rng: random.Random, used: set[str], wrong: bool, method: str, loops: bool) -> list[str]:
    """A fact with lines that are no longer than those of the file, where such a one is found."""
    lines: list[str] = []
    for _ in range(_TRIES):
        mine = set(used)
        lines = _any_fact(words, rng, mine, wrong, method, loops)
        if _INDENT + max(map(len, lines)) <= words.width:
            break
    used |= mine
    return lines


def _any_fact(words: Words, rng: random.Random, used: set[str], wrong: bool, method: str, loops: bool) -> list[str]:
    if loops and rng.random() < 0.15 and not _hidden("len()", words):
        return _loop(words, rng, used, wrong, method)
    mention = words.references and rng.random() < 0.5
    kinds = _MENTIONS if mention else _NUMBERS if rng.random() < words.numeric else _TEXTS
    form, make = rng.choice([fact for fact in kinds if not _hidden(fact[0], words)])
    if words.quote == '"':
        form = form.replace("'", '"')
    values = list(make(words, rng))
    reference = rng.choice(words.references) if mention else "None"
    texts = [words.literal(value) for value in values]
    # Any object that is not None stands for the mentioned name here.
    right = eval(form.format(*texts, r="object()"), {})
    expected = words.literal(another(right, words, rng) if wrong else right)
    lines, shown = [], []
    for position, text in enumerate(texts):
        if f"{{{position}}}" in form and rng.random() < 0.5:
            name = words.variable(used)
            used.add(name)
            lines.append(f"{name} = {text}")
            text = name
        shown.append(text)
    expression = form.format(*shown, r=reference)
    if rng.random() < 0.4:
        name = words.variable(used)
        used.add(name)
        lines.append(f"{name} = {expression}")
        expression = name
    return [*lines, claim(expression, expected, method, rng)]
