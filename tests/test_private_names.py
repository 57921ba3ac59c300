"""torch's private names stand in core/compat.py and core/watcher.py, and nowhere else in the package."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memdfa_lab

PACKAGE = Path(memdfa_lab.__file__).parent


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


KINDS: list[Any] = [torch, torch.cuda.memory, Tensor, torch.UntypedStorage, nn.Linear(1, 1), torch.autograd.Function]
KINDS += [torch.optim.SGD([torch.ones(1)], lr=0.1), torch.ones(1, requires_grad=True).exp().grad_fn]
OF_TORCH = {name for kind in KINDS for name in dir(kind) if is_private(name)}
OF_OTHERS = {"_replace", "_exit"}  # of a named tuple, of os


def is_torchs(node: ast.AST, own: set[str]) -> bool:
    """Tell whether a node imports or uses a private name of torch; `own` are the names that the package defines."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        words = re.findall(r"\w+", ast.unparse(node))
        return "torch" in words and any(map(is_private, words))
    if isinstance(node, ast.Constant):  # as in mock.patch("torch.utils._x")
        return re.match(r"torch\.[\w.]*\b_", str(node.value)) is not None
    if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) != "self":
        return node.attr in OF_TORCH or node.attr not in own | OF_OTHERS
    return False


def private_names(*sources: str) -> list[str]:
    """Return each use of a private name of torch."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return [ast.unparse(node) for node in nodes if is_torchs(node, own)]


def test_no_private_name_of_torch_is_used_elsewhere():
    files = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert len(private_names(files.pop("core/compat.py"))) > 20
    assert len(private_names(files.pop("core/watcher.py"))) > 10
    assert private_names(*files.values()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from torch._C import _autograd",
        "from torch.nn.modules.conv import _ConvNd",
        "import torch.utils._pytree as pytree",
        "x._version",
        "torch._foreach_add_(x, 1)",
        "module._buffers['a'] = self._buffers",
        "mock.patch('torch.optim.optimizer._get_value')",
    ],
)
def test_a_private_name_would_be_noticed(source):
    assert len(private_names(source)) == 1
    assert private_names("class A:\n    def _f(self): return self._f, other._f, os._exit") == []
