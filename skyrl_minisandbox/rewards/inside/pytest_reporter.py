# mypy: allow-untyped-defs, allow-untyped-calls, no-check-untyped-defs
"""A pytest plug-in that reports over the results file. pytest 3.3 to 9.

Loaded by an entry point before any conftest; the first process that is about to collect and run takes the file.
"""

DECISIVE = (
    "_pytest.python:Function.runtest",
    "_pytest.python:pytest_pyfunc_call",
    "_pytest.unittest:TestCaseFunction.runtest",
    "_pytest.unittest:TestCaseFunction.addError",
    "_pytest.unittest:TestCaseFunction.addFailure",
    "_pytest.runner:pytest_runtest_protocol",
    "_pytest.runner:runtestprotocol",
    "_pytest.runner:call_and_report",
    "_pytest.runner:call_runtest_hook",
    "_pytest.runner:pytest_runtest_setup",
    "_pytest.runner:pytest_runtest_call",
    "_pytest.runner:pytest_runtest_teardown",
    "_pytest.runner:pytest_runtest_makereport",
    "_pytest.runner:CallInfo.from_call",
    "_pytest.runner:CallInfo.__init__",
    "_pytest.reports:TestReport.__init__",
    "_pytest.reports:TestReport.from_item_and_call",
    "_pytest.reports:BaseReport.passed",
    "_pytest.reports:BaseReport.failed",
    "_pytest.reports:BaseReport.skipped",
    "_pytest.skipping:pytest_runtest_makereport",
    "_pytest.main:pytest_runtestloop",
    "_pytest.main:Session.perform_collect",
    "pluggy.hooks:_HookCaller.__call__",
    "pluggy._hooks:_HookCaller.__call__",
    "pluggy._hooks:HookCaller.__call__",
    "pluggy._caller:HookCaller.__call__",
    "pluggy.callers:_multicall",
    "pluggy._callers:_multicall",
    "pluggy._execution:_multicall",
    "pluggy.manager:PluginManager._hookexec",
    "pluggy._manager:PluginManager._hookexec",
)


def reporter(ledger, module_name):
    """The hook by which it begins."""
    import pytest

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(early_config):
        options = early_config.known_args_namespace
        idle = ("collectonly", "help", "version", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")
        if ledger.claimed or any(getattr(options, name, None) for name in idle) or not ledger.claim():
            return
        manager = early_config.pluginmanager
        try:  # the header of the log names no plug-in that the image does not have
            manager._plugin_distinfo[:] = [
                pair for pair in manager._plugin_distinfo if getattr(pair[0], "__name__", "") != module_name
            ]
        except AttributeError:
            pass
        manager.register(_plugin(ledger, early_config))

    return pytest_load_initial_conftests


def _plugin(ledger, config):
    import os
    import sys

    import pytest

    workdir = os.path.realpath(ledger.settings["workdir"])
    runner = os.path.realpath(sys.modules["_pytest"].__file__ or workdir)
    # Where pytest is what is being tested, its tests may do with it as they like.
    is_tested = runner.startswith(workdir + os.sep)
    differences = snapshot(() if is_tested else DECISIVE)  # noqa: F821
    collected = {}
    worse_of = worse  # noqa: F821
    only = frozenset(ledger.settings["only"])
    cut = tuple(name for name in only if "[" in name and not name.endswith("]"))
    write, watch = ledger.write, ledger.watch
    told = set()
    verdicts = {}

    shown_paths = {}

    def names(nodeid):
        """As the results name it, and as the log does where pytest was started elsewhere than in its root directory."""
        path, separator, rest = nodeid.partition("::")
        if path not in shown_paths:
            shown_paths[path] = _relative(config, path)
        shown = shown_paths[path] + separator + rest
        return [nodeid] if shown == nodeid else [nodeid, shown]

    def compare():
        for name in differences():
            if name not in told:
                told.add(name)
                write(["changed", name])

    def wanted(item):
        return any(name in only or (cut and name.startswith(cut)) for name in names(item.nodeid))

    class Plugin(object):  # noqa: UP004
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items):
            if only:
                others = [item for item in items if not wanted(item)]
                items[:] = [item for item in items if wanted(item)]
                if others:
                    config.hook.pytest_deselected(items=others)

        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_finish(self, session):
            write(*[["asked", *names(item.nodeid)] for item in session.items], ["collected"])
            # Canaries fail, and pytest's own form of a traceback parses the whole test file for each of them.
            if getattr(config.option, "tbstyle", None) == "auto":
                config.option.tbstyle = "native"
            if not is_tested:
                collected.update((item.nodeid, _calls(item)) for item in session.items)

        @pytest.hookimpl(optionalhook=True)
        def pytest_xdist_node_collection_finished(self, ids):
            write(*[["asked", *names(nodeid)] for nodeid in ids], ["collected"])

        def pytest_collectreport(self, report):
            if report.failed and report.nodeid:
                write(["asked", *names(report.nodeid)], ["ran", "ERROR", *names(report.nodeid)])

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_protocol(self, item):
            watch(item.nodeid)
            function = collected.get(item.nodeid, (None,))[0]
            # Plug-ins for coroutines give an item another function, but not before it begins.
            if (function and _calls(item)[0] is not function) or "runtest" in vars(item):
                write(["changed", item.nodeid])
            self.pytest_runtest_call(item)

        @pytest.hookimpl(tryfirst=True)
        def pytest_runtest_call(self, item):
            function, code, own = collected.get(item.nodeid, (None, None, None))
            if getattr(function, "__code__", None) is not code or (own and _calls(item)[2] is not own):
                write(["changed", item.nodeid])

        @pytest.hookimpl(optionalhook=True)  # since 3.4
        def pytest_runtest_logfinish(self):
            watch(None)

        @pytest.hookimpl(trylast=True)
        def pytest_runtest_logreport(self, report):
            # Told as soon as it is known: what comes next may be the end of this process.
            verdict, nodeid = _verdict(report), report.nodeid
            if verdict is not None and worse_of(verdicts.get(nodeid), verdict) != verdicts.get(nodeid):
                verdicts[nodeid] = verdict
                write(["ran", verdict, *names(nodeid)])
            if report.when == "teardown":
                verdicts.pop(nodeid, None)
                compare()

        @pytest.hookimpl(trylast=True)
        def pytest_sessionfinish(self):
            watch(None)
            compare()
            write(["finished"])

    return Plugin()


def _calls(item):
    """What a test is going to call: the function, its code, and the code of the function of its name."""
    function = vars(item).get("_obj")
    function = getattr(function, "__func__", function)
    holder = getattr(item, "cls", None) or getattr(item, "module", None)
    own = getattr(holder, getattr(item, "originalname", None) or item.name.partition("[")[0], None)
    own = getattr(own, "__func__", own)
    return function, getattr(function, "__code__", None), getattr(own, "__code__", None)


def _relative(config, path):
    """A path below pytest's root directory as seen from where pytest was started."""
    import os

    root = str(getattr(config, "rootpath", None) or config.rootdir)
    parameters = getattr(config, "invocation_params", None)  # since 5.1
    start = str(parameters.dir if parameters is not None else config.invocation_dir)
    return path if start == root else os.path.relpath(os.path.join(root, path), start)


def _verdict(report):
    """The word of the log's summary; None for what decides nothing (a set-up that went well, a run to be repeated)."""
    if report.failed:
        return "FAILED" if report.when == "call" else "ERROR"
    if report.skipped:
        return "XFAIL" if hasattr(report, "wasxfail") else "SKIPPED"
    if report.passed and report.when == "call":
        return "XPASS" if hasattr(report, "wasxfail") else "PASSED"
    return None
