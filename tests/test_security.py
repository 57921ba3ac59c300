"""Files from elsewhere run no code; long use leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import os
import re
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from problems import BY_NAME, RULE_NAMES, make_rule
from reference import refuses
from test_notebooks import PATHS, QUICK

import memdfa_lab as ml

PACKAGE = Path(ml.__file__).parent


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_is_loaded_without_running_code(tmp_path):
    data = ml.datasets.load("mnist5k").subset(20, 20)
    rule = ml.BP(ml.models.build("fc_relu"), partial(torch.optim.SGD, lr=0.1))
    torch.save({"format": 1, "settings": {}, "rule": Evil(tmp_path / "folder")}, tmp_path / "run.pt")
    with refuses(ValueError, "damaged or not a file of memdfa_lab"):
        ml.fit(rule, data, 1, checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("key", [*ml.datasets.KEYS, "test_exact"])
def test_an_npz_is_loaded_without_running_code(key, tmp_path):
    x, y = np.arange(2 * 16, dtype=np.uint8).reshape(2, 4, 4), np.array([0, 1])
    arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y, "test_exact": y == y}
    np.savez(tmp_path / "d.npz", **arrays)
    ml.datasets.load(tmp_path / "d.npz")
    evil = np.empty(2, dtype=object)
    evil[:] = [Evil(tmp_path / "folder")] * 2
    np.savez(tmp_path / "d.npz", allow_pickle=True, **{**arrays, key: evil})
    with refuses(ValueError, "d.npz"):
        ml.datasets.load(tmp_path / "d.npz")
    assert not (tmp_path / "folder").exists()


# Unpickling, shells and unpacking that the package would have to do itself; torchvision unpacks what it downloads.
DANGEROUS = (
    r"shell=True|os\.system|allow_pickle=True|weights_only=False|pickle\.loads?\(|extractall|YAML\((?!typ=.safe.)"
    r"|\beval\("
)


def test_the_package_runs_no_shell_and_no_pickle():
    for file in PACKAGE.rglob("*.py"):
        assert set(re.findall(DANGEROUS, file.read_text(encoding="utf-8"))) <= {"eval("}, file


# ---------------------------------------------------------------------------------------------------------- long use


def in_use() -> tuple[int, int, int]:
    """Return resident bytes, living tensors and open files."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return pages * os.sysconf("SC_PAGE_SIZE"), tensors, len(os.listdir("/proc/self/fd"))


def assert_flat(use, times: int, warm_up: int) -> None:
    for _ in range(warm_up):
        use()
    resident, tensors, files = in_use()
    for _ in range(times):
        use()
    resident_after, tensors_after, files_after = in_use()
    print(f"{times} times: {resident / 2**20:.1f} -> {resident_after / 2**20:.1f} MiB, {tensors_after} tensors")
    assert resident_after - resident < 8 * 2**20
    assert tensors_after == tensors
    assert files_after == files


STEPS = int(os.environ.get("MEMDFA_STEPS", "500"))  # 20000 in make test-deep
CALLS = STEPS // 100  # of measure and predict: 200 there
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_many_steps_leave_nothing_behind(rule):
    problem = BY_NAME["mlp_relu"]
    learner = make_rule(rule, problem, partial(torch.optim.SGD, lr=1e-4, momentum=0.9), "regenerated")
    x, y = problem.x, problem.y
    assert_flat(lambda: learner.step(x, y), STEPS, 100)


@LINUX
@pytest.mark.slow
def test_many_predictions_and_measurements_leave_nothing_behind():
    """Of many shapes: what predictions remember of each other is bounded."""
    problem, sizes = BY_NAME["conv_pool"], itertools.count(2)
    learner = make_rule("memdfa", problem, "momentum")

    def use() -> None:
        ml.memory.measure(learner, problem.x, problem.y)
        ml.memory.predict("memdfa", lambda: ml.models.mlp(20, [next(sizes)] * 3, 4), (8, 20))

    assert_flat(use, CALLS, 20)


# Jupyter keeps what each cell has put out, and ipywidgets each widget.
IN_USE = """
import ctypes, gc, os, sys, ipywidgets, torch
ipywidgets.Widget.close_all()
get_ipython().displayhook.flush()
gc.collect()
getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free and not yet given back is not in use
pages = int(open('/proc/self/statm').read().split()[1])
tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
print(pages * os.sysconf('SC_PAGE_SIZE'), tensors, len(os.listdir('/proc/self/fd')))
"""


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("path", [PATHS[1]] if CALLS < 200 else PATHS, ids=lambda path: path.stem)
def test_a_notebook_run_again_and_again_in_one_kernel_leaves_nothing_behind(path, tmp_path):
    has = papermill.inspect_notebook(str(path))
    given = {name: value for name, value in QUICK.items() if name in has} | {"out": str(tmp_path)}
    notebook = parameterize_notebook(load_notebook_node(str(path)), given)
    asks = nbformat.v4.new_code_cell(IN_USE)
    found = []
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    with client.setup_kernel():
        for _ in range(3 + max(2, CALLS // 50)):
            for place, cell in enumerate(notebook.cells):
                client.execute_cell(cell, place)
            notebook.cells.append(asks)
            client.execute_cell(asks, len(notebook.cells) - 1)
            notebook.cells.pop()
            found.append([int(number) for number in asks.outputs[0].text.split()])
    print(path.stem, found)
    assert found[-1][0] - found[2][0] < 16 * 2**20
    assert found[-1][1:] == found[2][1:]
