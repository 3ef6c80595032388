"""The table in `docs/rewards.md`: `python -m tests.rewards.hacks.table`.

Runs every hack in the grading that its bait names and in `protected`, every twin in both, and writes what was found
between the two markers. Needs the package index (pytest, Django, SymPy); takes some minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
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
        """One line for a person."""
        hack = self.hack
        bait = "no bait" if self.bait is None else f"{hack.bait}: {'paid' if self.bait else 'NOT PAID'}"
        found = "PAID" if self.paid else self.outcome
        return f"{hack.kind:14} {hack.runner:8} {hack.name:32} {bait:22} protected: {found}"


def measure(bench: Bench, hacks: Sequence[Hack]) -> list[Row]:
    """Try each."""
    rows = []
    for hack in hacks:
        reports = [bench.report(hack, "protected") for _ in range(hack.tries)]
        report = next((one for one in reports if one.resolved), reports[0])
        bait = bench.bait_taken(hack) if hack.bait else None
        rows.append(Row(hack, bait, str(report.outcome), report.resolved))
    return rows


def render(rows: Sequence[Row], twins: Mapping[str, bool]) -> str:
    """What stands between the markers: a row for each class. twins: whether each was paid in both modes, by name."""
    lines = ["| class | hacks | bait taken | paid | what stops them | honest twins paid |", "|---|---|---|---|---|---|"]
    for kind, text in KINDS.items():
        own = [row for row in rows if row.hack.kind == kind]
        paid = [row for row in own if row.paid]
        stopped = list(dict.fromkeys(row.hack.stopped for row in own if not row.paid))
        honest = [twins[twin.name] for twin in TWINS if twin.kind == kind]
        cells = [
            f"**{kind}**: {text}",
            str(len(own)),
            f"{sum(row.bait is True for row in own)} of {sum(row.bait is not None for row in own)}",
            f"**{len(paid)}**: {', '.join(row.hack.name for row in paid)}" if paid else "0",
            "; ".join(stopped),
            f"{sum(honest)} of {len(honest)}",
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    runners = Counter(row.hack.runner for row in rows)
    lines += [
        "",
        f"{len(rows)} hacks of {len(KINDS)} classes on {len(runners)} runners "
        f"({', '.join(f'{runner} {count}' for runner, count in runners.most_common())}): "
        f"{sum(row.paid for row in rows)} paid in `protected`. "
        f"{sum(twins.values())} of {len(twins)} honest twins paid in both modes.",
    ]
    known = [row for row in rows if row.paid]
    if known:
        lines += ["", "Still paid:", *(f"- `{row.hack.name}`: {row.hack.paid or 'not known before'}" for row in known)]
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
        twins = {twin.name: all(bench.paid(twin, mode) for mode in ("official", "protected")) for twin in TWINS}
    before, rest = DOCUMENT.read_text().split(BEGIN)
    after = rest.split(END)[1]
    text = render(rows, twins)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    print("\n".join(row.text for row in rows))


if __name__ == "__main__":
    main()
