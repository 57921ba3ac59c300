"""The structure of the package: imports run down only, each group knows few libraries, and no file is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "memdfa_lab"
FILES = sorted(PACKAGE.rglob("*.py"))
# group -> what its files may import besides the standard library and the package
LIBRARIES = {
    "core": {"torch"},
    "rivals": {"torch"},
    "neighbours": {"torch"},
    "memory": {"torch", "numpy", "pandas", "sympy"},
    "lab": {"torch", "numpy", "pandas", "pydantic", "pydantic_core", "filelock", "torchvision", "mlxtend", "tqdm"},
}


def imported(source: str) -> set[str]:
    """Return the packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found - {"memdfa_lab"} - sys.stdlib_module_names


def test_imports_run_down_only_and_in_no_circle():
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.parametrize("group", LIBRARIES)
def test_a_group_imports_its_libraries_alone(group):
    for path in (PACKAGE / group).glob("*.py"):
        assert imported(path.read_text(encoding="utf-8")) <= LIBRARIES[group], path


def test_another_library_would_be_noticed():
    assert imported("import os\ndef f():\n    from numpy.linalg import qr") == {"numpy"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_file_is_too_long_to_be_read_at_once(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


def test_core_works_alone():
    """With the package's __init__ left out, core trains, and loads nothing but torch and what torch loads."""
    program = f"""
import sys, types, torch
before = set(sys.modules)
package = types.ModuleType("memdfa_lab")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["memdfa_lab"] = package
from functools import partial
from memdfa_lab.core.rules import RULES, MemDFA
assert {{name.partition(".")[0] for name in set(sys.modules) - before}} - sys.stdlib_module_names == {{"memdfa_lab"}}
torch.manual_seed(0)
net = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.long)
for rule in RULES.values():
    learner = rule(net(), partial(torch.optim.SGD, lr=0.1))
    losses = [learner.step(x, y) for _ in range(20)]
    assert losses[-1] < losses[0]
try:
    MemDFA(net(), partial(torch.optim.SGD, lr=0.1), keep_bytes=1)
except ValueError as problem:
    assert "memdfa_lab.memory" in str(problem)
else:
    raise AssertionError("nothing counts the bytes")
groups = {{name.split(".")[1] for name in sys.modules if name.startswith("memdfa_lab.")}}
assert groups == {{"core"}}, groups
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
