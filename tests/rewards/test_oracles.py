"""`official` says of every log what SWE-bench's own graders say of it, 4.1.0 and 5.0.2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skyrl_minisandbox.images import Cache, Store
from skyrl_minisandbox.images.sources import Sources
from skyrl_minisandbox.rewards import official
from skyrl_minisandbox.rewards.names import Names
from skyrl_minisandbox.rewards.parsers import load_parser
from skyrl_minisandbox.rewards.parsers.swebench_log import PARSERS
from skyrl_minisandbox.tasks import swebench
from skyrl_minisandbox.tasks.task import Tests
from tests.rewards.hacks import HACKS
from tests.rewards.hacks.suite import REPORTS, Bench
from tests.rewards.oracle import Oracle
from tests.support import REPOSITORY

pytestmark = [pytest.mark.ci, pytest.mark.needs("network")]

Graders = Sequence[Oracle]


@pytest.fixture(scope="module")
def graders(session_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graders]:
    """Both, as processes."""
    made = subprocess.run(
        ["bash", "scripts/oracles", session_directory / "oracles"],
        cwd=REPOSITORY, env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("logs")
    pythons = [Path(line) for line in made.stdout.splitlines()]
    oracles = [Oracle(rules, python, directory) for rules, python in zip(("4.1", "5.0"), pythons, strict=True)]
    yield oracles
    for oracle in oracles:
        oracle.close()


def framed(rules: str, output: str, exit_code: int) -> str:
    """The log of an instance: what the harness's script prints around the test command's output."""
    head = "+ git status\nHEAD detached\n+ : '>>>>> Start Test Output'\n+ run the tests\n"
    if rules == "4.1":
        return f"{head}{output}+ : '>>>>> End Test Output'\n+ git checkout x\n"
    tail = f"+ echo '>>>>> Test Exit Code: {exit_code}'\n>>>>> Test Exit Code: {exit_code}\n+ git checkout x\n"
    return f"{head}{output}+ SWEBENCH_TEST_EXIT_CODE={exit_code}\n+ : '>>>>> End Test Output'\n{tail}"


def agree(
    graders: Graders,
    parser: str,
    output: str,
    fail_to_pass: Sequence[str],
    pass_to_pass: Sequence[str],
    exit_code: int = 0,
) -> list[official.Verdict]:
    """Ours by both rules, each held equal to the grader's."""
    tests = Tests(
        patch="", files=(), command="run the tests", parser=parser, fail_to_pass=tuple(fail_to_pass),
        pass_to_pass=tuple(pass_to_pass),
    )  # fmt: skip
    ours = []
    for grader in graders:
        theirs = grader.grade(parser, framed(grader.rules, output, exit_code), fail_to_pass, pass_to_pass)
        verdict = official.verdict(tests, output, exit_code, grader.rules)
        where = f"{grader.rules} {parser} {output!r}"
        assert verdict.tests == theirs["tests"], where
        assert verdict.resolved == theirs["resolved"], where
        assert bool(verdict.reason) == (not verdict.resolved), where
        if status := theirs.get("tests_status"):
            for mine, key in ((verdict.fail_to_pass, "FAIL_TO_PASS"), (verdict.pass_to_pass, "PASS_TO_PASS")):
                assert {name for name, good in mine.items() if good} == set(status[key]["success"]), where
                assert {name for name, good in mine.items() if not good} == set(status[key]["failure"]), where
        ours.append(verdict)
    return ours


NAMES = (
    "tests/test_a.py::test_one",
    "tests/test_a.py::Case::test_two[x]",
    "tests/test_a.py::test_blank[log(photon flux)]",
    "tests/test_a.py::test_dash[a - b]",
    "tests/test_a.py::test_path[/usr/share/x]",
    "tests/test_a.py::test_path[//host/share]",
    "tests/test_a.py::test_path[/a/*.py]",
    "tests/test_a.py::test_brackets[[a]-]b]",
    "tests/test_a.py::test_colour[[31mred]",
    "tests/test_a.py::test_mouse[MouseButton.LEFT-MouseButton.RIGHT]",
    "test_form (forms.tests.FormTests)",
    "test_form (forms.tests.FormTests.test_form)",
    "A parent's key is kept ... really",
    "test_integrate",
    "sympy/core/tests/test_x.py:test_integrate",
)
LISTED = (
    *NAMES,
    "tests/test_a.py::test_blank[log(photon",
    "tests/test_a.py::test_",
    "tests/test_a.py::test_path[/",
    "tests/test_a.py::test_path[/x]",
    "tests/test_a.py::test_brackets[[a]",
    "tests/test_a.py::test_mouse[1-3]",
    "[1]",
    "[100%]",
    "--version is equivalent to version",
    "setUpClass",
)
FRAGMENTS = (
    *NAMES,
    *("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS", "ERRORS", "PASSED ", "FAILED ", " PASSED", " SKIPPED"),
    *("FAIL:", "FAIL: ", "ERROR:", "ERROR: ", " ... ok", " ... OK", " ...  OK", " ... FAIL", " ... ERROR", " ... "),
    *("ok", "ok\n", " ok", " E", " F", " skipped 'no'", " ... skipped", " ... expected failure", "...", "\n...\n"),
    *("SKIPPED [1] tests/test_a.py:3: not here", "PASSED [100%]", "test_", "____ ", " ____", "_", ".py:", " - ", " "),
    *(" ... Testing against Django installed in '/testbed/django'", " silenced).\nok\n", "(0 silenced).\nok\n"),
    *(" ... Internal Server Error: /x/\nok\n", " ... Internal Server Error: /", "/\nok", "\nok\n"),
    *(" ... System check identified no issues (0 silenced)\nok\n", "--version is equivalent to version"),
    "Applying sites.0002_alter_domain_unique...test_no_migrations (sites.T) ... ok",
    *("\x1b[32m", "\x1b[0m", "[31m", "[1m", "\t", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\xa0", "\u2028"),
    *("\n", "\n", "\n", "\n", "[", "]", "(", ")", "::", "/", "é", "\0"),
    *(">>>>> Start Test Output", ">>>>> End Test Output", ">>>>> Tests Timed Out", ">>>>> Test Exit Code: 0"),
    *(">>>>> Test Exit Code: 3", ">>>>> Patch Apply Failed"),
)

fragments = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=30).map("".join)
verdicts = st.sampled_from(["PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS"])


@st.composite
def summaries(draw: st.DrawFn) -> str:
    """A log as runners write it, now and then interrupted."""
    lines = []
    for name in draw(st.lists(st.sampled_from(NAMES), max_size=8)):
        verdict = draw(verdicts)
        word = {"PASSED": "ok", "FAILED": "FAIL", "XFAIL": "expected failure", "SKIPPED": "skipped 'x'"}.get(verdict)
        forms = [
            f"{verdict} {name}",
            f"{verdict} {name} - boom - [x]",
            f"{name} {verdict}   [ 50%]",
            f"{name} {verdict}",
        ]
        forms += [f"{name} ... {word or verdict}", f"{name} ... {draw(fragments)}\n{word or verdict}"]
        forms += [f"\x1b[32m{verdict}\x1b[0m {name}", f"{name} {(word or verdict)[:1]}", f"{name} ok"]
        forms += [f"____ {name} ____", f"FAIL: {name}", f"ERROR: {name} (i=1)"]
        lines.append(draw(st.sampled_from(forms)))
    return draw(fragments) + "\n".join(lines) + draw(fragments)


listed = st.lists(st.sampled_from(LISTED), max_size=4, unique=True)
codes = st.sampled_from([0, 0, 1, 2, 137])
many = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("parser", PARSERS)
@many
@given(log=summaries() | fragments, fail_to_pass=listed, pass_to_pass=listed, exit_code=codes)
def test_any_log_means_what_it_means_to_swebench(
    graders: Graders, parser: str, log: str, fail_to_pass: list[str], pass_to_pass: list[str], exit_code: int
) -> None:
    agree(graders, parser, log, fail_to_pass or ["test_integrate"], pass_to_pass, exit_code)


@pytest.mark.parametrize("parser", PARSERS)
@many
@given(log=summaries() | fragments, exit_code=codes, keep=st.integers(0, 20))
def test_lists_made_of_the_log_itself(graders: Graders, parser: str, log: str, exit_code: int, keep: int) -> None:
    names = list(PARSERS[parser](log.replace("\r\n", "\n").replace("\r", "\n"), (), "5.0"))
    cut = [name[:keep] for name in names if "[" in name[:keep]]
    agree(graders, parser, log, (names + cut)[::2] or ["x"], (names + cut)[1::2], exit_code)


def test_every_repository_has_the_parser_that_swebench_gives_it(graders: Graders) -> None:
    theirs = graders[0].parsers()
    assert len(theirs) == 18
    assert {repo: swebench._PARSERS.get(repo, "swebench-pytest") for repo in theirs} == theirs


SUITE = """
import sys, warnings
import pytest

PARAMETERS = ["a b", "a - b", "[", "]", "[x] - ]", "/usr/x", "//x", "/a/*", "10m", "[10m-x", "PASSED", "", "\\n", "é"]
PARAMETERS += ["log(photon flux)", "log(photon"]

@pytest.mark.parametrize("value", PARAMETERS)
def test_passes(value):
    print("FAILED tests/test_it.py::test_passes - printed")

@pytest.mark.parametrize("value", PARAMETERS)
def test_fails(value):
    assert value == "no - such [value]"

@pytest.mark.parametrize("value", PARAMETERS)
def test_now_so_now_so(value):
    if len(value) % 2:
        pytest.skip("odd - [reason]")
    assert "x" not in value, "has - an x"

@pytest.mark.xfail(reason="known - bug")
def test_expected():
    assert False

@pytest.mark.xfail
def test_surprise():
    pass

@pytest.fixture
def broken():
    raise OSError("set - up")

def test_setup(broken):
    pass

@pytest.fixture
def breaks():
    yield
    raise OSError("tear - down")

def test_teardown(breaks):
    sys.stderr.write("PASSED tests/test_it.py::test_printed\\n")

class TestCase:
    @pytest.mark.parametrize("left,right", [(1, 2), ("a", "b c")])
    def test_method(self, left, right):
        warnings.warn("PASSED or not")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("suite")
    (directory / "tests").mkdir()
    (directory / "tests" / "test_it.py").write_text(SUITE)
    (directory / "broken").mkdir()
    (directory / "broken" / "test_other.py").write_text("import nothing_of_that_name\n")
    (directory / "conftest.py").write_text("")
    return directory


def run(argv: Sequence[str], directory: Path, **env: str) -> tuple[str, int]:
    """Output and status of a real run."""
    done = subprocess.run(
        argv, cwd=directory, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )  # fmt: skip
    return done.stdout.decode(errors="replace"), done.returncode


@pytest.mark.parametrize(
    "options",
    [
        "-rA --tb=no -p no:cacheprovider tests",
        "-rA --tb=long -v tests broken --continue-on-collection-errors",
        "--no-header -rA -x tests",
        "-rA -vv -o console_output_style=classic tests",
        "-rA --color=yes -vv tests",
        "-q tests",
        "-rA -s -v tests",
        "-v --color=yes --tb=short tests",
        "-rN tests",
        "-rA -k passes tests",
        "-rA -k nothing tests",
        "-rA tests broken",
        "-rA --no-such-option",
    ],
)  # fmt: skip
def test_logs_of_real_pytest_runs(graders: Graders, suite: Path, options: str) -> None:
    log, status = run([sys.executable, "-m", "pytest", *options.split()], suite)
    if options.startswith(("-rA -", "-rA --")) and options.endswith(" tests") and "nothing" not in options:
        assert len(PARSERS["swebench-pytest-v2"](log)) > 10, log
    for parser in PARSERS:
        names = list(PARSERS[parser](log))
        asked = names[::3] + [name.split(" ")[0] for name in names if " " in name] + [n[:-1] for n in names if "[" in n]
        agree(graders, parser, log, list(dict.fromkeys(asked)) or ["x"], names[1::3], status)


def test_the_names_that_a_run_tells_are_found_by_what_swebench_cut_them_to(graders: Graders, suite: Path) -> None:
    """A list that 4.1 made from a log, looked up among whole names: nothing is lost, nothing taken for another."""
    log, _ = run([sys.executable, "-m", "pytest", "-rA", "--tb=no", "tests"], suite)
    whole = load_parser("pytest")(log, [])
    assert len(whole) > 30
    for parser in ("swebench-pytest", "swebench-pytest-options", "swebench-pytest-v2", "swebench-matplotlib"):
        cut = PARSERS[parser](log)
        found = Names(whole, parser)
        lost = {name for name in cut if "::" in name and not found.tests(name)}
        assert not lost, parser
        for name, verdict in cut.items():
            if len(found.tests(name)) == 1:
                assert found.lookup(name) == verdict, name


CASES = '''
import sys, unittest

class Case(unittest.TestCase):
    def test_plain(self):
        pass
    def test_doc(self):
        """A first line ... with marks"""
    def test_doc_fails(self):
        """Another line"""
        self.fail("ok")
    def test_prints(self):
        print("System check identified no issues (0 silenced)", flush=True)
    def test_prints_ok_and_fails(self):
        sys.stderr.write("printed\\nok\\n")
        self.assertTrue(False)
    def test_error(self):
        raise OSError("... ok")
    @unittest.skip("not ... here")
    def test_skip(self):
        pass
    @unittest.expectedFailure
    def test_known(self):
        self.fail()
    @unittest.expectedFailure
    def test_surprise(self):
        pass
    def test_subtests(self):
        for value in range(3):
            with self.subTest(value=value):
                self.assertNotEqual(value, 1)

class Broken(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no ... class")
    def test_never(self):
        pass
'''


def test_logs_of_real_unittest_and_django_runs(graders: Graders, tmp_path: Path, django: Path) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "settings.py").write_text(
        "SECRET_KEY = 'x'\nINSTALLED_APPS = ['django.contrib.contenttypes', 'django.contrib.auth']\n"
        "DATABASES = {'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': ':memory:'}}\n"
    )
    unittest = [sys.executable, "-m", "unittest", "-v", "test_cases"]
    runner = [sys.executable, "-m", "django", "test", "-v2", "--settings=settings", "--noinput", "test_cases"]
    for argv in (unittest, runner, [*unittest, "--locals"], [*runner, "--debug-mode", "--reverse"]):
        log, status = run(argv, tmp_path, PYTHONPATH=f"{django}:{tmp_path}")
        names = list(PARSERS["swebench-django"](log))
        assert len(names) > 8, log
        ours = agree(graders, "swebench-django", log, names[::2], names[1::2], status)
        assert ours[0].tests["Another line"] == "FAILED"
        careful = load_parser("django")(log, names)
        assert careful["test_subtests (test_cases.Case.test_subtests)"] == "FAILED", log
        assert careful["A first line ... with marks"] == "PASSED"
        # The careful one is no more generous than SWE-bench's.
        both = {name for name in careful if careful[name] == "PASSED"} - {"A first line ... with marks"}
        assert both <= {name for name, verdict in ours[0].tests.items() if verdict == "PASSED"}
        assert careful["test_prints_ok_and_fails (test_cases.Case.test_prints_ok_and_fails)"] == "FAILED"
        own = load_parser("unittest")(log, [])
        assert own["test_doc (test_cases.Case.test_doc)"] == "PASSED"
        assert own["test_doc_fails (test_cases.Case.test_doc_fails)"] == "FAILED"


def test_logs_of_real_sympy_runs(graders: Graders, sympy: Path) -> None:
    tests = sympy / "sympy" / "core" / "tests"
    tests.mkdir(exist_ok=True)
    (tests / "test_made.py").write_text(
        "from sympy.testing.pytest import XFAIL, SKIP, slow\n"
        "def test_good():\n    print('test_printed ok')\n"
        "def test_bad():\n    assert 1 == 2\n"
        "def test_error():\n    raise OSError('no')\n"
        "@XFAIL\ndef test_known():\n    assert 0\n"
        "@XFAIL\ndef test_surprise():\n    pass\n"
        "@SKIP('no')\ndef test_skip():\n    pass\n"
        "@slow\ndef test_slow():\n    pass\n"
        "def test_last():\n    pass\n"
    )
    program = "import sympy.testing.runtests as r; r.test('sympy/core/tests/test_made.py', verbose=True, colors=False, "
    log, status = run([sys.executable, "-c", program + "subprocess=False)"], sympy, PYTHONPATH=str(sympy))
    names = list(PARSERS["swebench-sympy"](log))
    ours = agree(graders, "swebench-sympy", log, names[::2], names[1::2], status)
    assert ours[0].tests["test_good"] == "PASSED" and ours[0].tests["test_bad"] == "FAILED", log
    assert load_parser("sympy")(log, [])["test_error"] == "ERROR"


def _installed(requirement: str, directory: Path) -> Path:
    target = directory / requirement
    if not target.is_dir():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--target"]
        subprocess.run([*pip, f"{target}.part", requirement], check=True)
        Path(f"{target}.part").rename(target)
    return target


@pytest.fixture(scope="module")
def django(session_directory: Path) -> Path:
    return _installed("django==4.2.16", session_directory)


@pytest.fixture(scope="module")
def sympy(session_directory: Path) -> Path:
    return _installed("sympy==1.12", session_directory)


FORGED = ("conftest-report", "forged-summary", "forged-at-the-end", "unittest-forged", "captured-lines", "locale")


@pytest.mark.needs("userns", "overlay", "git")
def test_the_logs_of_the_hacks(graders: Graders, store_directory: Path, cache_directory: Path, tmp_path: Path) -> None:
    """Those that the session has graded already, and some that forge their log."""
    bench = Bench(Store(store_directory), Cache(cache_directory), Sources(tmp_path))
    for hack in HACKS:
        if hack.name in FORGED:
            bench.report(hack, "official")
    seen = [(task, report) for task, report in REPORTS if report.command]
    assert len(seen) >= len(FORGED)
    for task, report in seen:
        lists = (task.tests.fail_to_pass, task.tests.pass_to_pass)
        for parser in PARSERS:  # whichever SWE-bench would read it with
            agree(graders, parser, report.log, *lists, exit_code=report.exit_code or 0)


SCRIPT = """set -uxo pipefail
git --version
: '>>>>> Start Test Output'
{command}
{status}: '>>>>> End Test Output'
{told}git --version
"""


@pytest.mark.parametrize(
    "command",
    [
        "printf 'PASSED tests/a.py::x\\n'",
        "printf 'PASSED tests/a.py::x'",
        "printf 'a PASSED\\nPASSED tests/a.py::x'; (exit 3)",
        "printf 'PASSED tests/a.py::x\\r\\nFAILED tests/a.py::y - z\\rPASSED tests/a.py::z\\n' >&2; (exit 1)",
        "echo PASSED tests/a.py::x; echo '>>>>> End Test Output'; echo FAILED tests/a.py::x; false",
        "echo '>>>>> Test Exit Code: 0'; echo PASSED tests/a.py::x; (exit 5)",
        "true",
        "echo PASSED tests/a.py::x; kill -9 $BASHPID",
    ],
)
@pytest.mark.parametrize("parser", ["swebench-pytest", "swebench-pytest-v2"])
def test_what_the_official_script_would_have_logged(
    graders: Graders, tmp_path: Path, command: str, parser: str
) -> None:
    """The harness's own frame, run by a real shell, against the bare output of the command."""
    (tmp_path / "tests.sh").write_text(command + "\n")
    output, status = run(["bash", "tests.sh"], tmp_path)
    status = status if status >= 0 else 128 - status
    names = ["tests/a.py::x"]
    tests = Tests(
        patch="", files=(), command="bash tests.sh", parser=parser, fail_to_pass=tuple(names), pass_to_pass=()
    )
    for grader in graders:
        new = grader.rules == "5.0"
        script = SCRIPT.format(
            command="bash tests.sh", status="SWEBENCH_TEST_EXIT_CODE=$?\n" if new else "",
            told='echo ">>>>> Test Exit Code: $SWEBENCH_TEST_EXIT_CODE"\n' if new else "",
        )  # fmt: skip
        (tmp_path / "eval.sh").write_text(script)
        log, _ = run(["bash", "eval.sh"], tmp_path)
        theirs = grader.grade(parser, log, names, [])
        verdict = official.verdict(tests, output, status, grader.rules)
        assert (verdict.tests, verdict.resolved) == (theirs["tests"], theirs["resolved"]), log
