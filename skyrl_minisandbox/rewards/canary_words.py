"""The words and the hand of a test file: what a canary written into it is made of.

Names are recombined from the words that the file itself uses, so that no list of ours tells a canary.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import keyword
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_LOCAL = re.compile(r"^[ \t]+([^\W\d]\w*) *=[^=]", re.MULTILINE)
_MARGIN = re.compile(r"^(?:\w|@).*|^\s*(?:global|from|import) .*", re.MULTILINE)  # lines that may bind a global name
_DELETED = re.compile(r"^\s*del (.*)$", re.MULTILINE)
_STAR = re.compile(r"import\s*\(?\s*\*")
# Builtins that canaries call, where the file may bind such a name; that it also finds uses that bind nothing costs
# no more than a little variety.
_REBOUND = re.compile(
    r"(?:\b(?:import|as|def|class|for|global) +|, *)(len|max|min|sorted|sum|divmod|str|list|range|dict)\b"
)
_ASSIGNED = re.compile(r"\b(len|max|min|sorted|sum|divmod|str|list|range|dict) *(?::[^=\n]*)?=(?!=)")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# Columns. Wider lines than a file has would show what is ours, also to tests that look at their own file's style.
_NARROWEST, _WIDEST = 72, 120

# For files with few words of their own.
_SPARE = re.findall(
    r"\w+",
    """
    above alias amount anchor batch before blank border branch bridge bundle button carrier cell center chain
    channel column corner count cursor default degree delta detail digest double edge engine entry field filter
    folder format frame garden group handle header height image index inner input island kernel label ladder layer
    leaf letter level limit line margin marker matrix method middle minor mirror model native needle nested node
    number object offset option order outer output packet page panel parent part pattern period phrase pixel plain
    point pointer prefix product query range ratio record region repeat result river root scale scope season
    second segment series shadow shape signal simple single slice source space stage state station step stone
    stream string style suffix symbol table target template tension token total tower track tree unit upper value
    vector vertex village wagon weight width window winter wire word zone
    """,
)


@dataclasses.dataclass
class Words:
    """The vocabulary of one test file.

    common: words of its identifiers, with repetition; distinct: without. titles: names of its tests.
    variables: names of local variables. taken: identifiers that no canary may have. quote: the quotation mark
    that it mostly uses.
    references: global names of the module that a function may mention without running anything.
    numeric: the share of numbers among its literals. width: columns of its longest line, within reason.
    hidden: builtins of which the module has another; hides_all: it imports by `*`, so that none is sure.
    """

    rng: random.Random
    common: list[str]
    titles: list[str]
    distinct: list[str]
    variables: list[str]
    taken: set[str]
    quote: str
    references: list[str]
    numeric: float
    width: int
    hidden: set[str]
    hides_all: bool

    @classmethod
    def of(cls, text: str, module: ast.Module, taken: set[str], rng: random.Random) -> Words:
        """Read them off the source. taken: the one set that the words of all files share."""
        identifiers = _IDENTIFIER.findall(text)
        common = [word for name, count in Counter(identifiers).items() for word in words_of(name) * min(count, 5)]
        # Few words give few names, and a name that comes again can be learned.
        if len(set(common)) < 150:
            common += _SPARE * max(1, len(common) // (2 * len(_SPARE)))
        numbers = len(re.findall(r"(?<![\w.])\d+", text))
        strings = text.count('"') // 2 + text.count("'") // 2
        references = _references(module) - _all_identifiers(_DELETED.findall(text))
        not_local = {*dir(builtins), *keyword.kwlist, *references}
        return cls(
            rng=rng,
            common=common,
            distinct=sorted(set(common)),
            titles=sorted(set(re.findall(r"\bdef +(test\w*)", text))),
            variables=sorted(set(_LOCAL.findall(text)) - _all_identifiers(_MARGIN.findall(text)) - not_local),
            taken=taken,
            quote="'" if text.count("'") > text.count('"') else '"',
            references=sorted(references),
            numeric=numbers / (numbers + strings + 1),
            width=min(max(_NARROWEST, *map(len, text.split("\n"))), _WIDEST),
            hidden={*_REBOUND.findall(text), *_ASSIGNED.findall(text)},
            hides_all=_STAR.search(text) is not None,
        )

    def word(self) -> str:
        """One word that is no Python keyword or builtin."""
        return self.rng.choice(self.common)

    def phrase(self, low: int, high: int, between: str = " ") -> str:
        """Between `low` and `high` words."""
        return between.join(self.word() for _ in range(self.rng.randint(low, high)))

    def variable(self, avoid: Collection[str]) -> str:
        """A name for a local variable, mostly one that the tests use: no global of the module, none of `avoid`."""
        while True:
            kind = self.rng.random()
            if self.variables and kind < 0.85:
                name = self.rng.choice(self.variables)
                if name not in avoid:
                    return name
            name = self.word() if kind < 0.93 else f"{self.word()}_{self.word()}"
            if name not in avoid and name not in self.taken and not hasattr(builtins, name):
                return name
            # A file's own words are mostly its globals: two of them together seldom are.
            self.common.append(self.rng.choice(_SPARE))

    def test_name(self) -> str:
        """A new name in the manner of the file's tests, taken from now on.

        One of theirs is the pattern: its number of words and whether it has capitals. Some of its words stay.
        """
        while True:
            pattern = self.rng.choice(self.titles) if self.titles else "test_a_b"
            start = "test_" if pattern.startswith("test_") else "test"
            old = words_of(pattern.removeprefix(start), shortest=1)
            count = min(max(2, len(old) + self.rng.choice((-1, 0, 0, 1))), 7)
            # Words that no test name need have: a short name of the file's own few would come again.
            fresh = set(self.rng.sample(range(count), max(2, count // 2)))
            new: list[str] = []
            for i in range(count):
                kept = old[i] if i < len(old) and self.rng.random() < 0.35 else self._title_word()
                word = self.rng.choice(self.distinct) if i in fresh else kept
                if word not in new:
                    new.append(word)
            if start == "test" and any(c.isupper() for c in pattern):
                name = start + "".join(word.capitalize() for word in new)
            else:
                name = "test_" + "_".join(new)
            if len(new) > 1 and name not in self.taken:
                self.taken.add(name)
                return name
            self.common.append(self.rng.choice(_SPARE))

    def test_name_like(self, model: str) -> str:
        """A new name that has the words of the test `model` and one more: it speaks of what that speaks of."""
        start = "test_" if model.startswith("test_") else "test"
        old = words_of(model.removeprefix(start), shortest=1)
        for _ in range(20):
            new = list(old)
            new.insert(self.rng.randint(0, len(new)), self.rng.choice(self.distinct))
            capitals = start == "test" and any(c.isupper() for c in model)
            name = start + "".join(word.capitalize() for word in new) if capitals else "test_" + "_".join(new)
            if len(set(new)) == len(new) > 1 and name not in self.taken:
                self.taken.add(name)
                return name
        return self.test_name()

    def docstring(self) -> str:
        """One sentence, without quotation marks."""
        return self.phrase(3, 7).capitalize() + self.rng.choice(("", ".", "."))

    def _title_word(self) -> str:
        if self.titles and self.rng.random() < 0.5:
            words = words_of(self.rng.choice(self.titles).removeprefix("test"))
            if words:
                return self.rng.choice(words)
        return self.word()

    def literal(self, value: object) -> str:
        """Python source of a value of the plain types, strings in the file's quotes."""
        if isinstance(value, str):
            text = repr(value)
            if self.quote == '"' and '"' not in value and "\\" not in text and text.startswith("'"):
                return f'"{value}"'
            return text
        if isinstance(value, bytes):
            return "b" + self.literal(value.decode("ascii"))
        if isinstance(value, list):
            return "[" + ", ".join(map(self.literal, value)) + "]"
        if isinstance(value, tuple):
            return "(" + ", ".join(map(self.literal, value)) + ("," if len(value) == 1 else "") + ")"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self.literal(k)}: {self.literal(v)}" for k, v in value.items()) + "}"
        return repr(value)


def words_of(name: str, shortest: int = 3) -> list[str]:
    """The lower-case words of an identifier that can themselves be identifiers."""
    words = (part.lower() for part in _PART.findall(name))
    return [word for word in words if shortest <= len(word) <= 14 and not _reserved(word)]


def _reserved(word: str) -> bool:
    return keyword.iskeyword(word) or hasattr(builtins, word) or word in ("test", "tests", "self", "cls", "async")


def _all_identifiers(texts: Iterable[str]) -> set[str]:
    return {name for text in texts for name in _IDENTIFIER.findall(text)}


def _references(module: ast.Module) -> set[str]:
    """Names that the module's top level binds by imports, functions and classes."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            names |= _bound(node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.decorator_list:
            names |= {node.name} if not node.name.lower().startswith("test") else set()
    return {name for name in names if name not in ("pytest", "unittest") and not name.startswith("_")}


def _bound(names: Iterable[ast.alias]) -> set[str]:
    return {(alias.asname or alias.name).split(".")[0] for alias in names if alias.name != "*"}
