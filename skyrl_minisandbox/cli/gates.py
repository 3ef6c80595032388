"""The gates that one task must pass, and what else is worth knowing of it, by running its tests."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from skyrl_minisandbox.cli.log_lines import relevant_lines
from skyrl_minisandbox.cli.shuffle import other_order
from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.errors import MiniSandboxError, TaskError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import TestReport, grade
from skyrl_minisandbox.sandbox import Sandbox
from skyrl_minisandbox.tasks import Task
from skyrl_minisandbox.tasks.validation import GATES, Failure, Validation, drop

ROUNDS = 3
"""How often flaky tests are dropped and the rest is judged anew, before the task itself counts as flaky."""

# What HEAD and the index do not lead to, whatever else does (refs, reflogs, nothing), then remotes and tags.
FUTURE = r"""
set -o pipefail
export LC_ALL=C
command -v git >/dev/null || { test ! -e .git && exit 0; echo 'no git to look with'; exit 3; }
test -e .git || exit 0
git() { command git -c safe.directory='*' -c core.fsmonitor=false "$@"; }
git cat-file --batch-all-objects --batch-check='%(objectname) %(objecttype)' | sort >/tmp/.all &&
    git rev-list --objects --indexed-objects HEAD | cut -d ' ' -f 1 | sort >/tmp/.past &&
    join -v 1 /tmp/.all /tmp/.past >/tmp/.beyond || exit 3
for commit in $(sed -n 's/ commit$//p' /tmp/.beyond | head -n 20); do
    git log -1 --format='commit %H %cs %s' "$commit" --
done
git remote | sed 's/^/remote /'
git tag | head -n 20 | sed 's/^/tag /'
sed -nE 's/^([0-9a-f]+) (blob|tree)$/\2 \1/p' /tmp/.beyond | head -n 20
"""


@dataclasses.dataclass
class Bench:
    """What judging one task needs.

    open_sandbox, open_networked: fresh sandboxes of its image, without and with the host's network.
    grading: how the gates are judged. reports: look at more than the gates.
    say: told what goes on. gate: told each gate as it is decided.
    """

    open_sandbox: Callable[[], Sandbox]
    open_networked: Callable[[], Sandbox]
    grading: GradingConfig
    reports: bool = True
    say: Callable[[str], None] = lambda text: None
    gate: Callable[[str, bool], None] = lambda name, passed: None


def judge(task: Task, image_digest: str, bench: Bench) -> Validation:
    """Judge one task. Nothing that its tests do is an exception, and nothing that keeps them from running either."""
    started = time.monotonic()
    judging = _Judging(task, bench)
    try:
        judging.run()
    except TaskError as error:  # its hidden tests do not go into its image: nothing of ours, and no patch helps
        judging.fail("gold_fails", error.message)
    except MiniSandboxError as error:
        judging.fail("not_judged", error.message, error.hint.splitlines())
    known = judging.known
    return Validation(
        task_id=task.id,
        task_digest=task.digest(),
        image_digest=image_digest,
        grading=dataclasses.asdict(bench.grading),
        reported=bench.reports,
        valid=not known.get("failure") and all(known.get(gate) for gate in GATES),
        total_seconds=round(time.monotonic() - started, 3),
        **known,
    )


class _Judging:
    """One task while it is judged. known: fields of its `Validation`, as they become known."""

    def __init__(self, task: Task, bench: Bench) -> None:
        self.task = task  # without the flaky tests found so far
        self.bench = bench
        self.known: dict[str, Any] = {"runs": 0}
        self._reports: dict[str, list[TestReport]] = {"empty": [], "gold": []}

    def run(self) -> None:
        if self._steady():
            self._look_at_outcomes()
        self._look_for_the_future()
        if self.bench.reports and self.known.get("failure") not in ("timeout", "flaky"):
            self._report()

    def fail(self, failure: Failure, error: str, log: Iterable[str] = ()) -> None:
        """Keep the first failure: those after it may be its doing."""
        if not self.known.get("failure"):
            self.known |= {"failure": failure, "error": error, "log": tuple(log)}

    def _gate(self, name: str, passed: bool) -> None:
        self.known[name] = passed
        self.bench.gate(name, passed)

    # -- the gates --------------------------------------------------------------------------------

    def _steady(self) -> bool:
        """Run empty and gold until their verdicts repeat; flaky tests go. False: there is nothing to judge by."""
        for number in range(ROUNDS):
            for patch in ("empty", "gold", "gold", "empty") if number == 0 else ("empty", "gold"):
                if patch == "empty" and self._hangs_unpatched():
                    continue  # that is a way to fail, and once is enough to wait for it
                report = self._grade(patch)
                self._reports[patch].append(report)
                if patch == "gold" and report.outcome is Outcome.TESTS_TIMEOUT:
                    self._gate("gold_passes", False)
                    self.fail("timeout", f"the gold patch: {report.error}", relevant_lines(report.log, report.failed))
                    return False
            flaky = self._unsteady()
            if not flaky:
                return self._outcomes_repeat()
            self.known["flaky"] = (*self.known.get("flaky", ()), *flaky)
            shorter = drop(self.task, flaky)
            if not shorter.tests.fail_to_pass:
                self._flaky("every fail-to-pass test comes out now so, now so", flaky)
                return False
            self.task = shorter
        self._flaky(f"tests still come out now so, now so after {len(self.known['flaky'])} were dropped", flaky)
        return False

    def _hangs_unpatched(self) -> bool:
        return any(report.outcome is Outcome.TESTS_TIMEOUT for report in self._reports["empty"])

    def _unsteady(self) -> list[str]:
        """Tests of the lists that two runs of the same patch, or a run and its retries, tell apart."""
        found: dict[str, None] = {}
        for reports in self._reports.values():
            told = [report for report in reports if report.outcome in (Outcome.RESOLVED, Outcome.UNRESOLVED)]
            for name in (*self.task.tests.fail_to_pass, *self.task.tests.pass_to_pass):
                verdicts = {_passed(report)[name] for report in told if name in _passed(report)}
                again = {verdict for report in told for verdict in report.retries.get(name, ()) if verdict}
                if len(verdicts) > 1 or len(again) > 1:
                    found.setdefault(name)
        return list(found)

    def _outcomes_repeat(self) -> bool:
        """Whether runs end alike for other reasons too: a sandbox that dies, a canary that is wrong."""
        for patch, reports in self._reports.items():
            odd = {str(report.outcome): report for report in reports}
            odd = {word: report for word, report in odd.items() if word not in ("resolved", "unresolved")}
            if odd and len({report.outcome for report in reports}) > 1:
                word, report = next(iter(odd.items()))
                self._gate("repeats", False)
                self.fail("flaky", f"{patch} is {word} only at times: {report.error}", relevant_lines(report.log))
                return False
        self._gate("repeats", True)
        return True

    def _flaky(self, error: str, names: list[str]) -> None:
        self._gate("repeats", False)
        logs = [
            report.log for reports in self._reports.values() for report in reports if set(names) & set(report.failed)
        ]
        self.fail("flaky", f"{error}: {_some(names)}", relevant_lines(logs[0], names) if logs else ())

    def _look_at_outcomes(self) -> None:
        """Empty must fail and gold must pass, by the last runs, which had no flaky test."""
        empty, gold = self._reports["empty"][-1], self._reports["gold"][-1]
        self.known["seconds"] = round(gold.seconds, 3)
        self._gate("empty_fails", not empty.resolved)
        self._gate("gold_passes", gold.resolved)
        passing = [name for name, good in empty.fail_to_pass.items() if good]
        self.known["already_pass"] = tuple(passing)
        if empty.resolved:
            self.fail("empty_passes", f"passes without a patch: {_some(passing)}", relevant_lines(empty.log, passing))
        if not gold.resolved:
            error = f"the gold patch is {gold.outcome}: {gold.error}"
            self.fail("gold_fails", error, relevant_lines(gold.log, gold.failed))

    def _look_for_the_future(self) -> None:
        self.bench.say("later commits")
        with self.bench.open_sandbox() as sandbox:
            lines = reachable_future(sandbox, self.task.recipe.workdir)
        self._gate("no_future", not lines)
        if lines:
            self.fail("future_reachable", f"HEAD does not lead to {lines[0]}", lines)

    # -- the reports ------------------------------------------------------------------------------

    def _report(self) -> None:
        gold = self._reports["gold"][-1]
        self._compare_modes()
        order = other_order(self.task)
        if gold.resolved and order is not None:
            name, task = order
            official = dataclasses.replace(self.bench.grading, mode="official")
            report = self._grade("gold", official, task=task, what=f"{name} order")
            if report.tests:  # a command that does not take the other order tells nothing of the tests
                matter = tuple(one for one, good in _passed(report).items() if not good)
                self.known |= {"order": name, "order_matters": matter}
        if gold.resolved:
            self.known["needs_network"] = False
        elif self._grade("gold", opener=self.bench.open_networked, what="gold with a network").resolved:
            self.known["needs_network"] = True

    def _compare_modes(self) -> None:
        """Gold, empty and wrong must come out alike in both grading modes: none of them cheats."""
        ours = self.bench.grading
        other = GradingConfig(
            mode="official" if ours.mode == "protected" else "protected", rules=ours.rules, patch=ours.patch
        )
        differences: list[str] = []
        for patch in ("gold", "empty", "wrong"):
            if patch in self._reports:
                first = self._reports[patch][-1]
            elif _text_of(patch, self.task):
                first = self._grade(patch)
                self.known["wrong_fails"] = not first.resolved
            else:
                continue
            second = self._grade(patch, other, what=f"{patch}, {other.mode}")
            differences += _differences(patch, (ours.mode, first), (other.mode, second))
        self.known |= {"modes_agree": not differences, "differences": tuple(differences)}

    def _grade(
        self,
        patch: str,
        grading: GradingConfig | None = None,
        *,
        task: Task | None = None,
        opener: Callable[[], Sandbox] | None = None,
        what: str = "",
    ) -> TestReport:
        self.bench.say(f"tests: {what or patch}")
        self.known["runs"] += 1
        return grade(
            task or self.task,
            _text_of(patch, self.task),
            opener or self.bench.open_sandbox,
            grading=grading or self.bench.grading,
            run_empty=True,
        )


def reachable_future(sandbox: Sandbox, workdir: str) -> list[str]:
    """What of the repository HEAD does not lead to: `commit SHA DATE SUBJECT`, `remote NAME`, `tag NAME`, `blob SHA`.

    Empty for a repository without a future, and for no repository. A look that fails is a line too.
    """
    result = sandbox.run(["bash", "-c", FUTURE], cwd=workdir, timeout=300)
    if result.exit_code != 0:
        return [f"what could not be looked at: {result.output.strip()[-200:]}"]
    return result.stdout.decode("utf-8", "replace").splitlines()


def _text_of(patch: str, task: Task) -> str:
    """The patch called `empty`, `gold` or `wrong`; empty where there is no wrong one."""
    if patch == "empty":
        return ""
    if patch == "gold":
        return task.gold_patch
    from skyrl_minisandbox.scaffolds import load_scaffold

    nothing: Any = None  # it looks at neither the sandbox nor the policy
    try:
        return load_scaffold("wrong").run(task, nothing, nothing).patch or ""
    except TaskError:  # there is nothing in this gold patch that could be spoilt
        return ""


def _passed(report: TestReport) -> dict[str, bool]:
    return {**report.fail_to_pass, **report.pass_to_pass}


def _differences(patch: str, one: tuple[str, TestReport], other: tuple[str, TestReport]) -> Iterator[str]:
    """One sentence for each way in which two modes judge the same patch differently."""
    (mode, first), (other_mode, second) = one, other
    if first.outcome is not second.outcome:
        yield f"{patch}: {mode} {first.outcome}, {other_mode} {second.outcome}"
    expected = _passed(first)
    for name, good in _passed(second).items():
        if good != expected.get(name):
            words = {True: "passes", False: "fails", None: "is not listed"}
            yield f"{patch}: {name} {words[expected.get(name)]} in {mode}, {words[good]} in {other_mode}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
