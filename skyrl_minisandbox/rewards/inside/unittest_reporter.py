# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""Reports what a `unittest` result is told, over the results file: unittest itself and Django's `runtests.py`.

The first run of a `TextTestRunner` (or, where a program has a runner of its own, the first test that begins) takes
the file. Only the result of that run counts: tests of test runners make results of their own.
"""

DECISIVE = (
    "unittest.case:TestCase.run",
    "unittest.case:TestCase.__call__",
    "unittest.case:TestCase._callTestMethod",
    "unittest.case:TestCase._feedErrorsToResult",
    "unittest.case:TestCase.fail",
    "unittest.case:TestCase.assertTrue",
    "unittest.case:TestCase.assertEqual",
    "unittest.case:_Outcome.testPartExecutor",
    "unittest.suite:BaseTestSuite.run",
    "unittest.suite:TestSuite.run",
    "unittest.result:TestResult.startTest",
    "unittest.result:TestResult.stopTest",
    "unittest.result:TestResult.addSuccess",
    "unittest.result:TestResult.addError",
    "unittest.result:TestResult.addFailure",
    "unittest.result:TestResult.addSubTest",
    "unittest.result:TestResult.addExpectedFailure",
    "unittest.result:TestResult.addUnexpectedSuccess",
    "unittest.runner:TextTestResult.addSuccess",
    "unittest.runner:TextTestResult.addError",
    "unittest.runner:TextTestResult.addFailure",
    "unittest.runner:TextTestRunner.run",
)

_VERDICTS = {
    "addSuccess": "PASSED",
    "addError": "ERROR",
    "addFailure": "FAILED",
    "addSkip": "SKIPPED",
    "addExpectedFailure": "XFAIL",
    "addUnexpectedSuccess": "XPASS",
}


def reporter(ledger):
    """The function to call when `unittest.runner` has been imported."""

    def install(module):
        import functools
        import sys

        result_class = sys.modules["unittest.result"].TestResult
        runner_class = module.TextTestRunner
        run = _Run(ledger)

        def told(name, method):
            original = getattr(result_class, name)

            @functools.wraps(original)
            def wrapper(self, *arguments):
                answer = original(self, *arguments)
                if run.counts(self):
                    method(*arguments)
                return answer

            setattr(result_class, name, wrapper)

        def verdict(word):
            return lambda test, *rest: run.add(test, word)

        told("startTest", run.start)
        told("stopTest", lambda test: run.stop())
        told("addSubTest", run.add_subtest)
        for name, word in _VERDICTS.items():
            told(name, verdict(word))
        original_run = runner_class.run

        @functools.wraps(original_run)
        def whole_run(self, test):
            if not run.begin(test):
                return original_run(self, test)
            try:
                return original_run(self, test)
            finally:
                run.end()

        runner_class.run = whole_run
        _watch_endings(sys.modules["unittest.case"], run)
        run.differences = snapshot(DECISIVE)  # noqa: F821

    return install


def _watch_endings(case, run):
    """Have `run` told of tests that end by unittest's private exception although nothing has failed in them.

    unittest raises it after a failed subtest, and takes any other for a success: so could the code under test.
    """
    import contextlib
    import functools

    outcome, ending = getattr(case, "_Outcome", None), getattr(case, "_ShouldStop", None)
    if outcome is None or ending is None:
        return
    original = outcome.testPartExecutor

    @functools.wraps(original)
    @contextlib.contextmanager
    def executor(self, test, *arguments, **options):
        with original(self, test, *arguments, **options):
            try:
                yield
            except ending:
                if self.success:
                    run.broke_off(test)
                raise

    outcome.testPartExecutor = executor


class _Run:
    """The run that counts, its result, and the test that is running."""

    def __init__(self, ledger):
        self._ledger = ledger
        self._worse = worse  # noqa: F821
        self._only = frozenset(ledger.settings["only"])
        self._begun = False
        self._result = self._test = self._verdict = None
        self._told = set()
        self._codes = {}
        self.differences = list

    def begin(self, suite):
        """Whether the runner's run that begins is the one; then what it is to leave out is taken out."""
        if self._begun or not (self._ledger.claimed or self._ledger.claim()):
            return False
        self._begun = True
        self._result = None
        tests = list(_flat(suite))
        if self._only:
            _keep(suite, lambda test: not self._only.isdisjoint(_names(test)))
            tests = list(_flat(suite))
        self._ledger.write(*[["asked", *_names(test)] for test in tests], ["collected"])
        self._codes = {test.id(): _code(test) for test in tests}
        return True

    def end(self):
        self._flush()
        self._compare()
        self._ledger.write(["finished"])
        self._begun = False

    def counts(self, result):
        """Whether it is the result of the run that counts."""
        if not self._begun and not self._ledger.claimed and self._ledger.claim():
            self._begun = True  # a program with a runner of its own; nobody tells what it has collected, nor its end
        if self._begun and self._result is None:
            self._result = result
        return self._begun and self._result is result

    def start(self, test):
        self._flush()
        self._test = test
        self._ledger.watch(_names(test)[0])
        if self._codes.get(test.id(), None) is not None and _code(test) is not self._codes[test.id()]:
            self._ledger.write(["changed", test.id()])

    def stop(self):
        self._flush()
        self._compare()

    def add(self, test, verdict):
        if self._test is not None and (test is self._test or getattr(test, "test_case", None) is self._test):
            self._verdict = self._worse(self._verdict, verdict)
        else:  # nobody said that it began: a class's or a module's set-up
            names = _names(test)
            self._ledger.write(["asked", *names], ["ran", verdict, *names])

    def broke_off(self, test):
        if test is self._test or getattr(test, "test_case", None) is self._test:
            self._verdict = self._worse(self._verdict, "FAILED")

    def add_subtest(self, test, subtest, error):
        if error is not None:
            self.add(test, "FAILED" if issubclass(error[0], test.failureException) else "ERROR")

    def _flush(self):
        test, verdict, self._test, self._verdict = self._test, self._verdict, None, None
        if test is not None:
            self._ledger.watch(None)
            if verdict is not None:
                self._ledger.write(["ran", verdict, *_names(test)])

    def _compare(self):
        for name in self.differences():
            if name not in self._told:
                self._told.add(name)
                self._ledger.write(["changed", name])


def _code(test):
    """The code of the method that a test is going to call: its class's, as Django gives an instance another one for a
    coroutine."""
    function = getattr(type(test), str(getattr(test, "_testMethodName", "")), None)
    return getattr(getattr(function, "__func__", function), "__code__", None)


def _names(test):
    """Every name by which a log may call it; the first is its own alone."""
    first = str(test.id())
    found = [first, str(test)]
    holder, _, method = first.rpartition(".")
    if holder and getattr(test, "_testMethodName", None) == method:
        found.append(f"{method} ({holder})")  # what Python up to 3.10 prints
    try:
        description = test.shortDescription()
    except Exception:  # a test's own
        description = None
    if description:
        found.append(description.strip())
    return [name for number, name in enumerate(found) if name not in found[:number]]


def _flat(suite):
    """The tests of a suite; of Django's parallel one too."""
    if not _is_suite(suite):
        yield suite
        return
    for part in getattr(suite, "subsuites", suite):
        if part is not None:
            yield from _flat(part)


def _keep(suite, wanted):
    """Take the tests that are not wanted out of a suite."""
    for part in getattr(suite, "subsuites", ()):
        _keep(part, wanted)
    tests = getattr(suite, "_tests", None)
    if isinstance(tests, list):
        for test in tests:
            _keep(test, wanted)
        tests[:] = [test for test in tests if (any(True for _ in _flat(test)) if _is_suite(test) else wanted(test))]


def _is_suite(test):
    return hasattr(test, "__iter__") or hasattr(test, "subsuites")
