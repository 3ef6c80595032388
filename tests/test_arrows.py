"""Arrows between rooms point one way. Held over every import, lazy and annotation-only ones too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import skyrl_minisandbox

PACKAGE = Path(skyrl_minisandbox.__file__).resolve().parent
NAME = "skyrl_minisandbox"

# From the top down: a room may import rooms of lines below its own, and itself.
LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"cli"}),
    frozenset({"training"}),
    frozenset({"env"}),
    frozenset({"cluster"}),
    frozenset({"placement"}),
    frozenset({"node", "own_ray"}),
    frozenset({"worker"}),
    frozenset({"rollout"}),
    frozenset({"belongings"}),
    frozenset({"turn"}),
    frozenset({"scaffolds", "rewards"}),
    frozenset({"policies", "images"}),
    frozenset({"sandbox"}),
)
# Plain data, open to every room but sandbox; what each of them may import in turn.
PLAIN: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "record": frozenset(),
    "plugins": frozenset({"errors"}),
    "claims": frozenset(),
    "alarms": frozenset(),
    "waiting_line": frozenset({"errors"}),
    "channel": frozenset({"errors"}),
    "config": frozenset({"errors", "sandbox.spec"}),
    "tasks": frozenset({"errors", "record", "plugins", "config", "images.recipe", "images.sources"}),
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(name: str) -> str:
    """`skyrl_minisandbox.images.cache` -> `images`; the package itself -> ``."""
    return name.split(".")[1] if "." in name else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that a file imports, wherever the import stands."""
    here = module_name(path)
    package = here if path.name == "__init__.py" else here.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if is_module(full) else base


def is_module(name: str) -> bool:
    if not name.startswith(NAME):
        return False
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported`, both of this package."""
    source, target = room_of(importer), room_of(imported)
    if target == "":
        return source in ("", "cli", "training")
    if source in ("", target):
        return True
    if source in PLAIN:
        tail = imported.removeprefix(f"{NAME}.")
        return any(tail == one or tail.startswith(f"{one}.") for one in PLAIN[source])
    if source == "sandbox":
        return target == "errors"
    if source == "images" and target == "tasks":
        return False
    if target in PLAIN:
        return True
    return level(source) < level(target)


def level(room: str) -> int:
    for number, rooms in enumerate(LEVELS):
        if room in rooms:
            return number
    raise AssertionError(f"`{room}` is no room of the design: give it a line in LEVELS or PLAIN")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
        for line, name in imports(path)
        if name.split(".")[0] == NAME and not allowed(module_name(path), name)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", sorted((PACKAGE / "sandbox").rglob("*.py")), ids=lambda path: path.name)
def test_the_sandbox_needs_the_standard_library_only(path: Path) -> None:
    wrong = [
        f"{path.name}:{line} imports {name}"
        for line, name in imports(path)
        if name.split(".")[0] not in sys.stdlib_module_names | {NAME}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rule_itself_catches_what_it_is_for() -> None:
    assert not allowed(f"{NAME}.sandbox.sandbox", f"{NAME}.images.recipe")
    assert not allowed(f"{NAME}.sandbox.sandbox", f"{NAME}.record")
    assert not allowed(f"{NAME}.images.build", f"{NAME}.tasks.task")
    assert not allowed(f"{NAME}.tasks.pypi", f"{NAME}.images.build")
    assert not allowed(f"{NAME}.rewards.grade", f"{NAME}.scaffolds.gold")
    assert not allowed(f"{NAME}.node", f"{NAME}.cluster")
    assert not allowed(f"{NAME}.env", f"{NAME}.cli.main")
    assert allowed(f"{NAME}.tasks.pypi", f"{NAME}.images.sources")
    assert allowed(f"{NAME}.rollout", f"{NAME}.rewards.grade")
    assert allowed(f"{NAME}.cli.rollout", f"{NAME}.sandbox")


def test_a_lazy_relative_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / NAME
    (root / "images").mkdir(parents=True)
    (root / "tasks").mkdir()
    module = root / "images" / "build.py"
    module.write_text("def f():\n    from ..tasks import task\n    from . import store\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", root)
    assert list(imports(module)) == [(2, f"{NAME}.tasks"), (3, f"{NAME}.images")]
