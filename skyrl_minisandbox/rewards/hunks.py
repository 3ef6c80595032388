"""What a patch says, file by file and hunk by hunk, and why one of its hunks does not fit.

Reads whatever is called a patch, without an exception: what is no patch has no files. Lines end at a newline only, as
git has it; a carriage return belongs to its line.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable

_HUNK = re.compile(r"@@ -(\d{1,9})(?:,(\d{1,9}))? \+(\d{1,9})(?:,(\d{1,9}))? @@")
_FAILED = re.compile(r"patch failed: (.*):(\d+)$")
_CORRUPT = re.compile(r"corrupt (?:binary )?patch at line (\d+)|patch with only garbage at line (\d+)")
_ESCAPE = re.compile(r'\\([0-7]{3}|[abtnvfr"\\])')
_LETTERS = {"a": "\a", "b": "\b", "t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r", '"': '"', "\\": "\\"}
_NULL = "/dev/null"
_LONGEST = 500
_SHOWN = 60


@dataclasses.dataclass
class Hunk:
    """at, end: the lines of the patch that it takes, from 1, its header and the last one included. header: without what
    follows the second `@@`. start, new_start: the first lines of the old and the new file that it means. lines: its
    body, cut short where the patch is."""

    at: int
    header: str
    start: int
    new_start: int
    old: int
    new: int
    lines: list[str] = dataclasses.field(default_factory=list)
    end: int = 0

    @property
    def before(self) -> list[str]:
        """The lines that it expects."""
        return [_content(line) for line in self.lines if line[:1] not in ("+", "\\")]

    @property
    def after(self) -> list[str]:
        """The lines that it leaves."""
        return [_content(line) for line in self.lines if line[:1] not in ("-", "\\")]


@dataclasses.dataclass
class File:
    """One file of a patch. old, new: its names as written, prefixes included, `/dev/null` for none, "" for not told.

    at: the number of its first line, from 1. more: the lines of git's extended header. binary: it has a binary hunk.
    """

    at: int
    old: str = ""
    new: str = ""
    more: list[str] = dataclasses.field(default_factory=list)
    hunks: list[Hunk] = dataclasses.field(default_factory=list)
    binary: bool = False

    def path(self, strip: int = 1) -> str:
        """Its name without the first `strip` parts."""
        name = self.old if self.new in ("", _NULL) else self.new
        return name.split("/", strip)[-1] if name.count("/") >= strip else name

    def touched(self, strip: int = 1) -> set[str]:
        """Every name that it speaks of, without the first `strip` parts."""
        names = {name.split("/", strip)[-1] for name in (self.old, self.new) if name not in ("", _NULL)}
        return names | {line.split(" ", 2)[2] for line in self.more if line.startswith(("rename ", "copy "))}

    @property
    def bare(self) -> bool:
        """Whether its names lack the a/ and b/ that git puts before them."""
        prefixed = zip((self.old, self.new), ("a/", "b/"), strict=True)
        return any(name not in ("", _NULL) and not name.startswith(prefix) for name, prefix in prefixed)


def files(patch: str) -> list[File]:
    """The files of a patch, in its order."""
    found: list[File] = []
    lines = patch.split("\n")
    number = 0
    while number < len(lines):
        line = lines[number].rstrip("\r")
        number += 1
        if line.startswith("diff --git "):
            found.append(File(number))
            half = line.removeprefix("diff --git ")
            if len(half) % 2 and half[len(half) // 2] == " ":
                found[-1].old, found[-1].new = half[: len(half) // 2], half[len(half) // 2 + 1 :]
        elif line.startswith("--- ") and number < len(lines) and lines[number].startswith("+++ "):
            if not found or found[-1].hunks or found[-1].binary:
                found.append(File(number))
            found[-1].old, found[-1].new = _name(line), _name(lines[number].rstrip("\r"))
            number += 1
        elif found and (match := _HUNK.match(line)):
            start, old, new_start, new = (1 if part is None else int(part) for part in match.groups())
            hunk = Hunk(number, match[0], start, new_start, old, new)
            found[-1].hunks.append(hunk)
            number = hunk.end = _body(hunk, lines, number)
        elif found and line == "GIT binary patch":
            found[-1].binary = True
        elif found and not found[-1].hunks and not found[-1].binary and line:
            found[-1].more.append(line)
    return found


def safe(path: str) -> bool:
    """Whether a name stays below the directory that it is relative to, and out of any `.git`."""
    parts = path.split("/")
    return bool(path) and not {"", ".", "..", ".git"} & {part.lower() for part in parts} and "\0" not in path


def _body(hunk: Hunk, lines: list[str], number: int) -> int:
    """Take the lines that the hunk's header promises; the number of the line after them."""
    old, new = hunk.old, hunk.new
    while number < len(lines):
        first = lines[number][:1]
        if first != "\\" and (old <= 0 >= new or first not in ("", " ", "\r", "-", "+")):
            break
        if first == "" and number == len(lines) - 1:
            break  # the end of the text, not a line
        old -= first not in ("+", "\\")
        new -= first not in ("-", "\\")
        hunk.lines.append(lines[number])
        number += 1
    return number


def _content(line: str) -> str:
    """A line of a hunk without its first letter; an empty context line may have lost it."""
    return line if line[:1] in ("", "\r") else line[1:]


def _name(line: str) -> str:
    """The name in a `---` or `+++` line: git may quote it, `diff -u` puts a time after it."""
    name = line[4:]
    quoted = name.rstrip()
    if len(quoted) > 1 and quoted[0] == quoted[-1] == '"':
        raw = b"".join(map(_unescaped, _ESCAPE.split(quoted[1:-1]), itertools.cycle((False, True))))
        return raw.decode("utf-8", "surrogateescape")
    return name.split("\t", 1)[0].rstrip()


def _unescaped(text: str, escape: bool) -> bytes:
    if not escape:
        return text.encode("utf-8", "surrogateescape")
    return _LETTERS[text].encode() if text in _LETTERS else bytes([int(text, 8) & 0xFF])


def explain(patch: str, errors: list[str], read: Callable[[str], bytes | None]) -> str:
    """git's errors in one line, with the hunk that is meant and what the file has in its place.

    errors: lines of `git apply` without `error: `. read: the bytes of a file below the workdir, None when there are
        none.
    """
    parts: list[str] = []
    known = files(patch)
    for error in errors:
        text = error
        if match := _FAILED.search(error):
            text = _misfit(known, match[1], int(match[2]), read) or error
        elif match := _CORRUPT.search(error):
            text = f"{error}{_broken(known, int(match[1] or match[2]))}"
        elif error.endswith("patch does not apply") and parts:
            continue  # said by the line before
        parts.append(text)
    if known and all(file.bare for file in known):
        parts.append("its paths lack the prefixes a/ and b/")
    elif (
        known and "\r\n" in patch and all("\r" in line for file in known for hunk in file.hunks for line in hunk.lines)
    ):
        parts.append("all its lines end in CRLF")
    text = "; ".join(parts[:3])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _misfit(known: list[File], path: str, start: int, read: Callable[[str], bytes | None]) -> str:
    """Of which hunk git says that it failed: it names the file, and the first line that the hunk means."""
    for file in known:
        names = (file.path(), file.path(0), file.old.split("/", 1)[-1])
        for number, hunk in enumerate(file.hunks, 1):
            if path in names and hunk.start == start:
                where = f"{path}: hunk {number} of {len(file.hunks)} ({hunk.header}) does not apply"
                return f"{where}: {_difference(hunk, read(path))}"
    return ""


def _difference(hunk: Hunk, data: bytes | None) -> str:
    if data is None:
        return "the file cannot be read"
    have = data.decode("utf-8", "surrogateescape").split("\n")
    if have[-1] == "":
        have.pop()
    want, at = hunk.before, max(hunk.start - 1, 0)
    if not want:
        return "it has no context to find its place by"
    if hunk.after != want and hunk.after == have[at : at + len(hunk.after)]:
        return "the file has its new lines already"
    for offset, line in enumerate(want):
        number = at + offset
        if number >= len(have):
            return f"the file ends at line {len(have)}, the hunk expects line {number + 1}: {_shown(line)}"
        if have[number] == line:
            continue
        if have[number].rstrip("\r") == line.rstrip("\r"):
            file, other = ("CRLF", "LF") if have[number].endswith("\r") else ("LF", "CRLF")
            return f"line {number + 1} ends in {file} in the file and in {other} in the patch"
        if have[number].split() == line.split():
            return f"line {number + 1} differs in white space: {_shown(have[number])}, not {_shown(line)}"
        return f"line {number + 1} of the file is {_shown(have[number])}, the hunk expects {_shown(line)}"
    return "its lines are there, but the file must begin or end with them"


def _broken(known: list[File], line: int) -> str:
    """Which hunk a line of the patch is in, and how its body differs from what its header promises."""
    for file in reversed(known):
        if file.at > line:
            continue
        for number, hunk in reversed([*enumerate(file.hunks, 1)]):
            if hunk.at <= line:
                promised = f"{hunk.old} old and {hunk.new} new lines"
                has = f"{len(hunk.before)} and {len(hunk.after)}"
                return f" ({file.path()}: hunk {number} ({hunk.header}) promises {promised} and has {has})"
        return f" ({file.path()})"
    return ""


def _shown(line: str) -> str:
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "…")
