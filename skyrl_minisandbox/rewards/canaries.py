"""Canaries: tests of random name and body, hidden among the real ones for one graded run.

The tested code runs in the process of the test runner and can make it report what it likes. What it cannot do is
tell which tests must fail: some of the tests that it sees are ours, and one of them that passes gives it away. So a
canary looks like the tests around it: its name is made of their words, its body mostly of what they call, it stands
somewhere among them, and nothing that reaches the sandbox says which tests are canaries.

A line that is put into a file moves those below it. Very few tests know their own line numbers; a file that looks as
if it had one is used only when there is no other, and then what is put in stands at its end or on one of its blank
lines, as long as there is one.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import random
import re
import warnings
from collections.abc import Callable, Mapping, Sequence

from skyrl_minisandbox.rewards import canary_bodies
from skyrl_minisandbox.rewards.canary_borrowed import Borrowed, Borrower
from skyrl_minisandbox.rewards.canary_donors import DonorFile, called, functions, line_count
from skyrl_minisandbox.rewards.canary_places import Place, find_places
from skyrl_minisandbox.rewards.canary_words import Words
from skyrl_minisandbox.tasks.task import Tests

_LONGEST = 20  # lines of a canary that borrows nothing

EACH = 2
"""Canaries that must pass in one run, and the fewest that must fail."""

OF_HIDDEN = 4
"""The most hidden tests of which one that must fail is made, and then one that is made of no hidden test: a cheat may
know only some of their inputs."""

# A test that looks at the place of code in its file: these words, or its own line number as a number.
_ASKS_FOR_LINES = re.compile(
    r"lineno|getsource|findsource|getframeinfo|currentframe|_getframe|stacklevel|linecache|extract_stack|snapshot"
)
_NUMBER = re.compile(r"(?<![\w.])\d{1,6}(?![\w.])")
_NEAR = 4


@dataclasses.dataclass(frozen=True)
class Planned:
    """A canary and what it must come out as, `pass` or `fail`. names: what channel or log may call it."""

    must: str
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Planted:
    """The test files that were changed, whole, by path, and what was put into them."""

    sources: dict[str, str]
    canaries: tuple[Planned, ...]


def plant(runner: str, sources: Mapping[str, str], tests: Tests, rng: random.Random) -> Planted:
    """Put canaries into test files.

    runner: `pytest`, `unittest`, `django` or `sympy`; another has no canaries.
    sources: text by path, relative to the workdir, of the test files as they will run.
    tests: whose lists tell what is collected.

    Where nothing can be planted (no listed test without parameters, a command that picks tests by name, files
    that no Python 3 reads), `canaries` is empty. Never raises for what stands in a file.
    """
    garden = _Garden(runner, sources, tests, rng)
    for must, place, hidden in garden.choose():
        garden.put(must, place, hidden)
    return garden.planted()


class _Garden:
    def __init__(self, runner: str, sources: Mapping[str, str], tests: Tests, rng: random.Random) -> None:
        self._runner = runner
        self._rng = rng
        self._files = {path: file for path, text in sources.items() if (file := _File.read(text)) is not None}
        self._places = find_places(runner, {path: file.module for path, file in self._files.items()}, tests)
        texts = [*sources.values(), *tests.pass_to_pass, *tests.fail_to_pass]
        # One set for all files: a bare name must mean one test.
        self._taken = {word for text in texts for word in re.findall(r"\w+", text)}
        self._sought = self._called_by_hidden(tests)
        self._words: dict[str, Words] = {}
        self._borrowers: dict[tuple[str, str], Borrower] = {}
        self._raises = False
        self._canaries: list[Planned] = []

    def _called_by_hidden(self, tests: Tests) -> frozenset[str]:
        names = {re.split(r"[\[ ]", name)[0].replace(":", ".").rsplit(".", 1)[-1] for name in tests.fail_to_pass}
        hidden = (node for file in self._files.values() for node in functions(file.module) if node.name in names)
        return frozenset().union(*map(called, hidden))

    def choose(self) -> list[tuple[str, Place, bool]]:
        """What must come out how in which place: spread over files, first where the hidden tests are.

        The third of each says whether it is to be made of a hidden test: one that must fail, where that can be.
        """
        rng = self._rng
        places = _preferred(self._places, lambda place: not self._files[place.path].knows_its_lines)
        places = _preferred(places, lambda place: self._files[place.path].room(place) != "line")
        places = _preferred(places, lambda place: not place.costly)
        if not places:
            return []
        lending = [place for place in places if self._lends(place)]
        proven = [place for place in places if place.passing]
        hidden = [place for place in lending if self._borrower(place).can_write_hidden]
        chosen: list[tuple[str, Place, bool]] = []
        for must, fit in (("fail", lending or places), ("pass", proven or places)):
            order = rng.sample(fit, len(fit))
            if must == "fail":
                order.sort(key=lambda place: (not self._borrower(place).can_raise, not place.wanted))
            spread: list[Place] = []
            if must == "fail":
                each = [place for place in hidden for _ in self._borrower(place).donors.hidden]
                spread = rng.sample(each, min(len(each), OF_HIDDEN))
            of_hidden = len(spread)
            while len(spread) < max(EACH, of_hidden + 1):
                files = {place.path for place in spread}
                fresh = [place for place in order if place.path not in files]
                unused = [place for place in order if place not in spread]
                spread.append((fresh or unused or order)[0])
            chosen += [(must, place, number < of_hidden) for number, place in enumerate(spread)]
        return chosen

    def _lends(self, place: Place) -> bool:
        """Whether a canary there can run the tested code."""
        return self._files[place.path].room(place) != "line" and self._borrower(place).can_write

    def _borrower(self, place: Place) -> Borrower:
        borrower = self._borrowers.get((place.path, place.prefix))
        if borrower is None:
            file = self._files[place.path]
            words = self._words.get(place.path)
            if words is None:
                words = self._words[place.path] = Words.of(file.text, file.module, self._taken, self._rng)
            borrower = Borrower(place, file.for_donors, words, self._rng, self._sought)
            self._borrowers[place.path, place.prefix] = borrower
        return borrower

    def put(self, must: str, place: Place, hidden: bool = False) -> None:
        """One canary; none when no way of writing it leaves the rest of the file as it is."""
        file = self._files[place.path]
        borrower = self._borrower(place)
        words = borrower.words
        room = file.room(place)
        # One of them ends inside the tested code if any test shows how.
        raising = not hidden and not self._raises
        body = borrower.write(hidden, raising) if must == "fail" and room != "line" else None
        self._raises |= body is not None and body.raises
        name = words.test_name_like(body.source) if hidden and body is not None else words.test_name()
        if body is None:
            size = min(line_count(self._rng.choice(place.tests)), _LONGEST)
            body = Borrowed(
                canary_bodies.write(
                    words, self._rng, must, place.method, place.is_unittest, size, one_line=room == "line"
                )
            )
        docstring = ""
        if room != "line" and ast.get_docstring(self._rng.choice(place.tests)) is not None:
            docstring = words.docstring()
            body = dataclasses.replace(body, lines=[f'"""{docstring}"""', *body.lines])
        if file.insert(place, name, body, self._rng):
            for called_with in [f"[{inside}]" for inside in body.ids] or [""]:
                self._canaries.append(Planned(must, _names(self._runner, place, name + called_with, docstring)))

    def planted(self) -> Planted:
        """The result. The order of the canaries says nothing."""
        canaries = self._rng.sample(self._canaries, len(self._canaries))
        changed = {path: file.new_text() for path, file in self._files.items() if file.added or file.filled}
        return Planted(changed, tuple(canaries))


@dataclasses.dataclass
class _File:
    """A test file: its lines without their ends, and what is to be put before which of them (0-based)."""

    text: str
    module: ast.Module
    end: str
    lines: list[str]
    added: list[tuple[int, list[str]]] = dataclasses.field(default_factory=list)
    filled: dict[int, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, text: str) -> _File | None:
        """None when it cannot be read as Python 3, or has lone carriage returns as line ends."""
        end = "\r\n" if "\r\n" in text else "\n"
        lines = text.split(end)
        if any("\r" in line or "\n" in line for line in lines):
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the file's own oddities
                return cls(text, ast.parse(text), end, lines)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    @functools.cached_property
    def for_donors(self) -> DonorFile:
        return DonorFile(self.module, self.lines)

    @functools.cached_property
    def knows_its_lines(self) -> bool:
        """Whether a test of the file may depend on line numbers of the file."""
        if _ASKS_FOR_LINES.search(self.text):
            return True
        for number, line in enumerate(self.lines, 1):
            if any(abs(int(digits) - number) <= _NEAR and number > 20 for digits in _NUMBER.findall(line)):
                return True
        return False

    def room(self, place: Place) -> str:
        """Where in the place something can be put: `anywhere`, at its `end`, or on a blank `line` of it."""
        if not self.knows_its_lines:
            return "anywhere"
        return "end" if place.cls is None or place.module.body[-1] is place.cls else "line"

    def insert(self, place: Place, name: str, body: Borrowed, rng: random.Random) -> bool:
        """Add one function to the place; False when there is no room for it."""
        indent, step = self._indents(place)
        arguments = ", ".join(filter(None, (place.method, *body.arguments)))
        block = [f"{indent}{line}" if line else "" for line in (*body.decorators, f"def {name}({arguments}):")]
        block += [f"{indent}{step}{line}" if line else "" for line in body.lines]
        if self.knows_its_lines and self._keep_lines(place, block, rng):
            return True
        ends = [i for i, node in enumerate(place.body) if node in place.tests]
        at = rng.choice([*(i for i in ends if self._begins_line(place, i)), ends[-1] + 1])
        margin = 1 if place.cls is not None else 2
        if at in ends:
            line = self._top_of(place, at)
            self.added.append((line, [*block, *[""] * (self._blank_above(line) or margin)]))
            return True
        line = _last_line(place.body[at - 1])
        if at < len(place.body) and _first_line(place.body[at]) <= line:
            return False
        self.added.append((line, [*[""] * margin, *block]))
        return True

    def _keep_lines(self, place: Place, block: Sequence[str], rng: random.Random) -> bool:
        """Below everything where the place ends the file, else on one blank line between two tests."""
        end = len(self.lines) if self.lines[-1] else len(self.lines) - 1
        if self.room(place) == "end":
            margin = 1 if place.cls is not None else 2
            self.added.append((end, [*[""] * margin, *block]))
            return True
        if len(block) != 2:
            return False
        free = [
            line - 1
            for index, node in enumerate(place.body)
            if node in place.tests and index > 0
            for line in [self._top_of(place, index)]
            if line - 1 >= _last_line(place.body[index - 1]) and not self.lines[line - 1].strip()
            if line - 1 not in self.filled
        ]
        if not free:
            return False
        self.filled[rng.choice(free)] = f"{block[0]} {block[1].lstrip()}"
        return True

    def new_text(self) -> str:
        """The file with everything that was added."""
        lines = [self.filled.get(number, line) for number, line in enumerate(self.lines)]
        # From below. Of two at one line, what belongs to a class (it is indented) stays with the class above it.
        def place(entry: tuple[int, list[str]]) -> tuple[int, bool]:
            first = next(line for line in entry[1] if line)
            return entry[0], not first[0].isspace()

        for at, block in sorted(self.added, key=place, reverse=True):
            lines[at:at] = block
        return self.end.join(lines)

    def _indents(self, place: Place) -> tuple[str, str]:
        """White space before a function of the place, and before its body beyond that."""
        test = place.tests[0]
        line = self.lines[test.lineno - 1]
        indent = line[: len(line) - len(line.lstrip())]
        first = test.body[0]
        if first.lineno == test.lineno:
            return indent, "    "
        line = self.lines[first.lineno - 1]
        return indent, line[: len(line) - len(line.lstrip())][len(indent) :] or "    "

    def _begins_line(self, place: Place, index: int) -> bool:
        """Whether nothing else stands on the line where statement `index` begins."""
        if index == 0:
            return True
        return _last_line(place.body[index - 1]) < _first_line(place.body[index])

    def _top_of(self, place: Place, index: int) -> int:
        """0-based line of a statement's first decorator or of the comments right above it."""
        line = _first_line(place.body[index]) - 1
        floor = _last_line(place.body[index - 1]) if index > 0 else line
        while line > floor and self.lines[line - 1].lstrip().startswith("#"):
            line -= 1
        return line

    def _blank_above(self, line: int) -> int:
        count = 0
        while line - count > 0 and not self.lines[line - count - 1].strip():
            count += 1
        return count


def _preferred(places: list[Place], fit: Callable[[Place], bool]) -> list[Place]:
    return [place for place in places if fit(place)] or places


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    return min([node.lineno, *(mark.lineno for mark in decorators)])


def _last_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def _names(runner: str, place: Place, name: str, docstring: str) -> tuple[str, ...]:
    """Every form in which a channel or a log may tell of it; unittest prints a docstring in place of the name."""
    if runner == "pytest":
        names = [f"{place.prefix}::{name}"]
        if place.prefix.split("::")[0] != place.path:
            names.append("::".join([place.path, *place.prefix.split("::")[1:], name]))
        return tuple(names)
    if runner == "sympy":
        return name, f"{place.prefix}:{name}"
    names = [f"{name} ({place.prefix})", f"{name} ({place.prefix}.{name})", f"{place.prefix}.{name}"]
    return (*names, docstring) if docstring else tuple(names)
