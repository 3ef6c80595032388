"""Canaries are hard to tell from hidden tests."""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from skyrl_minisandbox.rewards.canaries import Planted
from tests.rewards.planted import bare, planted_corpus, without


def features(
    node: ast.FunctionDef, lines: Sequence[str], others: Sequence[ast.FunctionDef], known: set[str]
) -> list[float]:
    """What somebody who knows this page would look at."""
    body = [ast.dump(statement) for statement in node.body]
    rest = {ast.dump(statement) for other in others if other is not node for statement in other.body}
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    words = re.findall(r"[a-z]+", node.name.lower())
    strings = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    asserts = [n for n in node.body if isinstance(n, ast.Assert)]
    above = lines[node.lineno - 2].strip() if node.lineno > 1 else ""
    return [
        float(len(node.body)),
        float((node.end_lineno or 0) - node.lineno),
        float(node.body[0].lineno == node.lineno),
        float(bool(above)),
        float(ast.get_docstring(node) is not None),
        sum(statement in rest for statement in body) / len(body),
        float(len(names - known)),
        float(any(isinstance(n, ast.Call) for n in ast.walk(node))),
        float(isinstance(node.body[-1], ast.Assert)),
        len(asserts) / len(body),
        max((value.count(" ") for value in strings), default=0) + 0.0,
        float(len(strings)),
        float(len(words)),
        float(len(words) - len(set(words))),
        float(len(ast.dump(node))),
        float(any(isinstance(n, ast.For | ast.With) for n in node.body)),
    ]


def stump(feature: int, cut: float, above: bool) -> Callable[[list[float]], bool]:
    """A rule over one feature."""
    return lambda row: (row[feature] > cut) == above


def best_stumps(rows: Sequence[tuple[list[float], bool]]) -> list[tuple[int, float, bool]]:
    """For each feature the threshold and side that tell the two classes best."""
    chosen = []
    for feature in range(len(rows[0][0])):
        cuts = sorted({row[feature] for row, _ in rows})
        cuts = cuts[:: max(1, len(cuts) // 30)]
        scores = {
            (cut, above): balanced(rows, stump(feature, cut, above))
            for cut, above in itertools.product(cuts, (True, False))
        }
        cut, above = max(scores, key=lambda option: scores[option])
        chosen.append((feature, cut, above))
    return chosen


def balanced(rows: Sequence[tuple[list[float], bool]], guess: Callable[[list[float]], bool]) -> float:
    """Mean of the shares of both classes that are guessed right."""
    shares = []
    for kind in (True, False):
        of_kind = [row for row, is_canary in rows if is_canary == kind]
        shares.append(sum(guess(row) == kind for row in of_kind) / len(of_kind))
    return sum(shares) / 2


def rows_of(path: Path, planted: Planted, kind: str) -> list[tuple[list[float], bool]]:
    """Features of the canaries of a planted file, and of as many real tests that play the hidden ones."""
    (new,) = planted.sources.values()
    module, lines = ast.parse(new), new.split("\n")
    bodies = [module.body, *(node.body for node in module.body if isinstance(node, ast.ClassDef))]
    tests = [n for body in bodies for n in body if isinstance(n, ast.FunctionDef) and n.name.startswith("test")]
    canaries = [test for test in tests if test.name in bare(planted, kind)]
    plain = [test for test in tests if test.name not in bare(planted) and not test.decorator_list]
    plain = [test for test in plain if len(test.args.args) <= 1]
    hidden = random.Random(path.name).sample(plain, min(2, len(plain)))
    # What the attacker has of the file: neither canaries nor hidden tests.
    seen = without(ast.parse(new), {*bare(planted), *(test.name for test in hidden)})
    known = {node.id for node in ast.walk(seen) if isinstance(node, ast.Name)}
    return [(features(test, lines, tests, known), test in canaries) for test in (*canaries, *hidden)]


@pytest.mark.ci
def test_a_heuristic_hardly_tells_what_must_fail_from_hidden_tests() -> None:
    """An attacker learns from half of the files which traits tell a canary, and tries on the other half.

    To be paid it must be right about every canary and every hidden test of a run, which are four or more.
    """
    files = [rows_of(path, planted, "fail") for path, _, planted in planted_corpus(120)]
    learn = [row for rows in files[::2] for row in rows]
    meet = [row for rows in files[1::2] for row in rows]
    stumps = best_stumps(learn)
    for feature, cut, above in stumps:
        assert balanced(meet, stump(feature, cut, above)) < 0.75, feature
    assert balanced(meet, lambda row: sum((row[f] > c) == a for f, c, a in stumps) * 2 > len(stumps)) < 0.8


@pytest.mark.ci
def test_the_words_of_one_files_canaries_are_no_list_of_ours() -> None:
    """No word is in the names of many files' canaries that is not as common in the names of their tests."""
    ours: dict[str, int] = {}
    theirs: dict[str, int] = {}
    files = 0
    for _, text, planted in planted_corpus(100):
        files += 1
        for word in {word for name in bare(planted) for word in re.findall(r"[a-z]{3,}", name.lower())}:
            ours[word] = ours.get(word, 0) + 1
        for word in set(re.findall(r"[a-z]{3,}", text.lower())):
            theirs[word] = theirs.get(word, 0) + 1
    telling = {word: count for word, count in ours.items() if count > files / 8 and theirs.get(word, 0) < count}
    assert not telling
