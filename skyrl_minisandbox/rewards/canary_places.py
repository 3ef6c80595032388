"""Where a canary can live: the modules and classes whose tests the task asks for by plain names.

A place is a module or a class of it whose own body defines a listed test without parameters, or with such as its
decorator explains. Such a test is the proof that the runner collects, calls and judges a plain function beside it.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import unittest
from collections.abc import Iterable, Mapping

from skyrl_minisandbox.tasks.task import Tests

# Marks and decorators under which a plain function beside the others would be skipped, called with arguments,
# or come out other than it fails. A decorator of a class that is not known to be harmless excludes the class.
_UNFIT_MARKS = re.compile(r"parametrize|xfail|skip(?!if)|flaky|asyncio|anyio|trio|isolated|forked|expectedFailure")
# A condition for skipping is harmless: where it holds, the tests beside it that the task lists do not pass either.
_CONDITIONS = {"skipif", "skipIf", "skipUnless", "skipIfDBFeature", "skipUnlessDBFeature", "skipUnlessAnyDBFeature"}
_HARMLESS = frozenset({"override_settings", "modify_settings", "tag", "usefixtures", "filterwarnings", *_CONDITIONS})

# Databases flushed, servers and browsers started for every single test: right, but slow.
_COSTLY = re.compile(r"Transaction|LiveServer|Selenium|Serial")

# What of a command holds `::` without naming a test: a warnings filter (`PYTHONWARNINGS=ignore::UserWarning`).
_FILTER = re.compile(r"[A-Za-z_]\w*=|-W|(?:default|error|ignore|always|module|once):")

_MOST_IDS = 6  # parameters of a test that is worth doing twice

_ASSERTIONS = frozenset(name for name in dir(unittest.TestCase) if name.startswith("assert")) | {"assertEquals"}

_UNITTEST_NAME = re.compile(r"^(\w+) \(([\w.]+)\)$")


@dataclasses.dataclass(frozen=True)
class Place:
    """A module (`cls` is None) or class into which a test can be written.

    prefix: how the runner calls the container: `path::Class` or `path` for pytest, `module.Class` for
        unittest and django, the path for sympy.
    tests: the test functions of its own body, in order. passing: those of them that are plain, listed in
    pass-to-pass, and neither asynchronous nor decorated. hidden: the same of fail-to-pass; of functions with
    parameters, those that have a test in it. parameters: by name of a listed function what stands in the brackets of
    its tests. wanted: its file has a fail-to-pass test.
    costly: a test in it costs more than the call of a function. method: the name of a test's first argument, ""
    for functions.
    """

    path: str
    prefix: str
    module: ast.Module
    cls: ast.ClassDef | None
    tests: tuple[ast.FunctionDef, ...]
    passing: tuple[ast.FunctionDef, ...]
    hidden: tuple[ast.FunctionDef, ...]
    parameters: Mapping[str, tuple[str, ...]]
    wanted: bool
    costly: bool
    method: str

    @property
    def body(self) -> list[ast.stmt]:
        """The statements among which a test is put."""
        return self.module.body if self.cls is None else self.cls.body

    @property
    def is_unittest(self) -> bool:
        """Whether its tests speak `self.assertEqual`."""
        return self.cls is not None and any(
            isinstance(node, ast.Attribute) and node.attr in _ASSERTIONS and _is_name(node.value, self.method)
            for test in self.tests
            for node in ast.walk(test)
        )


def find_places(runner: str, modules: Mapping[str, ast.Module], tests: Tests) -> list[Place]:
    """Every place in `modules` (parsed sources by path), in the order of the files."""
    listed = _listed(runner, modules, tests)
    if not listed or _selects(tests.command):
        return []
    bases = {
        name.id if isinstance(name, ast.Name) else name.attr
        for module in modules.values()
        for node in module.body
        if isinstance(node, ast.ClassDef)
        for name in node.bases
        if isinstance(name, ast.Name | ast.Attribute)
    }
    wanted = {path for (path, _), found in listed.items() if found.wanted}
    places = []
    for (path, class_name), found in listed.items():
        module = modules[path]
        if _unfit_module(module) or (class_name and class_name in bases):
            continue  # what is written into a base class would run in each of its subclasses too
        cls = _the_class(module, class_name) if class_name else None
        if class_name and (cls is None or _unfit_class(cls)):
            continue
        place = _place(path, module, cls, found, path in wanted)
        if place is not None:
            places.append(place)
    return places


@dataclasses.dataclass
class _Listed:
    """What the task lists of one container: names of functions without parameters."""

    prefix: str
    passing: set[str] = dataclasses.field(default_factory=set)
    hidden: set[str] = dataclasses.field(default_factory=set)
    plain: set[str] = dataclasses.field(default_factory=set)
    parameters: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    wanted: bool = False


def _listed(runner: str, modules: Mapping[str, ast.Module], tests: Tests) -> dict[tuple[str, str], _Listed]:
    """By (path, class name or "")."""
    split = {"pytest": _pytest_name, "unittest": _dotted_name, "django": _dotted_name, "sympy": _sympy_name}.get(runner)
    if split is None:
        return {}
    where = _Where(runner, modules)
    described = _described(modules) if runner == "django" else {}
    found: dict[tuple[str, str], _Listed] = {}
    for name, passes in [*((n, True) for n in tests.pass_to_pass), *((n, False) for n in tests.fail_to_pass)]:
        parts = split(name) or described.get(name)
        if parts is None:
            continue
        file, cls, function = parts
        for path in where(file, function):
            separator = "::" if runner == "pytest" else "."
            prefix = path if runner == "sympy" else f"{file}{separator}{cls}" if cls else file
            entry = found.setdefault((path, cls), _Listed(prefix))
            entry.wanted |= not passes
            if runner == "pytest" and "[" in name:
                inside = name.partition("[")[2]
                if inside.endswith("]"):
                    entry.parameters[function] = (*entry.parameters.get(function, ()), inside[:-1])
                if not passes:
                    entry.hidden.add(function)
                continue
            entry.plain.add(function)
            (entry.passing if passes else entry.hidden).add(function)
    return found


def _pytest_name(name: str) -> tuple[str, str, str] | None:
    parts = name.split("[", 1)[0].split("::")
    if len(parts) == 2:
        return parts[0], "", parts[1]
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None


def _dotted_name(name: str) -> tuple[str, str, str] | None:
    if match := _UNITTEST_NAME.match(name):
        function, dotted = match.groups()
        dotted = dotted.removesuffix("." + function)
    elif re.fullmatch(r"\w+(\.\w+){2,}", name):
        dotted, function = name.rsplit(".", 1)
    else:
        return None
    file, _, cls = dotted.rpartition(".")
    return (file, cls, function) if file else None


def _described(modules: Mapping[str, ast.Module]) -> dict[str, tuple[str, str, str]]:
    """Django's tests by the first line of their docstring, by which its log and so its lists call them."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for path, module in modules.items():
        file = path.removesuffix(".py").removeprefix("tests/").replace("/", ".")
        for cls in [node for node in module.body if isinstance(node, ast.ClassDef)]:
            for test in [node for node in cls.body if isinstance(node, ast.FunctionDef)]:
                line = (ast.get_docstring(test) or "").strip().split("\n")[0].strip()
                found.setdefault(line, []).append((file, cls.name, test.name))
    return {line: tests[0] for line, tests in found.items() if line and len(tests) == 1}


def _sympy_name(name: str) -> tuple[str, str, str] | None:
    file, _, function = name.rpartition(":")
    return (file, "", function) if function.isidentifier() else None


@dataclasses.dataclass(frozen=True)
class _Where:
    """Finds the sources that a listed name's file or module means."""

    runner: str
    modules: Mapping[str, ast.Module]

    def __call__(self, file: str, function: str) -> list[str]:
        if self.runner == "sympy" and not file:
            return [path for path, module in self.modules.items() if _defines(module, function)]
        names = {path: path for path in self.modules}
        end = "/" + file
        if self.runner in ("unittest", "django"):
            names = {path: path.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for path in names}
            end = "." + file
        exact = [path for path, name in names.items() if name == file]
        found = exact or [path for path, name in names.items() if name.endswith(end)]
        return found if len(found) == 1 else []  # one of two files may not be run at all


def _defines(module: ast.Module, function: str) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in module.body)


def _selects(command: str) -> bool:
    """Whether the command picks tests by name or mark, or switches assertions off: a canary would not tell."""
    try:
        words = shlex.split(command, comments=True)
    except ValueError:
        words = command.split()
    runs_tests = False
    for word in words:
        if word in ("-O", "-OO") or word.startswith("PYTHONOPTIMIZE="):
            return True  # `assert` would do nothing
        if word.startswith("-k") or ("::" in word and not _FILTER.match(word)):
            return True
        if word == "-m" and runs_tests:
            return True
        # `python -m pytest -m slow`: the first names a module, the second a mark.
        runs_tests |= word.rsplit("/", 1)[-1] in ("pytest", "py.test")
    return False


def _place(path: str, module: ast.Module, cls: ast.ClassDef | None, found: _Listed, wanted: bool) -> Place | None:
    body = module.body if cls is None else cls.body
    functions = [node for node in body if isinstance(node, ast.FunctionDef)]
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    collected = [
        node
        for node in functions
        if node.name in found.plain or explained(node, found.parameters)
        if names.count(node.name) == 1 and (cls is None or _takes_self(node))
    ]
    plain = [node for node in collected if node.name in found.plain]
    if not collected:
        return None
    start = _common_start([node.name for node in collected])
    return Place(
        path=path,
        prefix=found.prefix,
        module=module,
        cls=cls,
        tests=tuple(node for node in functions if node.name.startswith(start)),
        passing=tuple(node for node in plain if node.name in found.passing and not node.decorator_list),
        hidden=tuple(node for node in collected if node.name in found.hidden),
        parameters=found.parameters,
        wanted=wanted,
        method="" if cls is None else collected[0].args.args[0].arg,
        costly=cls is not None and any(_COSTLY.search(ast.unparse(base)) for base in cls.bases),
    )


def explained(test: ast.FunctionDef, known: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether the parameters that are listed of a test are those of its only decorator.

    known: what stands in the brackets of its tests, by function. When it lists more or fewer than the decorator has,
    something else takes part, such as a fixture that gives parameters to every test around.
    """
    match test.decorator_list:
        case [ast.Call(func=func, args=[ast.Constant() | ast.Tuple() | ast.List(), given], keywords=keywords)]:
            named = all(keyword.arg == "ids" for keyword in keywords)
            plain = ast.unparse(func).endswith("mark.parametrize") and named
            count = len(given.elts) if isinstance(given, ast.List | ast.Tuple) else 0
            return plain and 0 < count == len(known.get(test.name, ()))
    return False


def parameter_ids(test: ast.FunctionDef, known: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """What stands in the brackets of a test whose only decorator is a short and plain list of parameters, else nothing.

    known: see `explained`.
    """
    if not explained(test, known) or len(known[test.name]) > _MOST_IDS:
        return ()
    call = test.decorator_list[0]
    text = ast.unparse(call)
    plain = isinstance(call, ast.Call) and isinstance(call.args[0], ast.Constant) and not call.keywords
    return known[test.name] if plain and "param(" not in text and "*" not in text else ()


def _common_start(names: Iterable[str]) -> str:
    return "test_" if all(name.startswith("test_") for name in names) else "test"


def _takes_self(node: ast.FunctionDef) -> bool:
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    return bool(node.args.args) and not static


def _the_class(module: ast.Module, name: str) -> ast.ClassDef | None:
    found = [node for node in module.body if isinstance(node, ast.ClassDef) and node.name == name]
    return found[0] if len(found) == 1 else None


def _unfit_module(module: ast.Module) -> bool:
    return any(_sets_unfit(node) for node in module.body)


def _unfit_class(cls: ast.ClassDef) -> bool:
    if any(_sets_unfit(node) for node in cls.body) or cls.keywords:
        return True
    for mark in cls.decorator_list:
        target = mark.func if isinstance(mark, ast.Call) else mark
        name = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
        if name not in _HARMLESS:
            return True
    return False


def _sets_unfit(node: ast.stmt) -> bool:
    """`pytestmark = …` of a kind that changes what a plain function does, or `__test__ = …`."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    if "__test__" in names or "disabled" in names:
        return True
    return "pytestmark" in names and bool(_UNFIT_MARKS.search(ast.unparse(node)))


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
