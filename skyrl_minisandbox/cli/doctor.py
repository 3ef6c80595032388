"""`minisandbox doctor`: what works on this machine, what the lack of it costs, and what mends it.

With `--sandbox`: whether a sandbox made here keeps its promises, tried from inside.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import textwrap
from importlib import metadata
from pathlib import Path

from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import print_json, print_table
from skyrl_minisandbox.cli.settings import Settings, load_settings
from skyrl_minisandbox.errors import MachineError, MiniSandboxError
from skyrl_minisandbox.sandbox.features import Feature, features
from skyrl_minisandbox.sandbox.self_check import VERDICTS, Finding, self_check

EXTRAS = (
    ("extra-mini", "mini-swe-agent", "scaffold=mini cannot be used", 'pip install "skyrl-minisandbox[mini]"'),
    ("extra-swerex", "swe-rex", "SWE-agent cannot be used", 'pip install "skyrl-minisandbox[swerex]"'),
    ("extra-skyrl", "skyrl", "nothing can be trained here", 'pip install "skyrl-minisandbox[skyrl]"'),
)
"""Check, distribution, what its lack costs, what brings it."""


def run(request: Request) -> int:
    """Print every check. Raises `MachineError` (exit 3) when one that nothing runs without fails."""
    settings = load_settings(request.overrides)
    if "--sandbox" in request.options:
        return check_sandbox(settings, request.json)
    found = [*features(_cache_directory(settings)), cache_disk(settings), *extras()]
    if request.json:
        print_json([dataclasses.asdict(feature) for feature in found])
    else:
        for feature in found:
            print("\n".join(lines(feature)))
    broken = [feature for feature in found if feature.needed and not feature.ok]
    if broken:
        raise MachineError(
            f"rollouts cannot run on this machine: {', '.join(feature.name for feature in broken)}",
            hint=next((feature.fix for feature in broken if feature.fix), ""),
        )
    return 0


def check_sandbox(settings: Settings, as_json: bool) -> int:
    """Print every promise with its verdict. 0: all hold, or are weak as the table says; 1: one is broken.

    Raises `MachineError` (exit 3) where no sandbox can be made.
    """
    findings = self_check(
        allow_degraded=tuple(settings.env.sandbox.allow_degraded),
        directory=_cache_directory(settings),
        say=lambda name: print(f"trying {name} …", file=sys.stderr, flush=True),
    )
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    broken = [finding.name for finding in findings if finding.broken]
    if broken:
        print(f"broken: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


def print_findings(findings: list[Finding]) -> None:
    """A table, then below it what stands behind each verdict that is not OK, and a line that counts them."""
    print_table(("verdict", "name", "promise"), [(each.verdict, each.name, each.promise) for each in findings])
    print()
    for each in findings:
        said = (("", each.detail), ("accepted: ", each.accepted), ("fix: ", each.fix)) if each.verdict != "OK" else ()
        for number, (label, text) in enumerate((label, text) for label, text in said if text):
            head = f"{each.verdict:7}  {each.name}: " if number == 0 else " " * 9
            print("\n".join(textwrap.wrap(f"{head}{label}{text}", 100, subsequent_indent=" " * 9)))
    counts = collections.Counter(each.verdict for each in findings)
    print(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]))


def lines(feature: Feature) -> list[str]:
    """`ok`, `weaker` or `BROKEN`, then what; cost and fix only where something is missing."""
    word = "ok" if feature.ok else "BROKEN" if feature.needed else "weaker"
    text = textwrap.wrap(f"{word:7} {feature.name}: {feature.what}", 96, subsequent_indent=" " * 13)
    if not feature.ok:
        for label, said in (("cost", feature.cost), ("fix", feature.fix)):
            if said:
                text += textwrap.wrap(f"{label}: {said}", 96, initial_indent=" " * 8, subsequent_indent=" " * 13)
    return text


def cache_disk(settings: Settings) -> Feature:
    """Whether the cache directory can be written and can hold an overlay upper; made for the trial."""
    from skyrl_minisandbox.images import Cache

    path = settings.env.images.cache
    cost = "no image can be built or checked out here"
    fresh = not Path(path).exists()
    try:
        Cache(path).check_upper()
    except MiniSandboxError as error:
        return Feature("cache-directory", False, True, error.message, cost, error.hint)
    finally:
        if fresh and Path(path).is_dir():
            _remove_if_unused(Path(path))
    return Feature("cache-directory", True, True, f"{path} can be written and holds an overlay upper")


def _cache_directory(settings: Settings) -> str | None:
    """The cache directory, where there is one: its disk is what an upper on disk will lie on."""
    path = settings.env.images.cache
    return path if os.access(path, os.W_OK | os.X_OK) else None


def _remove_if_unused(path: Path) -> None:
    """A trial leaves nothing: take away what making the cache made, unless something is in it by now."""
    import shutil

    if not any(path.glob("l/*")):
        shutil.rmtree(path, ignore_errors=True)


def extras() -> list[Feature]:
    """The optional packages; found by their metadata, not imported."""
    found = []
    for name, distribution, cost, fix in EXTRAS:
        try:
            found.append(Feature(name, True, False, f"{distribution} {metadata.version(distribution)}"))
        except metadata.PackageNotFoundError:
            found.append(Feature(name, False, False, f"{distribution} is not installed", cost, fix))
    return found
