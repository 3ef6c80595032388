"""Ways to apply a patch that does not quite fit, the most careful first. Used with `grading.patch=fuzzy` only.

1. with the line ends that each file has, where patch and file differ in CRLF and LF;
2. with paths as they stand, when all of them lack the a/ and b/ of git;
3. `git apply -C1 --ignore-whitespace`: one line of context on each side is enough, white space in it may differ;
4. the same with `--recount`: line counts of hunk headers are not believed;
5. `patch --fuzz=5`, if the image has it, for patches of plain text. It is given only what was understood of the patch,
   and no name that leaves the workdir or enters a `.git`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from skyrl_minisandbox.rewards.hunks import File, files, safe

_PLAIN = ("index ", "new file mode 100", "deleted file mode 100")

# Standard input: the patch. All or nothing: what the rehearsal refuses is not begun.
PATCH = r"""
command -v patch >/dev/null || { echo 'error: the image has no `patch`'; exit 1; }
cat >"$1" || exit 1
options=(--batch --forward --unified --fuzz=5 -p1 --no-backup-if-mismatch --reject-file=- --input="$1")
patch --dry-run "${options[@]}" && patch "${options[@]}"
status=$?
rm -f -- "$1"
exit "$status"
"""


@dataclasses.dataclass(frozen=True)
class Way:
    """name: for a reader. patch: as it is given. program: `git apply` with `own` repository or that of the `image`,
    `merge` or `patch`. options: for the program."""

    name: str
    patch: str
    options: tuple[str, ...] = ()
    program: str = "own"


def lenient_ways(patch: str, read: Callable[[str], bytes | None]) -> list[Way]:
    """What to try, in this order. read: the bytes of a file below the workdir, None when there are none."""
    known = files(patch)
    strip = 0 if known and all(file.bare for file in known) else 1
    ways = []
    if (ends := _with_line_ends(patch, known, strip, read)) != patch:
        patch, known = ends, files(ends)
        ways.append(Way("with the line ends that the files have", patch, (f"-p{strip}",)))
    if strip == 0:
        ways.append(Way("with paths as they stand", patch, ("-p0",)))
    options = (f"-p{strip}", "-C1", "--ignore-whitespace")
    ways.append(Way("with one line of context, white space ignored", patch, options))
    ways.append(Way("with the lines of each hunk counted anew", patch, (*options, "--recount")))
    if plain := _plain(known, strip):
        ways.append(Way("by `patch --fuzz=5`", plain, program="patch"))
    return ways


def _with_line_ends(patch: str, known: list[File], strip: int, read: Callable[[str], bytes | None]) -> str:
    """The patch with headers that end in LF and hunks whose lines end as the first line of their file does."""
    lines = patch.split("\n")
    body: dict[int, str] = {}  # index of a line in a hunk -> how it ends
    for file in known:
        if file.binary or not file.hunks:
            continue
        data = read(file.path(strip))
        if data is None:  # a new file ends as it likes, unless everything in the patch ends so
            whole = lines[file.hunks[0].at - 1].endswith("\r")
            end = "" if whole else "as it is"
        else:
            end = "\r" if data.split(b"\n", 1)[0].endswith(b"\r") else ""
        for hunk in file.hunks:
            body |= dict.fromkeys(range(hunk.at, hunk.end), end)
    for index, line in enumerate(lines):
        end = body.get(index, "")
        if end != "as it is":
            lines[index] = line.rstrip("\r") + (end if line[:1] in (" ", "-", "+") else "")
    return "\n".join(lines)


def _plain(known: list[File], strip: int) -> str:
    """What was understood, as a unified diff and nothing else; empty when that would not be all of it."""
    parts: list[str] = []
    for file in known:
        path = file.path(strip)
        if file.binary or not file.hunks or not all(line.startswith(_PLAIN) for line in file.more):
            return ""
        if not safe(path) or "\t" in path or "\n" in path or '"' in path or file.touched(strip) != {path}:
            return ""
        parts.append(f"--- {'/dev/null' if file.old == '/dev/null' else 'a/' + path}\n")
        parts.append(f"+++ {'/dev/null' if file.new == '/dev/null' else 'b/' + path}\n")
        for hunk in file.hunks:
            parts.append(f"@@ -{hunk.start},{len(hunk.before)} +{hunk.new_start},{len(hunk.after)} @@\n")
            parts.extend(f"{line or ' '}\n" for line in hunk.lines)
    return "".join(parts)
