"""Windows, macOS and accelerators, as far as they can be tried here: what they lack is taken away, or stood in for."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from reference import assert_identical, refuses
from torch import Tensor

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.batch import headless, notebooks
from memdfa_lab.core import compat, devices
from memdfa_lab.lab import host_memory, machines, tensor_files
from memdfa_lab.lab.files import file_name

# ------------------------------------------------------------------------------------------------ Windows and macOS

WITHOUT_POSIX = """
import os, pkgutil, signal, sys
import pandas, pydantic, sympy, torch, tqdm, torchvision, matplotlib.pyplot, papermill, ipywidgets, distributed
import torch.distributed.nn, torch.profiler
of_os = "fork getuid kill pread preadv pwrite sched_getaffinity setsid sysconf"
for module, names in ((os, of_os), (signal, "SIGKILL SIGALRM")):
    for name in names.split():
        delattr(module, name)
sys.modules.update(dict.fromkeys(("grp", "pwd", "resource", "termios")))
import memdfa_lab
for module in pkgutil.walk_packages(memdfa_lab.__path__, "memdfa_lab."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
from memdfa_lab import cli
from memdfa_lab.batch import notebooks, sweep_run
assert notebooks.cores() >= 1 and sweep_run.KILLED == -9
train = "train --rule memdfa --network 784-[8]x2-10 --epochs 1 --batch-size 1000 --out run"
sys.exit(cli.main(train.split()) or cli.main([*train.split(), "--offload", "weights"]))
"""


@pytest.mark.slow
def test_all_modules_load_and_a_run_works_without_what_posix_alone_has(tmp_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "memdfa" / "history.csv").exists()


def test_what_is_flushed_is_open_for_writing_and_parts_are_no_larger_than_a_system_takes(monkeypatch, tmp_path):
    fcntl, flags = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(os, "fsync", lambda file: flags.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    monkeypatch.setattr(tensor_files, "MOST_AT_ONCE", 7)
    tensors = {"a": torch.arange(12.0), "b": torch.ones(3, 2, dtype=torch.int64)}
    tensor_files.write(tmp_path / "file", tensors, sync=True)
    tensor_files.sync(tmp_path / "file")
    assert os.O_RDONLY not in flags
    assert_identical(tensor_files.read(tmp_path / "file"), tensors)


def test_a_folder_on_another_drive_is_named_from_its_root(monkeypatch, tmp_path):
    assert headless._seen_from(tmp_path, tmp_path / "runs" / "one") == os.path.join("runs", "one")

    def none(path: Any, start: Any) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(headless.os.path, "relpath", none)
    assert headless._seen_from(tmp_path, tmp_path / "runs") == str(tmp_path / "runs")


def test_a_run_of_any_network_has_a_folder_with_a_name_for_every_system():
    assert file_name("nets:small@3x2x2-C:\\data?") == "nets_small@3x2x2-C__data_"
    assert file_name("[500 relu]x2 classes-mnist5k-seed0") == "[500 relu]x2 classes-mnist5k-seed0"


def test_threads_are_met_as_they_end():
    threads: list[Future[int]] = [Future() for _ in range(3)]
    for number, thread in enumerate(threads[:2]):
        thread.set_result(number)
    found = notebooks.completed(threads)
    assert {next(found).result(), next(found).result()} == {0, 1}
    threads[2].set_result(2)
    assert [thread.result() for thread in found] == [2]


def test_a_console_without_a_sign_shows_its_number(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", console)
    assert cli.main(["train", "--network", "σ"]) == 2
    console.flush()
    assert b"\\u03c3" in console.buffer.getvalue()


def test_bytes_that_the_system_does_not_count_are_not_read(monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "COUNTS", tmp_path / "io")
    assert machines._sent_bytes() == 0


# ----------------------------------------------------------------------------------------------------- accelerators


@pytest.fixture
def two_xpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_a_device_is_taken_where_torch_finds_it(two_xpus):
    assert devices.accelerator() == "xpu"
    assert [devices.check_device(name) for name in ("cpu", "xpu", "xpu:1")] == ["cpu", "xpu", "xpu:1"]
    for name in ("xpu:2", "cuda", "cpu:1", "meta"):
        with refuses(ValueError, f"device '{name}' is not there: use cpu, or one from xpu:0 to xpu:1"):
            devices.check_device(name)
    with refuses(ValueError, "unknown device 'gpu': use cpu, or the name that torch has for yours"):
        devices.check_device("gpu")


@pytest.mark.parametrize("command", ["train", "profile", "bench"])
@pytest.mark.parametrize(("device", "why"), [("gpu", "unknown device 'gpu'"), ("cuda:77", "'cuda:77' is not there")])
def test_every_command_refuses_a_device_that_is_not_there_in_a_line(command, device, why, capsys):
    assert cli.main([command, "--network", "784-[8]x2-10", "--device", device]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert why in said.err


def test_a_prediction_is_of_no_device(two_xpus, capsys):
    assert cli.main(["profile", "--predict", "--device", "xpu"]) == 2
    assert "leave it out with --predict" in capsys.readouterr().err


def test_int8_products_are_filled_up_to_what_cuda_takes(monkeypatch):
    shapes, plain = [], torch._int_mm

    def as_cuda(one: Tensor, other: Tensor) -> Tensor:
        shapes.append((*one.shape, *other.shape))
        assert len(one) > 16
        assert not any(size % 8 for size in (one.shape[1], *other.shape))
        return plain(one, other)

    monkeypatch.setattr(torch, "_int_mm", as_cuda)
    for N, K, M in ((5, 33, 10), (32, 784, 10), (17, 8, 8)):
        one, other = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((N, K), (M, K)))
        assert torch.equal(compat._filled_up(one, other.t()), plain(one, other.t()))
    assert shapes[-1] == (17, 8, 8, 8)


class Streams:
    """torch.cuda's part with streams: it notes what waits for what, and computes at once."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = "compute"

    def Stream(self, device: Any) -> Any:
        return Stream(self, "copy")

    def current_stream(self, device: Any) -> Any:
        return Stream(self, self.now)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.name
        yield
        self.now = before


class Stream:
    def __init__(self, of: Streams, name: str):
        self.of, self.name = of, name

    def wait_stream(self, other: Any) -> None:
        self.of.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.of.log.append(f"all wait for {self.name}")


def test_a_host_store_copies_on_a_stream_of_its_own(monkeypatch):
    streams, empty = Streams(), torch.empty
    monkeypatch.setattr(host_memory, "module_of", lambda device: streams)
    monkeypatch.setattr(host_memory, "check_device", lambda device: device)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **how: empty(*size, **how))
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: streams.log.append(f"{stream.name} uses it"))
    make: Callable[[], Any] = partial(ml.models.mlp, 8, [8] * 3, 3)
    store = ml.offload.Host("cpu:0")  # what the CPU is not called by `Host`, and has no copies of its own on
    rule = ml.MemDFA(store.build(make, 1), partial(torch.optim.SGD, lr=0.1, momentum=0.9), offload=store)
    x, y = torch.randn(4, 8), torch.arange(4) % 3
    streams.log.clear()
    losses = [rule.step(x, y) for _ in range(3)]
    first = streams.log.index("compute waits for copy")
    assert "copy waits for compute" in streams.log[:first], "a block is read when what was asked before is done"
    assert streams.log[first + 1] == "compute uses it"
    assert "all wait for copy" in streams.log, "what lies on the CPU is copied by the processor"
    plain = ml.offload.Host("cpu")
    same = ml.MemDFA(plain.build(make, 1), partial(torch.optim.SGD, lr=0.1, momentum=0.9), offload=plain)
    assert_identical(losses, [same.step(x, y) for _ in range(3)])
