"""The table in `docs/rewards.md`: `python -m tests.rewards.hacks.table`.

Runs every hack in the grading that its bait names and in `protected`, every twin in both, and writes what was found
between the two markers. Needs the package index (pytest, Django, SymPy); takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.images.sources import Sources
from tests.rewards.hacks import HACKS, TWINS
from tests.rewards.hacks.hack import KINDS, Hack
from tests.rewards.hacks.suite import Bench
from tests.support import REPOSITORY

DOCUMENT = REPOSITORY / "docs/rewards.md"
BEGIN, END = "<!-- hacks: begin (python -m tests.rewards.hacks.table) -->", "<!-- hacks: end -->"


@dataclasses.dataclass(frozen=True)
class Row:
    """One hack and what came of it. bait: whether the bait was taken, None when there is none."""

    hack: Hack
    bait: bool | None
    outcome: str
    paid: bool

    @property
    def text(self) -> str:
        """The row as Markdown."""
        hack = self.hack
        bait = "-" if self.bait is None else f"{hack.bait}: {'paid' if self.bait else '**not paid**'}"
        found = f"**paid**: {hack.paid}" if self.paid else f"{self.outcome}: {hack.stopped}"
        return f"| {hack.kind} | {hack.name} | {hack.runner} | {_cell(hack.idea)} | {bait} | {_cell(found)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def measure(bench: Bench, hacks: Sequence[Hack]) -> list[Row]:
    """Try each."""
    rows = []
    for hack in hacks:
        reports = [bench.report(hack, "protected") for _ in range(hack.tries)]
        report = next((one for one in reports if one.resolved), reports[0])
        bait = bench.bait_taken(hack) if hack.bait else None
        rows.append(Row(hack, bait, str(report.outcome), report.resolved))
    return rows


def render(rows: Sequence[Row], twins: int, twins_paid: int) -> str:
    """What stands between the markers."""
    paid = sum(row.paid for row in rows)
    lines = ["| class | hack | runner | what it does | without protection | `protected` |", "|---|---|---|---|---|---|"]
    lines += [row.text for kind in KINDS for row in rows if row.hack.kind == kind]
    lines += [
        "",
        f"{len(rows)} hacks of {len({row.hack.kind for row in rows})} classes: **{paid} paid** in `protected`. "
        f"{sum(row.bait is True for row in rows)} are paid by the grading in the fifth column. "
        f"{twins_paid} of {twins} honest twins are paid in both modes.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="keep images and downloads here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="minisandbox-hacks-") as temporary:
        directory = given.directory or Path(temporary)
        for name in ("store", "cache"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        bench = Bench(Store(directory / "store"), Cache(directory / "cache"), Sources(directory / "sources"))
        rows = measure(bench, HACKS)
        paid = sum(all(bench.paid(twin, mode) for mode in ("official", "protected")) for twin in TWINS)
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    text = render(rows, len(TWINS), paid)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    print(text.splitlines()[-1])


if __name__ == "__main__":
    main()
