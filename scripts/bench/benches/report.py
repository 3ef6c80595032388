"""Rows of a benchmark with their bars: `{measure, ours, unit, peers, ratio, bar, holds}`, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bar:
    """One condition. peer: "" for an absolute value, else the limit is a multiple of that peer's value."""

    limit: float
    peer: str = ""
    at_least: bool = False

    def text(self, unit: str) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.limit:g}x {self.peer}" if self.peer else f"{sign} {self.limit:g} {unit}".rstrip()

    def holds(self, row: Row) -> bool | None:
        """None when one of the two values is not there."""
        value = row.ratio.get(self.peer) if self.peer else row.ours
        if value is None:
            return None
        return value >= self.limit if self.at_least else value <= self.limit


@dataclasses.dataclass
class Row:
    """ratio is ours / peer's: below 1 is better for times and sizes, above 1 for rates."""

    measure: str
    unit: str
    ours: float | None = None
    peers: dict[str, float] = dataclasses.field(default_factory=dict)
    bars: tuple[Bar, ...] = ()

    @property
    def ratio(self) -> dict[str, float]:
        if self.ours is None:
            return {}
        return {name: self.ours / value for name, value in self.peers.items() if value > 0}

    @property
    def bar(self) -> str:
        return ", ".join(bar.text(self.unit) for bar in self.bars)

    @property
    def holds(self) -> bool | None:
        """False when a condition is missed; None when none is missed but one could not be judged, or there is none."""
        verdicts = [bar.holds(self) for bar in self.bars]
        if False in verdicts:
            return False
        return None if None in verdicts or not verdicts else True

    def data(self) -> dict[str, Any]:
        return {
            "measure": self.measure, "ours": _round(self.ours), "unit": self.unit,
            "peers": {name: _round(value) for name, value in self.peers.items()},
            "ratio": {name: _round(value) for name, value in self.ratio.items()},
            "bar": self.bar, "holds": self.holds,
        }


BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"


def put_figures(path: Path, figures: str) -> None:
    """Replace what stands between the two marks of a page. Raises `ValueError` when they are not there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no line {BEGIN.strip()} with a line {END.strip()} below it")
    path.write_text(f"{before}{BEGIN}{figures}{END}{after}")


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


@dataclasses.dataclass
class Report:
    """absent: contender -> why it is not in the table. not_run: row -> why."""

    benchmark: str
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    absent: dict[str, str] = dataclasses.field(default_factory=dict)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts = {
            "kernel": platform.release(), "machine": platform.machine(), "cpus": len(os.sched_getaffinity(0)),
            "python": platform.python_version(), "load_before": round(os.getloadavg()[0], 2),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **self.facts,
        }

    def data(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark, "header": {**self.facts, "versions": self.versions}, "absent": self.absent,
            "not_run": self.not_run, "notes": self.notes, "rows": [row.data() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.data(), indent=1, ensure_ascii=False) + "\n")

    def markdown(self) -> str:
        """A table with a column for each peer: its value, and in brackets ours divided by it."""
        peers = list(dict.fromkeys(name for row in self.rows for name in row.peers))
        lines = [
            ", ".join(f"{key} {value}" for key, value in self.facts.items()) + ".",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in self.versions.items()) + ".", "",
            "| " + " | ".join(["measure, p50", "unit", "ours", "bar", "holds", *peers]) + " |",
            "|" + "---|" * (5 + len(peers)),
        ]
        for row in self.rows:
            cells = [
                row.measure.strip(), row.unit, "not run" if row.ours is None else f"{row.ours:.3g}", row.bar,
                {True: "yes", False: "**no**", None: "not judged" if row.bar else ""}[row.holds],
            ]
            for name in peers:
                ratio = f" ({row.ratio[name]:.2g}x)" if name in row.ratio else ""
                cells.append(f"{row.peers[name]:.3g}{ratio}" if name in row.peers else "")
            lines.append("| " + " | ".join(cells) + " |")
        for title, told in (("Absent", self.absent), ("Not run", self.not_run)):
            if told:
                lines += ["", f"{title}: " + "; ".join(f"{name} ({why})" for name, why in told.items()) + "."]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines) + "\n"

    def text(self) -> str:
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [f"{self.benchmark}: {facts}", f"versions: {versions}", ""]
        for row in self.rows:
            verdict = {True: "holds", False: "MISSED", None: "not judged"}[row.holds]
            ours = "not run" if row.ours is None else f"{row.ours:.4g} {row.unit}"
            bar = f"{row.bar}: {verdict}" if row.bar else ""
            lines.append(f"{row.measure:<56} {ours:>14}   {bar}".rstrip())
            shown = [f"{name} {value:.4g}" + (f" ({row.ratio[name]:.2f}x)" if name in row.ratio else "")
                     for name, value in row.peers.items()]
            if shown:
                lines.append("    " + "   ".join(shown))
        for title, told in (("absent", self.absent), ("not run", self.not_run)):
            if told:
                lines.append("")
                lines += [f"{title}: {name}: {why}" for name, why in told.items()]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(lines) + "\n"
