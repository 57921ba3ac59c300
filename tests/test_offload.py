"""Offloaded training: the numbers of training in memory, bit for bit, and a folder that is never half a network."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import starmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torchvision
from problems import BY_NAME, OPTIMIZERS, STORAGES, Problem, Record, make_rule, params, record, rotated
from reference import FAULTS, assert_identical, assert_same_training, refuses
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.feedback import Regenerated, Stored
from memdfa_lab.core.rules import MemDFA
from memdfa_lab.core.seeds import mix
from memdfa_lab.core.store import TEACH
from memdfa_lab.core.watcher import has_data
from memdfa_lab.lab import models, tensor_files, terminal
from memdfa_lab.lab.check import check
from memdfa_lab.lab.evaluation import predict
from memdfa_lab.lab.fit import fit
from memdfa_lab.lab.offload import Disk, Host
from memdfa_lab.memory.ledger import measure

MLP, ADAMW = BY_NAME["mlp_relu"], OPTIMIZERS["adamw"]
ROOT = Path(__file__).resolve().parent.parent


def train(rule: Any, problem: Problem, steps: int = 4) -> Record:
    """Train as problems.train does, and bring in all blocks for the record."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = [rule.step(x, y) for x, y in problem.batches(steps)]
        assert not rule.store.offloads or not any(map(has_data, rule.blocks.parameters()))
        return recorded(losses, rule)


def recorded(losses: list[Tensor], rule: Any) -> Record:
    with ExitStack() as all_in:
        for i in range(len(rule.chain)):
            all_in.enter_context(rule.store.block(i, TEACH))
        return record(losses, rule.blocks, rule.optimizers)


@rotated("problem optimizer storage ahead", params(), OPTIMIZERS, STORAGES, (1, 0, 2))
def test_offloaded_training_is_that_in_memory_bit_for_bit(problem, optimizer, storage, ahead, tmp_path):
    with Disk(tmp_path, ahead=ahead, commit_every=(2, 3, None)[ahead]) as store:
        rule = make_rule("memdfa", problem, optimizer, storage, offload=store)
        assert_same_training(train(rule, problem), train(make_rule("memdfa", problem, optimizer, storage), problem))


@rotated("problem optimizer storage", params(), OPTIMIZERS, STORAGES)
def test_so_is_training_from_host_memory(problem, optimizer, storage):
    rules = [make_rule("memdfa", problem, optimizer, storage, **more) for more in ({"offload": Host("cpu")}, {})]
    assert_same_training(*(train(rule, problem) for rule in rules))


class OwnLoss(nn.Module):
    """A loss that learns: a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits * self.scale, y)


@rotated(
    "options problem storage",
    [{"clip_global_norm": 0.5}, {"clip_norm": 0.1}, {"precision": "bfloat16"}, {"loss_fn": OwnLoss}],
    [BY_NAME["everything"], MLP],
    ["stored", "regenerated"],
)
def test_so_is_it_with_other_options_of_the_rule(options, problem, storage, tmp_path):
    def made(**more: Any) -> Any:
        given = {name: value() if name == "loss_fn" else value for name, value in options.items()} | more
        return MemDFA(problem.build(), ADAMW, feedback=STORAGES[storage](seed=3), **given)

    with Disk(tmp_path) as store:
        assert_same_training(train(made(offload=store), problem), train(made(), problem))


def test_a_block_has_data_while_it_is_in_use_alone_and_prediction_brings_blocks_in(tmp_path):
    with Disk(tmp_path, ahead=2) as store:
        rule, inside = make_rule("memdfa", MLP, ADAMW, offload=store), []
        before = list(map(id, rule.blocks.parameters()))
        for block in rule.chain:
            block.register_forward_pre_hook(
                lambda *given: inside.append([has_data(next(b.parameters())) for b in rule.chain])
            )
        for x, y in MLP.batches(2):
            rule.step(x, y)
        assert all(map(sum, inside))
        assert max(map(sum, inside)) == 1
        state = [value for o in rule.optimizers for s in o.state.values() for value in s.values()]
        assert len(state) == 3 * len(before)
        assert not any(map(has_data, [*state, *rule.feedback.matrices.values(), *rule.blocks.parameters()]))
        assert list(map(id, rule.blocks.parameters())) == before
        twin = make_rule("memdfa", MLP, ADAMW)
        for x, y in MLP.batches(2):
            twin.step(x, y)
        assert torch.equal(predict(rule, MLP.x), predict(twin, MLP.x))
        assert check(rule, MLP.x, MLP.y)["difference"].max() == 0
        assert_identical(dict(store.state_dict()), dict(twin.blocks.state_dict()))


# --------------------------------------------------------------------------------------- models made block by block


class OwnUnit(nn.Module):
    """A unit whose initial values come from functions of torch.nn.init, factories, arithmetic, views and a cast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        nn.init.orthogonal_(self.linear.weight)
        nn.init.trunc_normal_(self.linear.bias, std=0.02)
        self.scale = nn.Parameter(0.1 * torch.randn(8) + 1 - self.linear.bias.detach())
        self.table = nn.Embedding(32, 8, padding_idx=0)
        nn.init.zeros_(self.table.weight[1:3])
        self.register_buffer("steps", torch.arange(8).to(torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h) * self.scale + self.steps


def _head(first: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(first(), nn.Linear(8, 5))


MAKES = {
    "own_model": lambda: models.mlp(8, [8, 8], 5, batch_norm=True),
    "network": lambda: models.build("fc_sigmoid", (1, 2, 4), classes=5),
    "problem": BY_NAME["everything"].make,
    "unit": _head(OwnUnit),
    "torchvision": lambda: nn.Sequential(torchvision.models.resnet18(num_classes=8), nn.Linear(8, 5)),
}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_each_block_is_initialised_by_itself_as_its_constructor_does_it(make, tmp_path):
    generator = torch.get_rng_state()
    with Disk(tmp_path / "a", commit_every=None) as store, Disk(tmp_path / "b", commit_every=None) as again:
        net = store.build(make, seed=5)
        again.build(make, seed=5)
        assert torch.equal(torch.get_rng_state(), generator)
        assert not any(map(has_data, [*net.parameters(), *net.buffers()]))
        built, plain = dict(store.state_dict()), make()
        assert_identical(built, dict(again.state_dict()))
    if make is MAKES["unit"]:
        assert [not row.any() for row in built["0.table.weight"]] == [True] * 3 + [False] * 29
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in plain.parameters()]
    for value, like in zip(built.values(), plain.state_dict().values(), strict=True):
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        if like.dim() == 0 or not like.is_floating_point() or like.std() == 0:
            assert torch.equal(value, like)
        elif like.numel() > 200:
            assert value.double().std() == pytest.approx(like.double().std().item(), rel=0.2)
            assert not torch.equal(value, like)


def test_the_numbers_of_a_block_follow_from_its_seed_and_number_alone(tmp_path):
    with Disk(tmp_path, commit_every=None) as store:
        store.build(lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), seed=7)
        built = dict(store.state_dict())
    for i, sizes in enumerate([(8, 6), (6, 5)]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(7, i))
            assert_identical(
                {f"{i}.{name}": v for name, v in nn.Linear(*sizes).state_dict().items()},
                {name: v for name, v in built.items() if name.startswith(f"{i}.")},
            )


def test_a_state_dict_is_loaded_block_by_block_and_training_goes_on_from_it(tmp_path):
    problem = BY_NAME["everything"]
    torch.save(problem.build().state_dict(), tmp_path / "state.pt")
    with Disk(tmp_path / "w") as store:
        net = store.load(problem.make, torch.load(tmp_path / "state.pt", mmap=True))
        rule = MemDFA(net, ADAMW, problem.loss, Stored(seed=3), offload=store)
        assert_same_training(train(rule, problem), train(make_rule("memdfa", problem, ADAMW), problem))


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(scale)


class Untracked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(8, 8), torch.ones(8)


def _shared() -> nn.Module:
    return nn.Linear(8, 8, bias=bool(torch.ones(1) + 1))


@pytest.mark.parametrize(
    ("make", "hints"),
    [
        (_head(lambda: Scaled(torch.empty(8))), ("0.scale", "store.load")),
        (_head(lambda: Scaled(torch.randn(8, generator=torch.Generator()))), ("0.scale", "store.load")),
        (_head(_shared), ("does not run without data", "MemDFA")),
        (_head(Untracked), ("0.table", "register it")),
        (MLP.build(), ("function",)),
    ],
)
def test_a_model_that_cannot_be_made_block_by_block_is_refused_in_a_line(make, hints, tmp_path):
    with Disk(tmp_path) as store:
        with refuses(TypeError if isinstance(make, nn.Module) else ValueError, *hints):
            store.build(make)
        assert [path.name for path in tmp_path.iterdir()] == [".network.pt.lock"]


def test_the_optimizers_state_counts_when_the_disk_is_looked_at(tmp_path, monkeypatch):
    with Disk(tmp_path) as store:
        blocks = store.build(MLP.make)
        weights = sum(4 * p.numel() for p in blocks.parameters())
        monkeypatch.setattr(Disk, "free_bytes", 4 * weights)  # state twice is what Adam needs, and its numbers of steps
        with refuses(ValueError, "the optimizer's state takes", "bytes free"):
            MemDFA(blocks, ADAMW, offload=store)
        MemDFA(blocks, SGD, offload=store)
    model = MLP.build()
    with Disk(tmp_path / "of a model") as store, refuses(ValueError, "the network takes", "bytes free"):
        MemDFA(model, ADAMW, offload=store)
    assert all(map(has_data, model.parameters()))


# ------------------------------------------------------------------------------------------- never half a network


NET, SGD = partial(models.mlp, 8, [9, 7], 5, batch_norm=True), OPTIMIZERS["momentum"]


def opened(folder: Path, **options: Any) -> tuple[Disk, Any]:
    """Go on with the network in the folder, or begin."""
    store = Disk(folder, **options)
    return store, MemDFA(store.build(NET), SGD, feedback=Stored(seed=3), offload=store)


def advance(rule: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step))
        rule.step(x, torch.arange(6) % 5)


def assert_goes_on(folder: Path, least: int = 0, more: int = 2) -> int:
    """Go on from the folder, and compare with a run that was never cut; return at which step the folder was."""
    shutil.copytree(folder, again := folder.with_name("again"))
    with opened(again, commit_every=5)[0] as store:
        rule = store._network().rule
        was = store.steps
        assert was >= least
        advance(rule, range(was, was + more))
        cut = recorded([], rule)
    with opened(folder.with_name("whole"), commit_every=None)[0] as store:
        rule = store._network().rule
        advance(rule, range(was + more))
        assert_same_training(cut, recorded([], rule))
    shutil.rmtree(again)
    shutil.rmtree(folder.with_name("whole"))
    return was


ENDLESS = """
import sys, itertools
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_offload import *
store, rule = opened(Path(sys.argv[2]), commit_every=int(sys.argv[3]))
print("ready", flush=True)
advance(rule, itertools.count(store.steps))
"""


def test_files_are_the_same_where_the_system_has_neither_pwrite_nor_preadv(monkeypatch, tmp_path):
    tensors = {"a": torch.randn(300, 1000), "b": torch.arange(3), "none": torch.empty(0)}
    tensor_files.write(tmp_path / "here", tensors, sync=True)
    for name in ("pwrite", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    tensor_files.write(tmp_path / "there", tensors, sync=True)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert_identical(tensor_files.read(tmp_path / "there"), tensors)


@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_last_commit_is_there(tmp_path):
    was, folder, moments = 0, tmp_path / "w", random.Random(20)
    for kill in range(4 * FAULTS):
        call = [sys.executable, "-c", ENDLESS, str(ROOT), str(folder), str(1 + kill % 2)]
        with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0.01, 0.4))
            process.send_signal(signal.SIGKILL)
        was = assert_goes_on(folder, least=was)
    assert was > 0


def test_after_a_power_cut_at_any_write_the_last_commit_is_there(tmp_path, monkeypatch):
    """Of what was written, only what had been synced is there; of names, only those of a synced folder."""
    folder, content, named, cuts = tmp_path / "w", {}, {}, []
    fsync, pwrite, replace = os.fsync, os.pwrite, Path.replace

    def name_of(file: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{file}"))

    def cut() -> None:
        if not cuts or cuts[-1] != named:
            cuts.append(dict(named))

    def sync(file: int) -> None:
        fsync(file)
        path = name_of(file)
        if path == folder:
            named.update({p: content[p] for p in folder.iterdir() if p in content})
        else:
            content[path] = path.read_bytes()
            named.update({path: content[path]} if path in named else {})
        cut()

    def write(file: int, data: Any, at: int) -> int:
        path = name_of(file)
        if path in named:
            named[path] = b"torn" + named[path][: len(data) // 2]
        cut()
        return pwrite(file, data, at)

    def rename(path: Path, target: Path) -> Path:
        content[Path(target)] = content.pop(path)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(Path, "replace", rename)
    with opened(folder, ahead=0, commit_every=2)[0] as store:
        advance(store._network().rule, range(4))
    monkeypatch.undo()
    states, found = {}, set()
    with opened(tmp_path / "whole", commit_every=None)[0] as store:
        for step in range(5):
            states[step] = recorded([], store._network().rule)
            advance(store._network().rule, range(step, step + 1))
    for number, files in enumerate(cuts):
        (then := tmp_path / f"cut{number}" / "w").mkdir(parents=True)
        for path, data in files.items():
            (then / path.name).write_bytes(data)
        if then / "network.pt" in then.iterdir():
            with opened(then, ahead=0, commit_every=99)[0] as store:
                assert_same_training(recorded([], store._network().rule), states[store.steps])
                found.add(store.steps)
    assert found == {0, 2, 4}


@pytest.mark.parametrize(("ahead", "commit_every"), [(0, 1), (1, 2), (2, None)])
def test_a_full_disk_is_said_in_a_line_and_leaves_the_last_commit(ahead, commit_every, tmp_path, monkeypatch):
    store, rule = opened(tmp_path / "w", ahead=ahead, commit_every=commit_every)
    advance(rule, range(2))
    pwrite, left = os.pwrite, iter(range(3))

    def full(file: int, data: Any, at: int) -> int:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[: len(data) // 2] or data, at)

    monkeypatch.setattr(os, "pwrite", full)
    with refuses(OSError, "No space left", "w/block_0", "the beginning" if commit_every is None else "step 2"):
        advance(rule, range(2, 9))
    monkeypatch.undo()
    with refuses(RuntimeError, "No space left"):
        advance(rule, range(2, 3))
    store.close()
    if commit_every is None:
        with refuses(ValueError, "in the middle of a step", "commit_every=1"):
            Disk(tmp_path / "w")
    else:
        assert assert_goes_on(tmp_path / "w") == 2


def test_a_disk_that_fills_up_in_earnest(tmp_path):
    (small := tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        store, rule = opened(small / "w")
        with store, refuses(OSError, "No space left", "step 0"):
            advance(rule, range(9))
        shutil.copytree(small / "w", tmp_path / "w")
    finally:
        subprocess.run(["umount", "--lazy", small], check=True)
    assert assert_goes_on(tmp_path / "w") == 0


def _cut(folder: Path) -> None:
    path = folder / torch.load(folder / "network.pt")["blocks"][1]
    os.truncate(path, path.stat().st_size - 4)


def _garbled(folder: Path) -> None:
    (folder / torch.load(folder / "network.pt")["blocks"][1]).write_bytes(b"garbage" * 9)


def _flipped(folder: Path) -> None:
    data = bytearray((folder / "network.pt").read_bytes())
    data[data.index(b"Linear")] ^= 1
    (folder / "network.pt").write_bytes(data)


def _of_another_version(folder: Path) -> None:
    torch.save(torch.load(folder / "network.pt") | {"format": 1}, folder / "network.pt")


@pytest.mark.parametrize(
    ("change", "make", "optimizer", "seed", "hints"),
    [
        (_cut, NET, SGD, 3, ("block_00001", "damaged", "bytes of")),
        (_garbled, NET, SGD, 3, ("block_00001", "damaged")),
        (_flipped, NET, SGD, 3, ("network.pt", "damaged", "another folder")),
        (_of_another_version, NET, SGD, 3, ("network.pt", "another version", "another folder")),
        (None, partial(models.mlp, 8, [9, 6], 5, batch_norm=True), SGD, 3, ("another network", "7", "6")),
        (None, NET, ADAMW, 3, ("optimizer", "AdamW", "SGD")),
        (None, NET, SGD, 4, ("feedback", "'seed': 4")),
    ],
    ids=["cut", "garbled", "flipped", "another version", "network", "optimizer", "feedback"],
)
def test_a_folder_that_does_not_fit_is_refused_and_left_as_it_is(change, make, optimizer, seed, hints, tmp_path):
    with opened(tmp_path)[0] as store:
        advance(store._network().rule, range(1 if change is None else 0))
    if change is not None:
        change(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with refuses(ValueError, *hints), Disk(tmp_path) as store:
        MemDFA(store.build(make), optimizer, feedback=Stored(seed=seed), offload=store)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_in_use_or_cannot_be_offloaded_is_refused_in_a_line(tmp_path):
    model = MLP.build()
    with refuses(ValueError, "file"):
        (tmp_path / "file").write_text("")
        Disk(tmp_path / "file")
    for wrong in ({"ahead": -1}, {"commit_every": 0}):
        with refuses(ValueError, next(iter(wrong))):
            Disk(tmp_path / "w", **wrong)
    with opened(tmp_path / "w")[0] as store:
        rule = store._network().rule
        with refuses(ValueError, "another run is writing"):
            Disk(tmp_path / "w")
        with refuses(ValueError, "its own store"):
            MemDFA(rule.blocks, SGD, offload=store)
        with refuses(TypeError, "cannot be copied"):
            __import__("copy").deepcopy(store)
        for touch in (rule.blocks, lambda x: rule.state_dict()["blocks"]["0.1.weight"].sum()):
            with refuses(RuntimeError, "rests in", "offload=store"):
                touch(torch.ones(2, 8))
        with refuses(ValueError, "store.load"):
            rule.load_state_dict(rule.state_dict())
        rule.loss_fn = lambda logits, y: nn.functional.cross_entropy(logits, y) + rule.blocks[0][1].weight.sum()
        with refuses(ValueError, "rests in"):
            rule.step(torch.ones(3, 8), torch.arange(3))
    with refuses(RuntimeError, "is closed"):
        advance(rule, range(1))
    with Disk(tmp_path / "w") as store, refuses(ValueError, "holds a network already", "store.build"):
        MemDFA(model, SGD, offload=store)
    with Disk(tmp_path / "v") as store:
        for name in ("bp", "fa", "dfa", "checkpoint", "step_in_backward", "last_layer"):
            with refuses(ValueError, "cannot offload", "MemDFA"):
                make_rule(name, MLP, offload=store)
        with refuses(TypeError, "ml.offload.Disk"):
            MemDFA(model, SGD, offload=str(tmp_path))
        with refuses(ValueError, "keep_bytes"):
            MemDFA(model, SGD, offload=store, keep_bytes=9)
        model[0].view_of_weight = model[0].weight.detach()
        with refuses(ValueError, "view_of_weight", "in forward"):
            MemDFA(model, SGD, offload=store)
        assert has_data(model[0].weight)
        with refuses(RuntimeError, "no network yet"):
            store.commit()


def test_weights_that_the_disk_has_no_room_for_are_refused_before_anything_is_written(tmp_path):
    vast = partial(models.mlp, 8, [2**20] * 4, 5)  # twelve TiB, of which there is nothing in memory
    with Disk(tmp_path) as store, refuses(ValueError, "bytes free", "commit_every=None"):
        store.build(vast)
    assert [path.name for path in tmp_path.iterdir()] == [".network.pt.lock"]


def test_an_error_while_a_block_is_taught_ends_the_store_and_leaves_the_last_commit(tmp_path):
    store, rule = opened(tmp_path / "w")
    advance(rule, range(2))
    hook = rule.optimizers[1].register_step_pre_hook(lambda *given: 1 / 0)
    with refuses(ZeroDivisionError):
        advance(rule, range(2, 3))
    hook.remove()
    with refuses(RuntimeError, "interrupted", "step 2"):
        advance(rule, range(2, 3))
    store.close()
    assert assert_goes_on(tmp_path / "w") == 2


def test_what_is_not_finite_changes_nothing_and_the_next_step_goes_on(tmp_path):
    with opened(tmp_path / "w")[0] as store:
        rule = store._network().rule
        with refuses(FloatingPointError, "NaN"):
            rule.step(torch.full((3, 8), torch.nan), torch.arange(3))
        with refuses(ValueError, "labels are"):
            rule.step(torch.ones(3, 8), torch.ones(3, 2))
        advance(rule, range(2))
    assert assert_goes_on(tmp_path / "w") == 2


def test_other_tools_open_the_files_and_each_dtype_and_layout_comes_back(tmp_path):
    numbers = {
        str(dtype): torch.arange(6).view(2, 3).to(dtype) for dtype in tensor_files.DTYPES.values() if dtype.itemsize
    } | {"strided": torch.arange(6.0).view(2, 3).t(), "scalar": torch.tensor(3.5), "empty": torch.empty(0, 3)}
    size = tensor_files.write(tmp_path / "file", numbers, sync=False)
    assert size == (tmp_path / "file").stat().st_size
    back = tensor_files.read(tmp_path / "file")
    safetensors = pytest.importorskip("safetensors.torch")
    theirs = safetensors.load_file(tmp_path / "file")
    for name, value in numbers.items():
        for read in (back[name], theirs[name]):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            assert torch.equal(
                read.contiguous().reshape(-1).view(torch.uint8), value.contiguous().reshape(-1).view(torch.uint8)
            )
    safetensors.save_file({"x": torch.ones(3)}, tmp_path / "theirs", {"text": "a"})
    assert torch.equal(tensor_files.read(tmp_path / "theirs")["x"], torch.ones(3))


@pytest.mark.parametrize("commit_every", [1, 2, None])
def test_fit_goes_on_from_the_folder_as_if_it_had_never_stopped(commit_every, tmp_path):
    problem, settings = BY_NAME["dropout"], {"epochs": 3, "batch_size": 4, "progress": False}
    settings |= {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), "test": None}
    data = problem.x.repeat(3, 1, 1, 1), problem.y.repeat(3)

    def fitted(store: Disk | None, stop_after_step: float = math.inf, **more: Any) -> tuple[Any, Any]:
        options = {"offload": store} if store is not None else {}
        net = store.build(problem.make) if store is not None else problem.make()
        rule = MemDFA(net, ADAMW, feedback=Regenerated(seed=3), **options)
        if store is None:  # it begins where the other one does
            with Disk(tmp_path / "again") as begun:
                begun.build(problem.make)
                rule.blocks.load_state_dict(begun.state_dict())
        steps, error = itertools.count(1), rule.error

        def cut(logits: Tensor, y: Tensor) -> Any:
            if next(steps) > stop_after_step:
                raise ZeroDivisionError("cut")
            return error(logits, y)

        rule.error = cut
        torch.manual_seed(9)
        return rule, fit(rule, data, **settings, **more)

    with torch.random.fork_rng(devices=[]):
        plain, wanted = fitted(None)
        for stop in (1, 4):
            with Disk(tmp_path / "w", commit_every=commit_every) as store, refuses(ZeroDivisionError):
                fitted(store, stop, checkpoint=tmp_path / "w")
            if commit_every is None:
                shutil.rmtree(tmp_path / "w")
        with Disk(tmp_path / "w", commit_every=commit_every) as store:
            assert store.steps == {1: 5, 2: 4, None: 0}[commit_every]
            rule, history = fitted(store, checkpoint=tmp_path / "w")
            same = fit(rule, data, **settings, checkpoint=tmp_path / "w")
            assert_same_training(recorded([], rule), recorded([], plain))
    for found in (history, same):
        pd.testing.assert_frame_equal(*(one.table.drop(columns="seconds") for one in (found, wanted)), check_exact=True)


@pytest.mark.parametrize(
    ("more", "hints"),
    [
        ({"checkpoint": "elsewhere.pt"}, ("rests in", "checkpoint=")),
        ({"stop_after": 1}, ("stop_after", "offload")),
    ],
)
def test_fit_says_what_goes_without_offload_alone(more, hints, tmp_path):
    with opened(tmp_path / "w")[0] as store, refuses(ValueError, *hints):
        fit(store._network().rule, (torch.ones(6, 8), torch.arange(6) % 5), 1, 3, **more)


def test_the_command_goes_on_from_its_folder_and_refuses_what_is_not_for_it(tmp_path, capsys):
    def run(*more: str) -> str:
        common = [
            "--network",
            "[8 relu]x2 classes",
            "--dataset",
            "mnist5k",
            "--batch-size",
            "1000",
            "--out",
            tmp_path / "out",
        ]
        status = cli.main(["train", *map(str, common), "--offload", str(tmp_path / "w"), *more])
        text = capsys.readouterr()
        return text.err if status else text.out

    begun = run("--epochs", "1")
    takes = 2 * sum(4 * p.numel() for p in models.build("[8 relu]x2 classes", (1, 28, 28)).parameters()) / 2**10
    found = re.search(r"training begins; it takes about ([\d.]+) KiB of \S+ GiB free", begun)
    assert takes <= float(found[1]) < 1.2 * takes, begun  # with B
    assert "resumes from step 4;" in run("--epochs", "2", "--commit-every", "1")
    for more in (["--rule", "all"], ["--overwrite"]):
        assert "--offload is for --rule memdfa in one process" in run("--epochs", "2", *more)
    with Disk(tmp_path / "w") as store:
        assert store.steps == 8


COUNTED = {
    "mlp": (partial(models.mlp, 20, [300, 300, 30], 5), (20,)),
    "conv": (partial(models.build, "mnist_conv"), (1, 28, 28)),
}


@pytest.mark.parametrize(("optimizer", "storage"), list(zip(OPTIMIZERS, STORAGES, strict=True)))
@pytest.mark.parametrize("net", COUNTED)
def test_a_prediction_counts_what_comes_in_as_a_measured_step_does(net, optimizer, storage, tmp_path):
    (make, shape), optimizer, kind = COUNTED[net], OPTIMIZERS[optimizer], STORAGES[storage]
    with Disk(tmp_path, ahead=0, commit_every=None) as store:
        rule = MemDFA(store.build(make), optimizer, feedback=kind(), offload=store)
        traces = [measure(rule, torch.randn(6, *shape), torch.arange(6) % 5, warm_up=1)]
    traces.append(ml.memory.predict("memdfa", make, (6, *shape), optimizer, kind(), offload=Host("cpu", ahead=0)))
    for trace in traces:
        assert set(trace.resting_by_category) == {"input"} | ({"feedback"} if storage == "shared" else set())
        assert {"parameters"} <= set(trace.timeline["category"])
    values = [(t.peak_bytes, t.held_bytes, t.offloaded_bytes, sorted(t.changes.tolist())) for t in traces]
    assert values[0] == values[1]
    in_memory = ml.memory.predict("memdfa", make, (6, *shape), optimizer, kind())
    rests = in_memory.resting_bytes - traces[0].resting_bytes
    assert values[0][2] == rests
    assert f"{ml.memory.trace.readable(rests)} in a store" in repr(traces[0])


def test_a_step_that_reads_ahead_is_not_counted(tmp_path):
    with opened(tmp_path)[0] as store, refuses(ValueError, "ahead=0"):
        measure(store._network().rule, torch.ones(3, 8), torch.arange(3))


def test_a_long_step_says_which_block_it_is_at(monkeypatch):
    shown: list[str] = []
    bar = SimpleNamespace(disable=False, set_postfix_str=shown.append)
    rule = make_rule("memdfa", MLP)
    monkeypatch.setattr(terminal.time, "monotonic", itertools.count().__next__)
    with terminal.BlockShown(bar, len(rule.chain)):
        rule.step(MLP.x, MLP.y)
    rule.step(MLP.x, MLP.y)
    n = len(rule.chain)
    for name in ("forward", "local gradient"):
        assert [text for text in shown if text.startswith(name)] == [
            f"{name}, block {i} of {n}" for i in range(1, n + 1)
        ]


# ------------------------------------------------------------------------------------------------- one sweep a step


@rotated("problem optimizer ahead", params(), OPTIMIZERS, (None, 0, 1, 2))
def test_a_sweep_has_the_numbers_of_steps_bit_for_bit(problem, optimizer, ahead, tmp_path):
    options = {} if ahead is None else {"offload": Disk(tmp_path, ahead=ahead, commit_every=2)}
    more = {"pass1": "int8"} if ahead == 1 and problem.x.dtype == torch.float32 else {}
    rule, twin = (make_rule("memdfa", problem, optimizer, **given, **more) for given in (options, {}))
    wanted = train(twin, problem, 5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        assert_same_training(recorded(list(rule.sweep(problem.batches(5))), rule), wanted)


def test_batches_are_drawn_in_a_sweep_as_between_steps_and_the_losses_learn_in_turn(tmp_path):
    problem = BY_NAME["dropout"]

    def drawn() -> Any:
        for _ in range(4):
            yield torch.randn(6, *problem.shape) + random.random(), problem.y

    found = []
    for sweeps in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            random.seed(4)
            rule = MemDFA(problem.build(), ADAMW, OwnLoss(), Stored(seed=3))
            losses = list(rule.sweep(drawn()) if sweeps else (rule.step(x, y) for x, y in drawn()))
            found.append(record(losses, nn.ModuleList([rule.blocks, rule.loss_fn]), [*rule.optimizers]))
    assert_same_training(*found)


def test_what_a_batch_is_refused_for_comes_after_the_batch_before_has_been_learned(tmp_path):
    good = MLP.x, MLP.y
    for bad in ((MLP.x * torch.nan, MLP.y), (MLP.x[:, :3], MLP.y)):
        rule, twin = make_rule("memdfa", MLP), make_rule("memdfa", MLP)
        losses = rule.sweep([good, bad])
        assert torch.equal(next(losses), twin.step(*good))
        with refuses((FloatingPointError, RuntimeError), "no weight was changed"):
            next(losses)
        assert_identical(dict(rule.blocks.state_dict()), dict(twin.blocks.state_dict()))
    assert list(make_rule("memdfa", MLP).sweep([])) == []
    for options in ({"clip_global_norm": 1.0}, {"keep_bytes": math.inf}):
        with refuses(ValueError, "visits each block once"):
            next(make_rule("memdfa", MLP, **options).sweep([good]))
    found = []
    for sweeps in (False, True):
        noisy = make_rule("memdfa", MLP)
        noisy.loss_fn = lambda logits, y: nn.functional.cross_entropy(logits + torch.randn(()), y)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            batches = MLP.batches(3)
            found.append(recorded(list(noisy.sweep(batches) if sweeps else starmap(noisy.step, batches)), noisy))
    assert_same_training(*found)  # it takes steps


def test_a_sweep_reads_and_writes_each_weight_once_a_step(tmp_path, monkeypatch):
    moved, write_at, read_at = [0, 0], tensor_files._write_at, tensor_files._read_at

    def count(which: int, move: Callable[..., Any], data: int) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            moved[which] += len(args[data])
            return move(*args)

        return counted

    monkeypatch.setattr(tensor_files, "_read_at", count(0, read_at, 2))
    monkeypatch.setattr(tensor_files, "_write_at", count(1, write_at, 2))
    with Disk(tmp_path, ahead=0, commit_every=None) as store:
        net = store.build(partial(models.mlp, 200, [200] * 7, 5))
        rule = MemDFA(net, OPTIMIZERS["sgd"], offload=store, feedback=Regenerated())
        weights = sum(4 * p.numel() for p in net.parameters())
        batch = torch.randn(6, 200), torch.arange(6) % 5
        losses, found = rule.sweep(itertools.repeat(batch)), []
        for _ in range(3):
            moved[:] = 0, 0
            next(losses)
            found.append([number / weights for number in moved])
        losses.close()
        assert found[-1] == pytest.approx([1, 1], abs=0.05)
        moved[:] = 0, 0
        rule.step(*batch)
        assert moved[0] / weights == pytest.approx(2, abs=0.05)
