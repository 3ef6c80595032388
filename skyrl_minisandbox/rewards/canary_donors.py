"""Which tests a canary may borrow from, and what the statements of a test say.

A borrowed test runs twice. So it must seem to do nothing but compute: no assignment beyond local names, no word that
tells of state outside (`_IMPURE`), no fixture but such as are made anew for each test.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence

from skyrl_minisandbox.rewards.canary_places import Place, parameter_ids

_IMPURE = frozenset(
    re.findall(
        r"\w+",
        """
        acquire activate add_argument argv atexit browser cache cached call_command chdir clean clear client commit
        configure connect connection connections copyfile count_calls counter create current cursor cwd database db
        delattr delete deprecated destroy disable disconnect download emit enable environ exec exit file flush fork
        future gc getenv getrefcount global globals handler hash id import_module increment init install isolated kill
        load locals logger logging makedirs memo memoize migrate mkdir mktemp mock monkeypatch mutate next now open
        optimize os override patch patched pid popen port process publish put putenv queue rand randint random read
        reconnect redirect register registered registry release reload rename request requests reset resource restore
        rm rmtree run save schedule seed send serve server session set_ setattr setdefault setenv shuffle shutil
        signal skip sleep slow socket spawn stderr stdin stdout stop store subprocess sync sys temp tempfile thread
        threading threads time timeout timer timezone tmp tmpdir today touch track transaction truncate umask
        uninstall unlink unregister urlopen uuid wait warn warning warnings weakref worker write
        """,
    )
)
_RAISES = frozenset({"raises", "assertRaises", "assertRaisesRegex", "assertRaisesMessage", "assertRaisesRegexp"})
_EQUALS = frozenset({"assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assertTupleEqual"})
EQUAL_CALLS = ("assert_equal", "assert_equals", "assert_array_equal", "eq_")
_UNPLAIN = ast.Yield | ast.YieldFrom | ast.Await | ast.NamedExpr | ast.Global | ast.Nonlocal
_SHARED = re.compile(r"setup_?class|setup_?module|setUpTestData|scope *=", re.IGNORECASE)
_FIXTURE = ("pytest.fixture", "pytest.fixture()", "fixture", "fixture()")
# Fixtures that give back what they lend, and the words that are harmless with them.
_GRANTS = {
    "tmp_path": frozenset({"tmp", "open", "read", "write", "mkdir", "touch", "file", "path"}),
    "tmpdir": frozenset({"tmp", "tmpdir", "open", "read", "write", "mkdir", "file", "path"}),
    "monkeypatch": frozenset({"monkeypatch", "setattr", "setenv", "delattr"}),
    "capsys": frozenset({"stdout", "stderr", "write"}),
}
_LONGEST = 24  # statements of a test that is worth borrowing from


@dataclasses.dataclass
class DonorFile:
    """What the donors of one file share, looked for once however many classes it has. lines: without their ends."""

    module: ast.Module
    lines: Sequence[str]

    @functools.cached_property
    def shares_state(self) -> bool:
        """Whether its tests share objects that one of them may change for the others."""
        return any(_SHARED.search(line) for line in self.lines)

    @functools.cached_property
    def fixtures(self) -> frozenset[str]:
        """Fixtures that are made anew for each test."""
        own = [
            node.name
            for node in self.module.body
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(m) in _FIXTURE for m in node.decorator_list)
        ]
        return frozenset({*own, *_GRANTS})

    @functools.cached_property
    def has_algebra(self) -> bool:
        """Whether it imports a computer algebra system."""
        return any("sympy" in line for line in self.lines if "import" in line)

    @functools.cached_property
    def telling(self) -> list[ast.expr]:
        """Each particular value that one of its functions expects."""
        return [
            expected
            for function in functions(self.module)
            for node in function.body
            for expected in literals_expected(node)
            if is_telling(expected)
        ]


@dataclasses.dataclass
class Donors:
    """The tests of one place that may run twice."""

    place: Place
    file: DonorFile

    @functools.cached_property
    def passing(self) -> list[ast.FunctionDef]:
        """Those that are listed in pass-to-pass."""
        return [test for test in self._candidates if self._suits(test)]

    @functools.cached_property
    def has_passing(self) -> bool:
        """Whether there is one: for a file of many classes much cheaper than all of them."""
        return any(self._suits(test) for test in self._candidates)

    @functools.cached_property
    def has_raising(self) -> bool:
        """Whether one of them shows how the tested code raises an exception."""
        return any(
            any(uncaught(node) is not None for node in test.body) and self._suits(test) for test in self._candidates
        )

    @functools.cached_property
    def _candidates(self) -> list[ast.FunctionDef]:
        return [*self.place.passing, *(test for test in self.place.tests if self.ids_of(test))]

    @functools.cached_property
    def hidden(self) -> list[ast.FunctionDef]:
        """Those that are listed in fail-to-pass."""
        return [test for test in self.place.hidden if self._suits(test)]

    def arguments_of(self, test: ast.FunctionDef) -> tuple[str, ...]:
        """Names of the arguments, without a method's first."""
        return tuple(argument.arg for argument in test.args.args[1 if self.place.method else 0 :])

    def ids_of(self, test: ast.FunctionDef) -> tuple[str, ...]:
        return parameter_ids(test, self.place.parameters)

    def _suits(self, test: ast.FunctionDef) -> bool:
        method, ids = self.place.method, self.ids_of(test)
        arguments, given = test.args, self.arguments_of(test)
        if arguments.vararg or arguments.kwarg or arguments.posonlyargs or arguments.kwonlyargs or arguments.defaults:
            return False
        if (test.decorator_list and not ids) or len(test.body) > _LONGEST:
            return False
        if method and (not arguments.args or arguments.args[0].arg != method):
            return False
        if not ids and not {*given} <= self.file.fixtures:
            return False
        granted = frozenset().union(*(_GRANTS.get(name, ()) for name in given))
        if any(_parts(name) & _IMPURE - granted or name.startswith("_set") for name in identifiers(test)):
            return False
        statements = without_docstring(test)
        if method and self.file.shares_state and any(_uses(node, method) for node in statements):
            return False
        own = {node.id for node in ast.walk(test) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= set() if ids else {*given}
        return bool(statements) and all(self._plain(node, own) for node in statements) and self._on_own_lines(test)

    def _plain(self, node: ast.stmt, own: set[str]) -> bool:
        """Whether the statement does nothing but compute, bind local names and assert."""
        if any(isinstance(inner, _UNPLAIN) for inner in ast.walk(node)):
            return False
        match node:
            case ast.Assign():
                return all(_binds_locals(target, own) for target in node.targets)
            case ast.AugAssign():
                return _binds_locals(node.target, own)
            case ast.Assert() | ast.Import() | ast.ImportFrom():
                return True
            case ast.Expr(value=ast.Call(func=func, args=arguments) as call):
                name = _called_name(call)
                if name.startswith("assert") or name in _RAISES:
                    return True
                return any(_root(part) in own for part in (func, *arguments))
            case ast.For():
                inside = [*node.body, *node.orelse]
                return _binds_locals(node.target, own) and all(self._plain(inner, own) for inner in inside)
            case ast.With():
                if _is_raises(node):
                    return all(isinstance(inner, ast.Expr | ast.Assign) for inner in node.body)
                return all(self._plain(inner, own) for inner in node.body)
            case ast.If():
                return all(self._plain(inner, own) for inner in [*node.body, *node.orelse])
            case ast.FunctionDef():
                return not node.decorator_list
        return False

    def _on_own_lines(self, test: ast.FunctionDef) -> bool:
        before = test.lineno
        for node in test.body:
            if node.lineno <= before or (node.end_lineno or 0) < node.lineno:
                return False
            before = node.end_lineno or node.lineno
            tail = self.file.lines[before - 1].encode()[node.end_col_offset or 0 :].strip()
            if tail and not tail.startswith(b"#"):
                return False
        return True


def functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Those of the module and the methods of its classes."""
    for node in module.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield inner


def line_count(test: ast.FunctionDef) -> int:
    """Lines of its body, with those between."""
    return (test.end_lineno or test.lineno) - test.body[0].lineno + 1


def called(test: ast.AST) -> frozenset[str]:
    """Names of the functions and methods that are called in it, assertions left out."""
    names = set()
    for node in ast.walk(test):
        if isinstance(node, ast.Call):
            name = _called_name(node)
            if name and not name.startswith("assert") and name not in _RAISES:
                names.add(name)
    return frozenset(names)


def compared_calls(node: ast.stmt) -> list[ast.Call]:
    """The calls that the statement asserts to equal something."""
    return [side for side in _equation(node) if isinstance(side, ast.Call)]


def _equation(node: ast.stmt) -> list[ast.expr]:
    """The two sides of an equation that the statement asserts; none when it asserts no equation."""
    match node:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            return [left, right]
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name), args=[left, right, *_])) if name in _EQUALS:
            return [left, right]
        case ast.Expr(value=ast.Call(func=ast.Name(id=name), args=[left, right])) if name in EQUAL_CALLS:
            return [left, right]
    return []


def literals_expected(node: ast.stmt) -> list[ast.expr]:
    """The literal sides of an equation that the statement asserts; none when it asserts no equation."""
    pair = _equation(node)
    if not pair:
        return []
    fixed = [_is_literal(side) for side in pair]
    if not any(fixed):
        return [pair[1]] if is_formula(pair[1]) else []
    return [side for side, is_fixed in zip(pair, fixed, strict=True) if is_fixed] if sum(fixed) == 1 else []


def _is_literal(node: ast.expr) -> bool:
    kinds = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.USub, ast.Load)
    return all(isinstance(inner, kinds) for inner in ast.walk(node))


def is_telling(node: ast.expr) -> bool:
    """Whether a literal of one line is so particular that chance does not hit it."""
    if node.lineno != node.end_lineno:
        return False
    if isinstance(node, ast.UnaryOp) or (isinstance(node, ast.Constant) and not isinstance(node.value, str | bytes)):
        return False
    return 4 <= (node.end_col_offset or 0) - node.col_offset - 2 <= 60


def is_formula(node: ast.expr) -> bool:
    """Whether it is a sum, product or power with numbers in it and symbols that are neither zero nor endless.

    Only a computer algebra system gives such a thing back: there another number is another formula.
    """
    kinds = (ast.BinOp, ast.UnaryOp, ast.Name, ast.Constant, ast.operator, ast.unaryop, ast.Load)
    inside = list(ast.walk(node))
    return (
        isinstance(node, ast.BinOp)
        and all(isinstance(inner, kinds) and not isinstance(inner, ast.Mod | ast.FloorDiv) for inner in inside)
        and all(re.fullmatch(r"[a-z]\d?|pi|I|E", inner.id) for inner in inside if isinstance(inner, ast.Name))
    )


def differs(expected: ast.expr, changed: ast.Constant, new: object) -> bool:
    """Whether the literal means another value after the change of one of its constants."""
    if is_formula(expected):
        return True
    old = changed.value
    try:
        value = ast.literal_eval(expected)
        changed.value = new  # type: ignore[assignment]
        return bool(ast.literal_eval(expected) != value)
    except (ValueError, TypeError):
        return False
    finally:
        changed.value = old


def _called_name(call: ast.Call) -> str:
    func = call.func
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def _is_raises(node: ast.With) -> bool:
    if len(node.items) != 1 or node.items[0].optional_vars is not None:
        return False
    call = node.items[0].context_expr
    return isinstance(call, ast.Call) and _called_name(call) in _RAISES


def uncaught(node: ast.stmt) -> ast.expr | None:
    """The expression that the statement expects to raise."""
    match node:
        case ast.With(body=[ast.Expr(value=ast.Call() as call)]) if _is_raises(node):
            return call
        case ast.Expr(value=ast.Call(args=[_, target, *rest], keywords=keywords) as outer):
            name = _called_name(outer)
            if name in ("raises", "assertRaises") and isinstance(target, ast.Name | ast.Attribute):
                return ast.Call(func=target, args=rest, keywords=keywords)
            if name == "raises" and isinstance(target, ast.Lambda) and not target.args.args:
                return target.body
    return None


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _uses(node: ast.stmt, method: str) -> bool:
    """Whether anything but assertions of the test's object is used."""
    return any(
        isinstance(inner, ast.Attribute) and _root(inner) == method and not inner.attr.startswith("assert")
        for inner in ast.walk(node)
    )


def only_asserts(node: ast.stmt) -> bool:
    if isinstance(node, ast.For | ast.With):
        return all(only_asserts(inner) for inner in node.body) or (isinstance(node, ast.With) and _is_raises(node))
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call) and _called_name(node.value).startswith(("assert", "raises"))
    return isinstance(node, ast.Assert)


def _binds_locals(target: ast.expr, own: set[str]) -> bool:
    """Whether an assignment changes nothing but local names and what hangs on them."""
    if isinstance(target, ast.Tuple | ast.List):
        return all(_binds_locals(item, own) for item in target.elts)
    return isinstance(target, ast.Name) or _root(target) in own


def without_docstring(test: ast.FunctionDef) -> list[ast.stmt]:
    return test.body[1:] if ast.get_docstring(test, clean=False) is not None else test.body


def identifiers(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        match inner:
            case ast.Name():
                yield inner.id
            case ast.Attribute():
                yield inner.attr
            case ast.arg():
                yield inner.arg
            case ast.keyword():
                yield inner.arg or ""
            case ast.alias():
                yield inner.asname or inner.name
            case ast.FunctionDef() | ast.ClassDef():
                yield inner.name


def _parts(name: str) -> set[str]:
    return {name.lower(), *(part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name))}
