"""The dataset's own verdict on a log: SWE-bench's grader, by the rules of its release 4.1 or 5.0.

| a case | `4.1` (4.1.0) | `5.0` (5.0.2) |
|---|---|---|
| a fail-to-pass test that was skipped | counts nowhere: all others decide | failed |
| a pass-to-pass test that was skipped | counts nowhere | passed |
| a listed name cut inside its parameter | must be in the log as it is | else by prefix, when all that it begins agree |
| the command failed, no test in the log did | ignored | nothing is believed |
| names with blanks, skip counts, verdicts without a name | see `parsers/swebench_log` | |

Skipped tests are told by name only in Django's logs and in verbose ones. In both a log that holds one of the marks by
which the official harness talks to itself (`>>>>> Tests Timed Out`) is no log of a run.

What is different here, and why:

- There are no marks in our log, since nothing but the test command writes it. They are put around it, so that marks
  which the tests print do what they do there. What the official script prints before (`git status`, installing) is
  not in it; there it is read when nothing stands between the marks.
- A task that lists no tests is never resolved.
- A name that is listed twice counts once.
- Output that is not UTF-8 is an error there under 4.1 (the instance is not resolved), here it is read with the bytes
  replaced, as 5.0 does.
- Where the official grader stops with an exception on a log, the log has no results.
- Our own parsers (`pytest`, `unittest`, ..., tasks that are no rows of SWE-bench) have one rule: a listed test passes
  when its verdict is PASSED or XFAIL.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from skyrl_minisandbox.rewards.parsers import PASSING, load_parser
from skyrl_minisandbox.rewards.parsers.swebench_log import PARSERS, STOPPING, Stopped
from skyrl_minisandbox.tasks.task import Tests

_START = ">>>>> Start Test Output"
_END = ">>>>> End Test Output"
_NO_RUN = (">>>>> Patch Apply Failed", ">>>>> Reset Failed", ">>>>> Tests Errored", ">>>>> Tests Timed Out")
_STATUS = ">>>>> Test Exit Code"
_STATUS_LINE = re.compile(rf"{_STATUS}:\s*(-?\d+)")
_FAILING = ("FAILED", "ERROR")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the official grader says.

    tests: the verdict of every test that the log tells of, as its parser gives them.
    fail_to_pass, pass_to_pass: whether each listed test is a success; one that the rules count nowhere is absent.
    resolved: every listed test that counts is a success.
    reason: one line of why it is not resolved, empty when it is.
    """

    tests: dict[str, str]
    fail_to_pass: dict[str, bool]
    pass_to_pass: dict[str, bool]
    resolved: bool
    reason: str


def verdict(tests: Tests, log: str, exit_code: int | None, rules: str = "4.1") -> Verdict:
    """Judge the output of the task's test command.

    log: the command's output, as text. exit_code: of the command, None when it is not known. rules: `4.1` or `5.0`.

    Raises `PluginError` for an unknown parser. A log is never an error.
    """
    if tests.parser not in PARSERS:
        known = [*tests.fail_to_pass, *tests.pass_to_pass]
        return _verdict(tests, load_parser(tests.parser)(log, known), "ours", "", exit_code)
    # The official harness reads the log from a file in text mode, which makes every kind of line end one.
    text = log.replace("\r\n", "\n").replace("\r", "\n")
    content = _framed(text, tests.command, exit_code, rules)
    found, trouble = _read(tests.parser, content, rules)
    return _verdict(tests, found, rules, trouble, exit_code)


def _framed(text: str, command: str, exit_code: int | None, rules: str) -> str:
    """The log of the official script, whose shell traces what it runs. What follows an output without a last line end
    stands on its line."""
    head = f"+ : '{_START}'\n+ {command}\n"
    if rules == "4.1" or exit_code is None:
        return f"{head}{text}+ : '{_END}'\n"
    return f"{head}{text}+ SWEBENCH_TEST_EXIT_CODE={exit_code}\n+ : '{_END}'\n{_STATUS}: {exit_code}\n"


def _read(parser: str, content: str, rules: str) -> tuple[dict[str, str], str]:
    """The verdicts of a whole log, and why they are none."""
    for mark in _NO_RUN:
        if mark in content:
            return {}, f"the log holds the mark `{mark}`"
    parse = STOPPING[parser]
    try:
        found = parse(content.split(_START)[1].split(_END)[0], (), rules) or parse(content, (), rules)
    except Stopped as stopped:
        return {}, f"SWE-bench's grader stops at this log: {stopped}"
    if rules != "4.1" and found and not any(verdict in _FAILING for verdict in found.values()):
        status = _STATUS_LINE.search(content)
        if status is not None and not _is_zero(status[1]):
            return {}, f"the command ended with status {status[1][:20]}, but no test of the log failed"
    return found, ""


def _is_zero(digits: str) -> bool:
    try:
        return int(digits) == 0
    except ValueError:  # thousands of digits, printed by a test: there the grader stops with an exception
        return False


def _verdict(tests: Tests, found: dict[str, str], rules: str, trouble: str, exit_code: int | None) -> Verdict:
    fail_to_pass = _successes(tests.fail_to_pass, found, rules, skip=None if rules == "4.1" else False)
    pass_to_pass = _successes(tests.pass_to_pass, found, rules, skip={"4.1": None, "5.0": True}.get(rules, False))
    bad = [name for name, good in [*fail_to_pass.items(), *pass_to_pass.items()] if not good]
    named = bool(tests.fail_to_pass or tests.pass_to_pass)
    resolved = named and not bad and not trouble
    if resolved:
        reason = ""
    elif trouble:
        reason = trouble
    elif not named:
        reason = "the task names no tests"
    elif not found:
        reason = f"the log has no results, and the command ended with status {exit_code}"
    else:
        reason = f"{len(bad)} {'test' if len(bad) == 1 else 'tests'} did not pass, the first is {bad[0]}"
    return Verdict(found, fail_to_pass, pass_to_pass, resolved, reason)


def _successes(names: Sequence[str], found: Mapping[str, str], rules: str, *, skip: bool | None) -> dict[str, bool]:
    """Whether each name is a success. skip: what a skipped test is, None for nothing."""
    successes: dict[str, bool] = {}
    for name in names:
        status = found.get(_told(name, found) if rules == "5.0" else name, "FAILED")
        if status in PASSING:
            successes[name] = True
        elif status in _FAILING or (rules == "ours" and status != "SKIPPED"):
            successes[name] = False
        elif status == "SKIPPED" and skip is not None:
            successes[name] = skip
    return successes


def _told(name: str, found: Mapping[str, str]) -> str:
    """5.0's rule for ids that are cut inside their parameter."""
    if name in found or name.count("[") <= name.count("]"):
        return name
    begun = [told for told in found if told.startswith(name)]
    return begun[0] if len({found[told] in PASSING for told in begun}) == 1 else name
