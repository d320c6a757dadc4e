"""planner/ is a pure library: this reads its source, since an import alone proves nothing about what a function would do."""

import ast
import sys
from pathlib import Path

import pytest

PLANNER = Path(__file__).parents[2] / "planner"
MODULES = sorted(PLANNER.rglob("*.py"))

EFFECTS = frozenset(
    {"asyncio", "ctypes", "datetime", "http", "io", "logging", "os", "pathlib", "random", "secrets", "select", "shutil", "signal"}
    | {"socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib", "uuid", "warnings"}
)
"""Modules of the standard library through which a clock, the environment, a file, a socket or a log is reached."""

EFFECTFUL_BUILTINS = frozenset({"open", "print", "input", "exec", "eval", "compile", "__import__"})


def imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add("planner" if node.level else (node.module or "").partition(".")[0])
    return names


def test_there_is_something_to_check():
    assert PLANNER / "hardware.py" in MODULES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_a_module_imports_only_the_standard_library_and_planner(path):
    assert imports(ast.parse(path.read_text(encoding="utf-8"))) <= sys.stdlib_module_names | {"planner"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_a_module_reaches_no_clock_environment_file_socket_or_log(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imports(tree) & EFFECTS
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not calls & EFFECTFUL_BUILTINS


def test_the_check_sees_an_offender():
    tree = ast.parse("def f():\n    import httpx.client\n    from os import path\n")
    assert imports(tree) == {"httpx", "os"}
