"""Each object owns its state, as checked in the syntax trees of the library."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, TypeAlias

import pytest

import emitter_anyio

LIBRARY: Final = Path(emitter_anyio.__file__).parent

EXCEPTIONS: Final = {
    "*.__cause__": "Python documents that programs may set it",
    "*.__context__": "as __cause__",
    "*.__module__": "where users import a class from, which its definition cannot state",
    "*scope.deadline": "AnyIO moves the deadline of a cancel scope by assignment",
    "patience.deadline": "as above",
    "self._retrying.deadline": "as above",
    "self._group.cancel_scope.cancel": "AnyIO documents that a task group is cancelled this way",
    "error.strerror": "an OSError displays this attribute",
    "message.channel": "making a message without calling its class takes a third less",
    "message.binary": "as above",
    "argument.complete": "shtab documents that programs set it",
    "command._actions": "argparse has no public list of the arguments, and shtab reads this one",
    "arguments.source": "argparse fills its namespace by assignment, and so may its callers",
}
"""Expressions that the checks permit, with the reasons."""

MODULES: Final = sorted(LIBRARY.rglob("*.py"))
TREES: Final = {path: ast.parse(path.read_text()) for path in sorted(LIBRARY.rglob("*.py"))}
CLASSES: Final = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
}

Check: TypeAlias = Callable[[ast.Module], Iterator[ast.expr | ast.stmt]]


def foreign_private_names(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield each use of a private attribute of another object than self or cls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and not is_own(node):
            yield node


def foreign_assignments(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield each assignment to an attribute of another object than self or cls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and stores(node) and not is_own(node):
            yield node


def inherited_private_names(tree: ast.Module) -> Iterator[ast.expr | ast.stmt]:
    """Yield each use of a private name that the class does not define, or that a base defines."""
    for class_ in ast.walk(tree):
        if not isinstance(class_, ast.ClassDef):
            continue
        own, inherited = private_names(class_), inherited_names(class_)
        for node in body(class_):
            match node:
                case ast.Attribute(attr=name) if is_private(name) and is_own(node):
                    if name not in own or name in inherited:
                        yield node
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    if name in inherited:
                        yield node


def calls_through_others(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield each call of ``a.b.c.d()`` where ``a`` is neither a module nor a class."""
    not_objects = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    not_objects |= {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            steps, root = 0, node.func
            while isinstance(root, ast.Attribute):
                steps, root = steps + 1, root.value
            if steps >= 3 and isinstance(root, ast.Name) and root.id not in not_objects:
                yield node.func


CHECKS: Final[tuple[Check, ...]] = (
    foreign_private_names,
    foreign_assignments,
    inherited_private_names,
    calls_through_others,
)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_own(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def stores(node: ast.Attribute | ast.Name) -> bool:
    return not isinstance(node.ctx, ast.Load)


def body(class_: ast.ClassDef) -> Iterator[ast.AST]:
    """Yield all nodes of a class, without those of nested classes."""
    left: list[ast.AST] = [*class_.body]
    while left:
        node = left.pop(0)
        yield node
        if not isinstance(node, ast.ClassDef):
            left += ast.iter_child_nodes(node)


def private_names(class_: ast.ClassDef) -> set[str]:
    """Return the private attributes and methods that a class defines."""
    names = set()
    for node in body(class_):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.add(name)
            case ast.Attribute(attr=name) if stores(node) and is_own(node):
                names.add(name)
    for statement in class_.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= {
                node.id
                for node in ast.walk(statement)
                if isinstance(node, ast.Name) and stores(node)
            }
    return set(filter(is_private, names))


def inherited_names(class_: ast.ClassDef) -> set[str]:
    """Return the private names that bases of a class define, if these are in the library."""
    names = set()
    for base in class_.bases:
        while isinstance(base, ast.Subscript):
            base = base.value
        name = base.attr if isinstance(base, ast.Attribute) else ast.unparse(base)
        if (found := CLASSES.get(name)) is not None and found is not class_:
            names |= private_names(found) | inherited_names(found)
    return names


def exception_for(node: ast.AST) -> str | None:
    """Return the exception that permits an expression, if there is one."""
    text = ast.unparse(node)
    return next((pattern for pattern in EXCEPTIONS if fnmatchcase(text, pattern)), None)


def violations(check: Check, tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}"
        for node in check(tree)
        if exception_for(node) is None
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_objects_own_their_state(check: Check, path: Path) -> None:
    assert violations(check, TREES[path]) == []


def test_every_exception_is_needed() -> None:
    found = {
        exception_for(node) for check in CHECKS for tree in TREES.values() for node in check(tree)
    }
    assert EXCEPTIONS.keys() - found == set()


BASE = "class Base:\n def __init__(self):\n  self._a = 1\n def _b(self): ...\n"


@pytest.mark.parametrize(
    ("check", "source", "found"),
    [
        (foreign_private_names, "def f(x): return x._y", ["x._y"]),
        (foreign_private_names, "self._x._y.z()", ["self._x._y"]),
        (foreign_private_names, "super()._y()", ["super()._y"]),
        (foreign_private_names, "self._x.y(cls._z, __name__, x.__y__)", []),
        (foreign_assignments, "self._x.y += 1", ["self._x.y"]),
        (foreign_assignments, "a, x.y = b", ["x.y"]),
        (foreign_assignments, "with a as x[0].y: ...", ["x[0].y"]),
        (foreign_assignments, "del x.y", ["x.y"]),
        (foreign_assignments, "self.x = cls.y = x = y.z", []),
        (foreign_assignments, "self._scope.deadline = error.__cause__ = None", []),
        (calls_through_others, "self._x.y.z()", ["self._x.y.z"]),
        (calls_through_others, "def f(x): x.y.z.call()", ["x.y.z.call"]),
        (calls_through_others, "import x.y\nfrom a import b\nx.y.z.w(b.c.d.e())", []),
        (calls_through_others, "self._x.y(); self._x.y.z; f(x).y.z()", []),
        (inherited_private_names, "class C(Base):\n def f(self): self._x()", ["self._x"]),
        (inherited_private_names, "class C:\n def f(self): return cls._x", ["cls._x"]),
        (inherited_private_names, f"{BASE} def f(self): self._b(self._a)", []),
        (inherited_private_names, "class C:\n _x: int\n _y = 1\n def f(self): self._x", []),
    ],
)
def test_check_finds_violations(check: Check, source: str, found: list[str]) -> None:
    shown = [text.partition(": ")[2] for text in violations(check, ast.parse(source))]
    assert shown == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f(self): self._a", ["self._a"]),
        ("def f(self): self._a = 2", ["self._a"]),
        ("def _b(self): ...", ["def _b(self):"]),
        ("def f(self): self._c = 2", []),
    ],
)
def test_private_names_of_a_base_are_off_limits(
    monkeypatch: pytest.MonkeyPatch, source: str, found: list[str]
) -> None:
    [base] = ast.parse(BASE).body
    monkeypatch.setitem(CLASSES, "Base", base)
    tree = ast.parse(f"class Middle(Base): ...\nclass C(x.Middle[T]):\n {source}")
    middle = tree.body[0]
    monkeypatch.setitem(CLASSES, "Middle", middle)
    shown = [text.partition(": ")[2] for text in violations(inherited_private_names, tree)]
    assert shown == found
