# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""Reports what SymPy's `bin/test` tells its own reporter, over the results file.

The runner is part of what is tested, so nothing of it is held to stay as it is. It collects the functions of a file
when it comes to that file: what is asked for is not told.
"""


def reporter(ledger):
    """The function to call when SymPy's module `runtests` has been imported."""

    def install(module):
        import functools

        reporter_class = getattr(module, "PyTestReporter", None)
        if reporter_class is None or getattr(reporter_class, "__module__", "") != module.__name__:
            return  # the old module that only names what the new one has
        run = _Run(ledger)

        def told(name, method):
            original = getattr(reporter_class, name)

            @functools.wraps(original)
            def wrapper(self, *arguments, **keywords):
                answer = original(self, *arguments, **keywords)
                if run.counts(self):
                    method(self, *arguments)
                return answer

            setattr(reporter_class, name, wrapper)

        def verdict(word):
            return lambda reporter, *rest: run.add(reporter, word)

        told("start", lambda reporter, *rest: None)
        told("entering_test", run.start)
        told("test_pass", verdict("PASSED"))
        told("test_fail", verdict("FAILED"))
        told("test_exception", verdict("ERROR"))
        told("test_skip", verdict("SKIPPED"))
        told("test_xfail", verdict("XFAIL"))
        told("test_xpass", verdict("XPASS"))
        told("finish", lambda reporter: run.end())

    return install


class _Run:
    def __init__(self, ledger):
        self._ledger = ledger
        self._reporter = None

    def counts(self, reporter):
        """Whether it is the reporter of the run that counts: the first that this process has."""
        if self._reporter is None and not self._ledger.claimed and self._ledger.claim():
            self._reporter = reporter
        return self._reporter is reporter and reporter is not None

    def start(self, reporter, function):
        self._ledger.watch(_names(reporter)[0])

    def add(self, reporter, verdict):
        self._ledger.watch(None)
        names = _names(reporter)
        if names:
            self._ledger.write(["ran", verdict, *names])

    def end(self):
        self._ledger.write(["finished"])


def _names(reporter):
    """As the heading of a traceback has it, and as the progress lines do. None for a doctest, which has no function."""
    name = getattr(getattr(reporter, "_active_f", None), "__name__", None)
    return [f"{reporter._active_file}:{name}", name] if name else []
