"""What each outcome is worth under each reward, and what a reward of one's own may do."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_minisandbox.cli.settings import load_settings
from skyrl_minisandbox.cli.tree import groups
from skyrl_minisandbox.config import GradingConfig
from skyrl_minisandbox.errors import InputError, PluginError
from skyrl_minisandbox.record import Outcome
from skyrl_minisandbox.rewards import REWARDS, Canary, TestReport, grade, load_reward
from skyrl_minisandbox.rewards.compiles import compiles
from tests.rewards.conftest import Opener
from tests.rewards.test_grade import GOLD, new_file, task
from tests.support import REPOSITORY

RIGHT = (Canary("a", "pass", "PASSED"), Canary("b", "fail", "FAILED"))


def report(outcome: Outcome, mended: str = "", kept: str = "", **more: Any) -> TestReport:
    """mended, kept: a letter for each fail-to-pass and pass-to-pass test, `+` passed, `-` did not."""

    def verdicts(marks: str, word: str) -> Mapping[str, bool]:
        return {f"{word}{number}": mark == "+" for number, mark in enumerate(marks)}

    return TestReport(outcome, fail_to_pass=verdicts(mended, "f"), pass_to_pass=verdicts(kept, "p"), **more)


def unresolved(mended: str, kept: str, **more: Any) -> TestReport:
    return report(Outcome.UNRESOLVED, mended, kept, **more)


class TestEveryOutcomeUnderEveryReward:
    """All tests passed and all else was well, as far as the report goes: only the outcome decides."""

    WORTH = {
        "binary": {},
        "fraction": {},
        "shaped": {Outcome.TESTS_TIMEOUT: 0.2, Outcome.UNRESOLVED: 0.2},
    }

    @pytest.mark.parametrize(("name", "outcome"), [*itertools.product(sorted(REWARDS), Outcome)], ids=str)
    def test_only_resolved_is_1_and_what_was_not_graded_is_no_number(self, name: str, outcome: Outcome) -> None:
        given = report(outcome, "++", "+++", canaries=RIGHT, compiled=True)
        expected = self.WORTH[name].get(outcome, 0.0)
        if outcome is Outcome.RESOLVED:
            expected = 1.0
        value = load_reward(name)(given)
        if outcome is Outcome.INFRA_ERROR:
            assert value is None
        else:
            assert value == pytest.approx(expected)

    def test_the_documentation_says_the_same(self) -> None:
        """Each cell of its table, at both ends of what a report of that outcome may say."""
        lines = (REPOSITORY / "docs" / "rewards.md").read_text().splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("| outcome | when |"))
        header = [cell.strip(" `") for cell in lines[start].strip("|").split("|")]
        said: dict[Outcome, dict[str, str]] = {}
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :]):
            cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
            for outcome in re.findall(r"[a-z_]+", cells[0]):
                said[Outcome(outcome)] = dict(zip(header[2:], cells[2:], strict=True))
        assert set(said) == set(Outcome)
        for outcome, rewards in said.items():
            least = report(outcome, "--", "--", compiled=False)
            most = report(outcome, "+-", "+++", compiled=True)
            for name, cell in rewards.items():
                reward = load_reward(name)
                ends = [None if cell == "null" else float(end) for end in re.findall(r"null|[0-9.]+", cell)[:1]]
                assert [reward(least)] == [pytest.approx(end) for end in ends]
                top = reward(most)
                if "below 1" in cell:
                    assert top is not None and ends[0] is not None and ends[0] < top < 1
                elif " or " in cell:
                    assert top == pytest.approx(float(cell.split(" or ")[1]))
                else:
                    assert top == reward(least)

    def test_the_documented_reward_of_ones_own_works(self) -> None:
        page = (REPOSITORY / "docs" / "rewards.md").read_text()
        source = "".join(
            f"{line[4:]}\n" for line in re.findall(r"^    (?:def steady|    return).*$", page, re.MULTILINE)
        )
        names: dict[str, Any] = {"TestReport": TestReport}
        exec(source, names)
        globals()["steady"] = names["steady"]
        again = report(Outcome.RESOLVED, "+", "+", retries={"p0": ("FAILED", "PASSED")})
        assert load_reward(f"{__name__}.steady", discount=0.8)(again) == 0.8
        assert load_reward(f"{__name__}.steady")(report(Outcome.RESOLVED, "+", "+")) == 1.0

    def test_the_table_is_of_all_rewards(self) -> None:
        assert set(self.WORTH) == set(REWARDS) == set(groups()["reward"])

    @pytest.mark.parametrize("name", sorted(REWARDS))
    def test_what_has_no_report_has_no_reward(self, name: str) -> None:
        assert load_reward(name)(None) is None


class TestFraction:
    @pytest.mark.parametrize(
        ("mended", "kept", "worth"),
        [
            ("+-", "++++", 0.75),
            ("++", "++--", 0.75),
            ("+-", "++--", 0.5),
            ("++", "----", 0.5),
            ("+---", "++++++++++", 0.625),
            ("--", "++++", 0.0),  # a patch that does nothing keeps all of these too
            ("--", "----", 0.0),
            ("", "++--", 0.5),
            ("+-", "", 0.5),
            ("", "", 0.0),
        ],
    )
    def test_it_is_the_share_of_each_list(self, mended: str, kept: str, worth: float) -> None:
        assert load_reward("fraction")(unresolved(mended, kept)) == pytest.approx(worth)

    def test_only_the_ratio_of_the_weights_counts(self) -> None:
        given = unresolved("+-", "++++")
        for factor in (1e-9, 1.0, 1e9):
            reward = load_reward("fraction", fail_to_pass=3 * factor, pass_to_pass=factor)
            assert reward(given) == pytest.approx(0.75 * 0.5 + 0.25)

    @pytest.mark.parametrize("told", [(), RIGHT[:1], RIGHT[1:]], ids=["none", "pass", "fail"])
    def test_a_run_that_no_canary_vouches_for_earns_nothing(self, told: tuple[Canary, ...]) -> None:
        """A runner that ended early has told of some tests and not of every canary: anything may have told it."""
        canaries = tuple(one if one in told else Canary(one.name, one.must, "") for one in RIGHT)
        assert load_reward("fraction")(unresolved("+-", "++", canaries=canaries)) == 0.0
        assert load_reward("fraction")(unresolved("+-", "++", canaries=RIGHT)) == pytest.approx(0.75)

    def test_a_run_that_was_rejected_as_a_whole_earns_nothing(self) -> None:
        """Every listed test passed and still it is not resolved: the results themselves are not believed."""
        assert load_reward("fraction")(unresolved("++", "+++")) == 0.0

    @given(
        mended=st.text("+-", max_size=40),
        kept=st.text("+-", max_size=40),
        weights=st.tuples(*[st.floats(1e-300, 1e300)] * 2),
    )
    def test_nothing_but_resolved_reaches_1(self, mended: str, kept: str, weights: tuple[float, float]) -> None:
        reward = load_reward("fraction", fail_to_pass=weights[0], pass_to_pass=weights[1])
        value = reward(unresolved(mended, kept))
        assert value is not None and 0.0 <= value < 1.0

    @given(mended=st.text("+-", max_size=40), kept=st.text("+-", max_size=40), weight=st.floats(1e-6, 1e6))
    def test_what_mends_a_test_earns_something(self, mended: str, kept: str, weight: float) -> None:
        value = load_reward("fraction", fail_to_pass=weight)(unresolved(mended, kept))
        assert value is not None
        assert (value > 0.0) == ("+" in (mended or kept) and "-" in mended + kept)

    @given(mended=st.text("+-", min_size=1, max_size=20), kept=st.text("+-", min_size=1, max_size=20))
    def test_one_more_test_that_passes_is_never_worth_less(self, mended: str, kept: str) -> None:
        reward = load_reward("fraction")
        worth = reward(unresolved(mended, kept))
        for better in ((mended.replace("-", "+", 1), kept), (mended, kept.replace("-", "+", 1))):
            outcome = Outcome.UNRESOLVED if "-" in "".join(better) else Outcome.RESOLVED
            value = reward(report(outcome, *better))
            assert value is not None and worth is not None and value >= worth


class TestShaped:
    @pytest.mark.parametrize(
        ("given", "worth"),
        [
            (report(Outcome.PATCH_FAILED), 0.0),
            (unresolved("-", "+"), 0.1),
            (unresolved("-", "+", compiled=False), 0.1),
            (unresolved("-", "+", compiled=True), 0.2),
            (unresolved("+-", "++", compiled=True), 0.2 + 0.8 * 0.75),
            (unresolved("+-", "++", compiled=None), 0.1 + 0.8 * 0.75),
            (report(Outcome.TESTS_TIMEOUT, "++", "+-", compiled=True), 0.2),
            (report(Outcome.TAMPERED, "+-", "++", compiled=True), 0.0),
        ],
    )
    def test_each_step_is_worth_its_weight(self, given: TestReport, worth: float) -> None:
        assert load_reward("shaped")(given) == pytest.approx(worth)

    def test_the_weights_are_those_that_are_set(self) -> None:
        reward = load_reward("shaped", applies=1, compiles=1, tests=2, fail_to_pass=1, pass_to_pass=3)
        assert reward(unresolved("+-", "++", compiled=True)) == pytest.approx((1 + 1 + 2 * (0.5 + 3) / 4) / 4)

    def test_it_asks_for_what_it_pays_for(self) -> None:
        assert load_reward("shaped").needs == {"compiled"}
        assert load_reward("binary").needs == load_reward("fraction").needs == frozenset()


class TestOptions:
    @pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "0.5", None, [1]])
    @pytest.mark.parametrize("name", ["fraction", "shaped"])
    def test_a_weight_is_a_number_above_0(self, name: str, value: object) -> None:
        with pytest.raises(InputError, match=r"`reward\.options\.fail_to_pass=.*` must be a number above 0"):
            load_reward(name, fail_to_pass=value)

    @pytest.mark.parametrize(
        ("name", "known"),
        [("binary", "none"), ("fraction", "fail_to_pass, pass_to_pass"), (f"{__name__}.scaled", "factor")],
    )
    def test_an_unknown_one_is_told_the_known_ones(self, name: str, known: str) -> None:
        with pytest.raises(InputError) as raised:
            load_reward(name, wieght=1)
        assert raised.value.message == f"reward `{name}` has no key `wieght`; known: {known}"
        assert raised.value.hint == "name one of these, or leave `reward.options.wieght` out"

    @pytest.mark.parametrize("name", sorted(REWARDS))
    def test_the_tree_has_the_defaults_of_the_code(self, name: str) -> None:
        config = load_settings([f"reward={name}"]).env.reward
        assert config.name == name
        assert vars(load_reward(name, **config.options)).keys() == vars(load_reward(name)).keys()
        for one in (unresolved("+-", "++-", compiled=True), unresolved("-", "+", compiled=False)):
            assert load_reward(name, **config.options)(one) == load_reward(name)(one)

    def test_the_command_line_sets_them(self) -> None:
        config = load_settings(["reward=fraction", "reward.options.fail_to_pass=3"]).env.reward
        assert config.options == {"fail_to_pass": 3, "pass_to_pass": 0.5}
        own = load_settings([f"reward={__name__}.scaled", "reward.options.factor=4"]).env.reward
        assert load_reward(own.name, **own.options)(unresolved("+", "-")) == 2.0


def scaled(report: TestReport, *, factor: float = 1.0) -> float:
    return factor * 0.5


def strict(report: TestReport, *, factor: float) -> float:
    return factor


class Counting:
    """What passes, as a sum: a reward of one's own as a class."""

    needs = ("compiled",)

    def __init__(self, each: float = 1.0) -> None:
        self.each = each

    def __call__(self, report: TestReport) -> float:
        return self.each * sum(report.fail_to_pass.values()) + (report.compiled is True)


class Curious:
    needs = ("compiled", "moon")

    def __call__(self, report: TestReport) -> float:
        return 0.0


class Silent:
    pass


NUMBER = 3


def nan(report: TestReport) -> float:
    return math.nan


def nothing(report: TestReport) -> None:
    return None


def penalty(report: TestReport) -> float:
    return -2.0


class TestARewardOfOnesOwn:
    def test_is_a_function_with_options(self) -> None:
        assert load_reward(f"{__name__}.scaled")(unresolved("+", "-")) == 0.5
        assert load_reward(f"{__name__}.scaled", factor=3)(unresolved("+", "-")) == 1.5

    def test_is_a_class_with_options_and_needs(self) -> None:
        reward = load_reward(f"{__name__}.Counting", each=0.25)
        assert reward.needs == {"compiled"}
        assert reward(unresolved("++-", "+", compiled=True)) == 1.5

    def test_is_told_an_option_that_it_lacks(self) -> None:
        with pytest.raises(InputError, match="needs the key `factor`") as raised:
            load_reward(f"{__name__}.strict")
        assert raised.value.hint == "set `reward.options.factor=...`"

    @pytest.mark.parametrize("name", ["scaled", "Counting"])
    def test_never_sees_what_was_not_graded(self, name: str) -> None:
        reward = load_reward(f"{__name__}.{name}")
        assert reward(None) is None
        assert reward(report(Outcome.INFRA_ERROR, "++", "++")) is None

    @pytest.mark.parametrize(("name", "worth"), [("scaled", 0.0), ("Counting", 0.0), ("penalty", -2.0)])
    def test_does_not_pay_for_tampering_but_may_punish_it(self, name: str, worth: float) -> None:
        assert load_reward(f"{__name__}.{name}")(report(Outcome.TAMPERED, "++", "++", compiled=True)) == worth

    @pytest.mark.parametrize("name", ["nan", "nothing"])
    def test_gives_a_finite_number(self, name: str) -> None:
        with pytest.raises(InputError, match="no finite number"):
            load_reward(f"{__name__}.{name}")(unresolved("+", "-"))

    def test_may_give_the_numbers_of_numpy(self) -> None:
        numpy = pytest.importorskip("numpy")
        globals()["_number"] = numpy.float32(0.25)
        value = load_reward(f"{__name__}.numpy_number")(unresolved("+", "-"))
        assert (value, type(value)) == (0.25, float)

    @pytest.mark.parametrize(
        ("name", "kind", "message"),
        [
            ("Curious", InputError, "needs moon; known: compiled"),
            ("Silent", InputError, "cannot be called"),
            ("NUMBER", InputError, "cannot be called"),
            ("nowhere", PluginError, "has no `nowhere`"),
        ],
    )
    def test_that_is_none_is_told_at_once(self, name: str, kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            load_reward(f"{__name__}.{name}")

    def test_that_nobody_knows_is_told_what_exists(self) -> None:
        with pytest.raises(PluginError, match="unknown reward `fractoin`; known: binary, fraction, shaped"):
            load_reward("fractoin")


_number: Any = None


def numpy_number(report: TestReport) -> Any:
    return _number


class TestCompiles:
    """In a real sandbox, with the patch applied."""

    @pytest.fixture
    def ask(self, open_sandbox: Opener) -> Callable[[str], bool | None]:
        def asked(patch: str) -> bool | None:
            from skyrl_minisandbox.rewards.apply import apply_patch

            sandbox = open_sandbox()
            assert apply_patch(sandbox, patch, "/srv").ok
            before = sandbox.run("find . /tmp -newer /srv/keep.txt | sort").output
            answer = compiles(sandbox, patch, "/srv")
            assert sandbox.run("find . /tmp -newer /srv/keep.txt | sort").output == before
            return answer

        return asked

    @pytest.mark.parametrize(
        ("patch", "answer"),
        [
            (new_file("pkg/new.py", "x = 1\n"), True),
            (new_file("pkg/new.py", "x = = 1\n"), False),
            (new_file("pkg/new.py", "x = 1\n") + new_file("pkg/z.py", "def f(:\n"), False),
            (new_file("pkg/new.txt", "x = = 1\n"), None),
            (GOLD, None),
            (new_file("pkg/new.txt", "none") + new_file("caf\udce9 \u00e9.py", "x = 1\n"), True),
            (new_file("caf\u00e9.py", "x = = 1\n"), False),
            (new_file("pkg/latin.py", "x = '\udce9'\n"), False),
            (new_file("pkg/latin.py", "# -*- coding: latin-1 -*-\nx = '\udce9'\n"), True),
            (new_file("pkg/deep.py", "(" * 5000 + ")" * 5000), False),
            (new_file("pkg/sum.py", "x = " + "-" * 200_000 + "1"), False),
            (new_file("pkg/warn.py", "x = 1 is 1\n"), True),
        ],
        ids=[
            "good", "bad", "one-of-two", "no-python", "text", "odd-name", "odd-name-bad", "not-utf-8", "declared",
            "deep", "crash", "warning",
        ],
    )  # fmt: skip
    def test_what_the_patch_leaves_is_compiled(
        self, ask: Callable[[str], bool | None], patch: str, answer: bool | None
    ) -> None:
        assert ask(patch) is answer

    def test_a_file_that_is_removed_or_a_link_is_not_compiled(self, ask: Callable[[str], bool | None]) -> None:
        removed = (
            "diff --git a/pkg/a.py b/pkg/a.py\ndeleted file mode 100644\n--- a/pkg/a.py\n+++ /dev/null\n"
            "@@ -1 +0,0 @@\n-a = 1\n"
        )
        link = (
            "diff --git a/zero.py b/zero.py\nnew file mode 120000\n--- /dev/null\n+++ b/zero.py\n"
            "@@ -0,0 +1 @@\n+/dev/zero\n\\ No newline at end of file\n"
        )
        assert ask(removed + link) is None

    def test_a_renamed_file_is_compiled_under_its_new_name(self, ask: Callable[[str], bool | None]) -> None:
        renamed = (
            "diff --git a/pkg/a.py b/pkg/moved.py\nsimilarity index 50%\nrename from pkg/a.py\nrename to pkg/moved.py\n"
            "--- a/pkg/a.py\n+++ b/pkg/moved.py\n@@ -1 +1 @@\n-a = 1\n+{}\n"
        )
        assert ask(renamed.format("a = 2")) is True
        assert ask(renamed.format("a = (")) is False

    @pytest.mark.parametrize("mode", ["protected", "official"])
    @pytest.mark.parametrize(("source", "answer"), [("x = 1\n", True), ("x = = 1\n", False)])
    def test_grading_looks_when_a_reward_asks(self, open_sandbox: Opener, mode: str, source: str, answer: bool) -> None:
        how = GradingConfig(mode=mode)
        patch = GOLD.replace("+ONE", "+OTHER") + new_file("pkg/new.py", source)
        reward = load_reward("shaped")
        graded = grade(task(), patch, open_sandbox, grading=how, needs=reward.needs)
        assert (graded.outcome, graded.compiled) == (Outcome.UNRESOLVED, answer)
        assert reward(graded) == pytest.approx(0.2 if answer else 0.1)
        assert grade(task(), patch, open_sandbox, grading=how).compiled is None

    def test_a_patch_without_the_prefixes_of_git_is_looked_at_too(self, open_sandbox: Opener) -> None:
        bare = "--- pkg/a.py\n+++ pkg/a.py\n@@ -1 +1 @@\n-a = 1\n+a = (\n"
        fuzzy = GradingConfig(patch="fuzzy")
        assert grade(task(), bare, open_sandbox, grading=fuzzy, needs=("compiled",)).compiled is False

    def test_an_empty_patch_or_one_that_does_not_apply_is_not_looked_at(self, open_sandbox: Opener) -> None:
        needs = ("compiled",)
        assert grade(task(), "", open_sandbox, run_empty=True, needs=needs).compiled is None
        failed = grade(task(), GOLD.replace("-one", "-two") + new_file("n.py", "x"), open_sandbox, needs=needs)
        assert (failed.outcome, failed.compiled) == (Outcome.PATCH_FAILED, None)

    def test_nothing_of_the_patch_runs(self, ask: Callable[[str], bool | None]) -> None:
        """Neither what Python would import at its start from the workdir, nor what the files do when imported."""
        evil = "import os; os._exit(0)\n"
        patch = "".join(new_file(f"{name}.py", evil) for name in ("sitecustomize", "usercustomize", "os", "stat"))
        assert ask(patch + new_file("pkg/new.py", "x = = 1\n")) is False
