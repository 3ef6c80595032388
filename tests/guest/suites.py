"""tests/sandbox and tests/security, for each way a machine may be set up in a guest of its own, and what came of it."""

from __future__ import annotations

import collections
import os
import re
import shutil
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.guest.image import root_disk, suite_of
from tests.guest.machine import Console, Outcome, Run, boot

# (name, who, place, what must not be skipped for lack of)
_WAYS = (
    ("root", "root", "session", "root,userns,rootless,overlay,cgroup,hypothesis,git"),
    ("user-delegated", "guest", "leaf", "userns,overlay,cgroup,hypothesis,git"),
    ("user", "guest", "session", "userns,overlay,hypothesis,git"),
    ("root-without-cgroup", "root", "none", "root,userns,rootless,overlay,hypothesis,git"),
)
_EACH = 60 * 60.0  # seconds, of a run
_BESIDE = 10 * 60.0  # booting, and halting


def run(kernel: str, arguments: Sequence[str], out: Path, accelerators: Sequence[str] = (), at_once: int = 0) -> int:
    """Boot a guest for every way, print a summary; 0 when each ran and passed.

    at_once: guests; 0: as many as this machine has processors, as a guest mostly keeps one busy.
    arguments: of pytest. Without a file or directory among them, the two directories; without a tier, the fast one.
    """
    chosen = tuple(arguments)
    if not any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        chosen += ("tests/sandbox", "tests/security")
    if not any(argument.startswith("--tier") for argument in arguments):
        chosen = ("--tier=fast", *chosen)
    runs = []
    for name, who, place, must in _WAYS:
        # tests/sandbox/test_as_a_user.py is the run `user` here.
        script = (
            'python3 -m tests.orphans "$(python3 -c "from tests.support import seconds; print(seconds(10))")" '
            'python3 -m pytest -v -p no:cacheprovider -o faulthandler_timeout=900 --junitxml="$OUT/junit.xml" '
            '--ignore=tests/sandbox/test_as_a_user.py "$@" 2>&1 | tee "$OUT/log"; exit "${PIPESTATUS[0]}"'
        )
        argv = ("bash", "-c", script, "pytest", *chosen)
        runs.append(Run(name, who, place, argv, _EACH, (("MINISANDBOX_MUST_RUN", must), ("PYTHONUNBUFFERED", "1"))))
    started = time.monotonic()
    for run in runs:  # what an earlier guest left is no result of this one
        shutil.rmtree(out / run.name, ignore_errors=True)
    root_disk(suite_of(kernel))  # made once
    enough = threading.Event()
    with ThreadPoolExecutor(at_once or len(os.sched_getaffinity(0))) as pool:
        guests = {
            run.name: pool.submit(
                boot, kernel, [run], _EACH + _BESIDE, out / run.name, accelerators, Console(run.name), enough
            )
            for run in runs
        }
        try:
            outcomes = {name: guest.result() for name, guest in guests.items()}
        except BaseException:  # Ctrl-C: the guests end with us
            enough.set()
            pool.shutdown(cancel_futures=True)
            raise
    failed = [name for name, outcome in outcomes.items() if report(outcome, [name])]
    print(f"guest: {time.monotonic() - started:.0f} s in all; logs and JUnit files: {out}")
    return 1 if failed else 0


def report(outcome: Outcome, names: Sequence[str]) -> list[str]:
    """Print a summary of each run; the names of those that failed, did not happen, or held no test."""
    print(f"\n=== Linux {outcome.results.get('kernel', '(the guest said nothing)')}, "
          f"Python {outcome.results.get('python', '?')}")
    listed = outcome.results.get("runs")
    done = {str(run["name"]): run for run in listed} if isinstance(listed, list) else {}
    failed = []
    for name in names:
        if name not in done:
            failed.append(name)
            print(f"{name}: DID NOT RUN")
            continue
        run = done[name]
        counts, skips, broken = _junit(outcome.directory / name / "junit.xml") or _log(outcome.directory / name / "log")
        good = run["ended"] and run["exit"] == 0 and counts["passed"] > 0
        if not good:
            failed.append(name)
        state = "ok" if good else "FAILED" if run["ended"] else "OVER TIME"
        print(f"{name} ({run['who']}, cgroup: {run['place']}): {state}: {counts['passed']} passed, "
              f"{counts['failed']} failed, {counts['skipped']} skipped in {run['seconds']:.0f} s")
        for test in broken:
            print(f"    failed: {test}")
        for reason, count in sorted(skips.items()):
            print(f"    skipped {count}: {reason}")
    return failed


_Results = tuple[dict[str, int], collections.Counter[str], list[str]]
_LINE = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)


def _log(path: Path) -> _Results:
    """From the log of a run that was ended before pytest wrote its file."""
    text = path.read_text(errors="replace") if path.exists() else ""
    lines = _LINE.findall(text)
    broken = [name for name, word in lines if word in ("FAILED", "ERROR")]
    words = collections.Counter(word for _, word in lines)
    counts = {"passed": words["PASSED"], "failed": len(broken), "skipped": words["SKIPPED"]}
    return counts, collections.Counter(), broken


def _junit(path: Path) -> _Results | None:
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    skips: collections.Counter[str] = collections.Counter()
    broken = []
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    for case in cases:
        skipped = case.find("skipped")
        if skipped is not None:
            counts["skipped"] += 1
            skips[skipped.get("message", "")] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            broken.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            counts["passed"] += 1
    return counts, skips, broken
