"""What a fresh clone, a lock file and a wheel are relied on for."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("build", "dev", "runtime")


def lock_text(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.lock").read_text()


def pins(name: str) -> dict[str, set[str]]:
    """``{project: {"version ; marker", …}}`` of a lock file."""
    found: dict[str, set[str]] = {}
    for project, version in re.findall(r"^([\w.-]+)==([^\\\n]+?) *\\?$", lock_text(name), re.MULTILINE):
        found.setdefault(canonicalize_name(project), set()).add(version.strip())
    return found


def asked_for(requirements: list) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in requirements if isinstance(line, str)}


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_in_a_lock_file_has_hashes_and_no_address(name):
    text = lock_text(name)
    requirements = re.split(r"\n(?=[\w])", text.split("\n", 2)[2])
    assert requirements
    assert all("--hash=sha256:" in requirement for requirement in requirements)
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--index|--find|--extra-index)", text, re.MULTILINE)


def test_the_locks_pin_everything_that_the_project_asks_for():
    runtime = asked_for(PROJECT["project"]["dependencies"])
    groups = PROJECT["dependency-groups"]
    assert runtime <= pins("runtime").keys(), "run make lock"
    assert runtime | asked_for(groups["dev"]) | asked_for(groups["build"]) <= pins("dev").keys(), "run make lock"
    assert asked_for(groups["build"]) <= pins("build").keys(), "run make lock"


def test_what_runs_and_builds_is_what_was_tested():
    tested = pins("dev")
    for name in ("build", "runtime"):
        assert all(tested[project] == versions for project, versions in pins(name).items()), "run make lock"


def test_a_wheel_holds_both_packages_with_their_data_and_the_command(tmp_path):
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    subprocess.run([*command, ROOT], check=True, env=quiet, timeout=60)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "lopsided = proxy.cli:main" in wheel.read(entry_points).decode()
    tracked = subprocess.run(["git", "ls-files", "planner", "proxy"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} <= names
    assert not any(name.startswith(("tests", "docker", "requirements")) for name in names)


def test_the_installed_version_is_the_projects():
    assert importlib.metadata.version("lopsided") == PROJECT["project"]["version"]


def test_make_names_every_target_that_people_are_told_of():
    answer = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10)
    for target in ("setup", "demo", "test", "lint", "types", "lock", "wheel"):
        assert f"make {target}" in answer.stdout


def test_the_setup_refuses_an_old_python_in_one_line(tmp_path):
    old = tmp_path / "python3"
    pretend = "import sys; sys.version_info = (3, 9, 2); exec(sys.argv[1])"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    old.chmod(0o755)
    clone = tmp_path / "clone"
    (clone / "requirements").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements/dev.lock"):
        (clone / name).write_bytes((ROOT / name).read_bytes())
    answer = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=clone, capture_output=True, text=True, check=False, timeout=10
    )
    assert answer.returncode == 2
    assert "lopsided needs Python 3.11 or newer" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (clone / ".venv").exists()


def shadowed(source: str) -> set[str]:
    """Names of a module that a comprehension in it gives to a variable of its own."""
    tree = ast.parse(source)
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            own |= {alias.asname or alias.name for alias in node.names}
    variables = (name for node in ast.walk(tree) if isinstance(node, ast.comprehension) for name in ast.walk(node.target))
    return {name.id for name in variables if isinstance(name, ast.Name)} & own


def test_no_comprehension_takes_the_name_of_a_function() -> None:
    """Python 3.12.1 then takes the one for the other in the next comprehension, which no other version shows."""
    modules = [path for part in ("planner", "proxy") for path in (ROOT / part).rglob("*.py")]
    assert {str(path): found for path in modules if (found := shadowed(path.read_text()))} == {}


def test_a_comprehension_that_takes_one_is_seen() -> None:
    assert shadowed("from a import role\ndef f():\n    return {role: 1 for role in (1, 2)}, [role(i) for i in (1, 2)]") == {
        "role"
    }
