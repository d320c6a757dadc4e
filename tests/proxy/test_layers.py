"""The packages of ``proxy`` stand on each other in one order, which its docstring names."""

import ast
import re
from pathlib import Path

import proxy

FOLDER = Path(proxy.__file__).parent
LAYERS = ("ollama", "models", "gpus", "config", "wire", "plans", "launcher", "v1", "placing", "learning")


def test_the_docstring_names_every_package():
    named = re.findall(r"``([a-z0-9]+)``", proxy.__doc__.split(":\n\n", 1)[1])
    folders = {entry.parent.name for entry in FOLDER.glob("*/__init__.py")}
    assert [name for name in named if name in LAYERS] == list(LAYERS)
    assert folders == {*LAYERS, "simulator", "dashboard"}


def test_no_package_knows_a_later_one():
    found = []
    for number, layer in enumerate(LAYERS):
        later = tuple(f"proxy.{above}." for above in LAYERS[number + 1 :])
        for file in (FOLDER / layer).glob("*.py"):
            imports = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom))
            found += [f"{file.relative_to(FOLDER)}: {node.module}" for node in imports if str(node.module).startswith(later)]
    assert not found
