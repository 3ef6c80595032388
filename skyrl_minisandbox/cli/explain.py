"""`minisandbox explain ROLLOUT`: why its outcome is what it is, from what its run directory keeps of the grading."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from skyrl_minisandbox.cli.log_lines import relevant_lines
from skyrl_minisandbox.cli.main import Request
from skyrl_minisandbox.cli.output import format_table, print_json, seconds
from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.errors import InputError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import TestReport

WHY = {
    Outcome.RESOLVED: "every test that had to be mended passes, and every other one still does",
    Outcome.UNRESOLVED: "not every test of the task passes",
    Outcome.EMPTY_PATCH: "nothing was submitted",
    Outcome.PATCH_FAILED: "the patch does not apply to the task's own tree",
    Outcome.TESTS_TIMEOUT: "the tests did not end in time; those that had ended are below",
    Outcome.TAMPERED: "the patch interfered with its own grading, so no result of it is believed",
    Outcome.AGENT_LIMIT: "the agent was ended at a limit and left nothing that could be graded",
    Outcome.AGENT_ERROR: "the agent ended itself or its sandbox and left nothing that could be graded",
    Outcome.INFRA_ERROR: "the fault is ours and not the agent's: it has no reward, and is masked in training",
}
"""What each outcome means."""

LINES = 20  # of the log
_MISSING = "-"
"""Stands for the verdict of a test that was not reported."""


def run(request: Request) -> int:
    """Print the explanation; always 0, as it says what is, not whether it is good."""
    if not request.argument:
        raise InputError("which rollout?", hint="minisandbox explain ROLLOUT out=DIR; or the path of a grades/ID.json")
    path = find(request.argument, load_settings(request.overrides).env.out)
    data = read(path)
    if request.json:
        print_json(data)
    else:
        print("\n".join(explanation(data, path, every="--all" in request.options)))
    return 0


def find(argument: str, out: str) -> Path:
    """The `grades/ID.json` that is meant. out: the run directory, the newest below `runs/` when empty.

    Raises `InputError` for none, or several, with their names.
    """
    given = Path(argument)
    if given.is_file():
        return given
    directory = Path(out) if out else _newest_run()
    folder = directory / "grades"
    exact = folder / f"{argument}.json"
    if exact.is_file():
        return exact
    names = sorted(path.stem for path in folder.glob("*.json"))
    found = [name for name in names if name.startswith(argument)]
    # `sqlparse-0.5.1` must not mean `sqlparse-0.5.10`, where the task itself has a rollout.
    found = [name for name in found if name[len(argument) :][:1] in (".", "+")] or found
    if len(found) == 1:
        return folder / f"{found[0]}.json"
    some = ", ".join((found or names)[:5]) or "nothing"
    if found:
        raise InputError(f"`{argument}` may be {len(found)} rollouts of {directory}", hint=f"one of {some}")
    raise InputError(f"{directory} has no rollout `{argument}`", hint=f"out=DIR; grades/ there has {some}")


def _newest_run() -> Path:
    runs = sorted(path for path in (Path.cwd() / "runs").glob("*") if (path / "grades").is_dir())
    if not runs:
        raise InputError(f"no run directory below {Path.cwd() / 'runs'}", hint="minisandbox explain ROLLOUT out=DIR")
    return runs[-1]


def read(path: Path) -> dict[str, Any]:
    """What a `grades/ID.json` holds. Raises `InputError` for another file."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or "outcome" not in data or "report" not in data:
        raise InputError(f"{path} is no grade of a rollout", hint="they are in the `grades` of a run directory")
    return data


def explanation(data: dict[str, Any], path: Path, *, every: bool = False) -> Iterator[str]:
    """The lines. data: as `read` gives it. every: also the tests that pass before and after.

    Raises `InputError` when another version of this package wrote it.
    """
    try:
        outcome = Outcome(data["outcome"])
        report = None if data["report"] is None else TestReport.from_json(data["report"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} was written by another version of minisandbox: {error}") from error
    reward = "no reward" if data.get("reward") is None else f"reward {data['reward']:g}"
    yield f"{data.get('rollout_id', path.stem)}: {outcome}, {reward}"
    yield ""
    yield from _said("why", WHY[outcome])
    yield from _said("", data.get("error") or (report.error if report else ""))
    if "ended_by" in data:
        node = f" on node {data['node']}" if data.get("node") else ""
        yield from _said("rollout", f"ended by {data['ended_by']} after {data.get('turns', 0)} turns{node}")
    if report is not None:
        yield from _graded(report)
        yield ""
        yield from _tests(report, every)
        yield from _log(report)
    trajectory = path.parent.parent / "trajectories" / path.name
    if trajectory.is_file():
        yield f"what the agent did: {trajectory}"


def _graded(report: TestReport) -> Iterator[str]:
    yield from _said("grading", f"{report.grading}, {seconds(report.seconds)} s")
    if report.command:
        ended = "" if report.exit_code is None else f"ended with status {report.exit_code}"
        yield from _said("tests", report.command)
        yield from _said("", ended)
    if report.sandbox_died:
        yield from _said("", "the sandbox died under the tests")
    if report.canaries:
        wrong = [canary for canary in report.canaries if not canary.right]
        all_right = f"all {len(report.canaries)} came out as they must"
        yield from _said("canaries", all_right if not wrong else f"{len(wrong)} of {len(report.canaries)} are wrong")
        for canary in wrong:
            yield from _said("", f"{canary.name} must {canary.must}: {canary.verdict or 'nothing was told of it'}")
    for name, verdicts in report.retries.items():
        yield from _said("run again", f"{name}: {', then '.join(verdict or _MISSING for verdict in verdicts)}")
    for title, items in (("put back", report.restored), ("dropped", report.dropped), ("note", report.notes)):
        for number, item in enumerate(items):
            yield from _said(title if number == 0 else "", item)


def _said(title: str, text: str) -> Iterator[str]:
    """`title      text`, wrapped; nothing for no text."""
    if text:
        first, later = f"{title:10} ", " " * 11
        for number, line in enumerate(text.splitlines()):
            head = first if number == 0 else later
            yield from textwrap.wrap(line, 120, initial_indent=head, subsequent_indent=later, break_long_words=False)


def _tests(report: TestReport, every: bool) -> Iterator[str]:
    """Each test before and after: what it did without a patch, by the task's lists, and what it does with this one."""
    mended = [[name, "fails", _verdict(report, name), _word(good)] for name, good in report.fail_to_pass.items()]
    kept = [[name, "passes", _verdict(report, name), _word(good)] for name, good in report.pass_to_pass.items()]
    shown = [row for row, good in zip(kept, report.pass_to_pass.values(), strict=True) if every or not good]
    if mended or shown:
        yield from format_table(["test", "before", "after", ""], mended + shown).splitlines()
    if len(kept) > len(shown):
        yield f"and {len(kept) - len(shown)} that pass before and after"
    if mended or kept:
        good = sum(report.fail_to_pass.values())
        yield f"mended {good} of {len(mended)}, still passing {sum(report.pass_to_pass.values())} of {len(kept)}"
        yield ""


def _verdict(report: TestReport, name: str) -> str:
    """What was reported; a name that the dataset cut off counts by those that begin with it."""
    good = {**report.fail_to_pass, **report.pass_to_pass}.get(name)
    return report.tests.get(name) or ("PASSED" if good else "not reported")


def _word(good: bool) -> str:
    return "" if good else "NOT PASSED"


def _log(report: TestReport) -> Iterator[str]:
    lines: Sequence[str] = relevant_lines(report.log, report.failed, LINES)
    if report.resolved or not lines:
        return
    yield f"from the log, {len(lines)} of {len(report.log.splitlines())} lines:"
    yield from (f"  | {line}" for line in lines)
    yield ""
