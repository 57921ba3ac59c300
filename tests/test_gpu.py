"""What differs on an accelerator: its generator, streams, allocator and kernels. `make test-gpu` runs this file on one.

MEMDFA_TEST_DEVICE names the device: cuda, xpu, mps, or cpu, on which the tests can be tried out. Without it, and
without an accelerator, they run on the CPU as slow tests.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from problems import rotated
from reference import assert_identical
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.devices import accelerator, check_device, module_of
from memdfa_lab.core.generators import of_torch
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.example import example_step
from memdfa_lab.lab.offload import Host
from memdfa_lab.memory import Trace, accelerator_peak, measure
from memdfa_lab.memory.crosscheck import allocator_trace, handed_on_bytes, scratch_at_peak
from memdfa_lab.memory.events import Event
from memdfa_lab.neighbours.hbfp import InBlockFloat

ASKED = os.environ.get("MEMDFA_TEST_DEVICE")
DEVICE = ASKED or accelerator() or "cpu"
KIND = DEVICE.partition(":")[0]
try:
    check_device(DEVICE)
except ValueError as problem:
    pytest.skip(f"{problem} (MEMDFA_TEST_DEVICE=cpu tries the tests out)", allow_module_level=True)
pytestmark = [pytest.mark.slow] if DEVICE == "cpu" and not ASKED else []
on_accelerator = pytest.mark.skipif(KIND == "cpu", reason="needs an accelerator")
has_peak = pytest.mark.skipif(not hasattr(module_of(DEVICE), "max_memory_allocated"), reason=f"{KIND} keeps no peak")
has_streams = pytest.mark.skipif(KIND not in ("cuda", "xpu"), reason=f"{KIND} has no streams")

DENSE, IMAGES, NORMS = "784-[256]x4-10", "mnist_conv", "liao_cifar_bn"
DROPOUT = "[64 tanh dropout0.2]x3 classes@1x28x28"
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.002),
    "momentum": partial(torch.optim.SGD, lr=0.002, momentum=0.9, foreach=False),
    "adam": partial(torch.optim.Adam, lr=0.001, foreach=False),
}
FEEDBACK = ("stored", "regenerated", "shared")
BLOCK = 512 if KIND in ("cuda", "xpu") else 1  # the allocator gives out multiples of so many bytes


@pytest.fixture(autouse=True)
def _the_same_bits_each_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take kernels that add in one order; on a GPU products have float32's bits, not TF32's, anyway."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def trained(
    rule: str, network: str = DENSE, optimizer: str = "momentum", steps: int = 3, device: str = DEVICE, **options: Any
) -> tuple[Rule, list[Any]]:
    """Return a rule after some steps on one batch, and what came of it: losses, state and torch's generators."""
    torch.manual_seed(0)
    learner, x, y = example_step(rule, network, 32, OPTIMIZERS[optimizer], device=device, **options)
    return learner, learned(learner, x, y, steps)


def learned(rule: Rule, x: Tensor, y: Tensor, steps: int = 3) -> list[Any]:
    torch.manual_seed(1)
    losses = [rule.step(x, y) for _ in range(steps)]
    assert all(math.isfinite(loss) for loss in losses)
    state = {name: value.cpu() for name, value in rule.blocks.state_dict().items()}
    return [losses, state, {kind: get() for kind, (get, _) in of_torch(x.device).items()}]


# ---------------------------------------------------------------------------------------------------------- rules


@rotated("network optimizer feedback", [DENSE, IMAGES, NORMS, DROPOUT], OPTIMIZERS, FEEDBACK, turns=3)
def test_dfa_and_memdfa_learn_the_same_bit_for_bit(network, optimizer, feedback):
    (one, of_dfa), (other, of_memdfa) = (
        trained(rule, network, optimizer, feedback=feedback) for rule in ("dfa", "memdfa")
    )
    assert_identical(of_memdfa, of_dfa)
    assert all(parameter.device.type == KIND for rule in (one, other) for parameter in rule.blocks.parameters())


@rotated("rule network", ["bp", "fa", "memdfa", "local_readout", "mezo", "binomial"], [DENSE, IMAGES, DROPOUT])
def test_a_run_repeated_has_the_same_bits(rule, network):
    assert_identical(trained(rule, network)[1], trained(rule, network)[1])


@pytest.mark.parametrize("rule", ["activation_offload", "checkpoint_step_in_backward"])
def test_what_learns_as_bp_does_so_here(rule):
    assert_identical(trained(rule, IMAGES)[1][:2], trained("bp", IMAGES)[1][:2])


@pytest.mark.parametrize("network", [DENSE, IMAGES])
def test_memdfa_learns_as_on_the_cpu_with_the_same_b(network):
    (here, losses), (there, others) = (
        trained("memdfa", network, device=device, feedback="stored") for device in (DEVICE, "cpu")
    )
    torch.testing.assert_close(torch.stack(losses[0]).cpu(), torch.stack(others[0]), rtol=1e-3, atol=1e-4)
    ours, theirs = (rule.feedback.matrices for rule in (here, there))
    assert_identical({key: B.cpu() for key, B in ours.items()}, dict(theirs))


# ------------------------------------------------------------------------------------------------------ precision


@rotated("pass1 network", ["bfloat16", "int8", "6bit"], [DENSE, DROPOUT], turns=2)
def test_pass_1_in_few_bits_runs_in_them_and_dfa_and_memdfa_stay_equal(pass1, network):
    # A block that cannot would warn that it runs in float32, and a warning is an error here.
    assert_identical(trained("memdfa", network, pass1=pass1)[1], trained("dfa", network, pass1=pass1)[1])


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=on_accelerator)])
@pytest.mark.parametrize("rule", ["dfa", "memdfa"])
def test_a_precision_trains_near_float32_and_the_same_each_time(rule, precision):
    once, again = (trained(rule, optimizer="sgd", steps=6, precision=precision)[1] for _ in range(2))
    assert_identical(once, again)
    exact = trained(rule, optimizer="sgd", steps=6)[1]
    torch.testing.assert_close(torch.stack(once[0]).float(), torch.stack(exact[0]), rtol=0.05, atol=0.05)


# --------------------------------------------------------------------------------------------------------- memory


def in_blocks(trace: Trace) -> int:
    """Return the peak of a trace whose storages are rounded up to the allocator's blocks."""

    def rounded(event: Event) -> Event:
        size = -(-abs(event.change_bytes) // BLOCK) * BLOCK
        return Event(*(0.0, 0, "", "", None), math.copysign(size, event.change_bytes), event.storage)

    return Trace([rounded(event) for event in trace.events], {}).peak_bytes


@rotated("rule optimizer", ["bp", "fa", "dfa", "memdfa", "checkpoint_step_in_backward"], OPTIMIZERS, turns=2)
def test_the_ledger_is_the_prediction_and_the_allocator_within_its_rounding(rule, optimizer):
    learner, x, y = example_step(rule, DENSE, 64, OPTIMIZERS[optimizer], "stored", device=DEVICE)
    ledger = measure(learner, x, y, warm_up=1)
    build = partial(ml.models.build, DENSE)
    predicted = ml.memory.predict(rule, build, (64, 784), OPTIMIZERS[optimizer], ml.feedback.Stored())
    assert ledger.peak_bytes == predicted.peak_bytes
    # No storage here has 1 MiB: of larger blocks the allocator may leave a rest in use.
    allocator = allocator_trace(learner, x, y)
    handed_on, counted = handed_on_bytes(allocator), in_blocks(ledger)
    assert handed_on <= counted <= allocator.peak_bytes, scratch_at_peak(allocator)
    if optimizer != "adam":  # before torch 2.7 the profiler does not say which operation makes its temporaries
        assert handed_on == counted, scratch_at_peak(allocator)


@has_peak
@pytest.mark.parametrize("rule", ["bp", "memdfa"])
def test_the_allocators_own_peak_is_no_less_and_compare_has_it(rule):
    step = example_step(rule, DENSE, 64, feedback="stored", device=DEVICE)
    table = ml.memory.compare(*step).set_index("what")
    ledger, seen = table["bytes"]
    assert ledger <= in_blocks(measure(*step, warm_up=1)) <= seen == accelerator_peak(*step)


def test_memdfas_peak_does_not_grow_with_depth():
    peaks = [measure(*example_step("memdfa", f"784-[64]x{depth}-10", 32, device=DEVICE), warm_up=1) for depth in (4, 9)]
    assert peaks[0].peak_bytes == peaks[1].peak_bytes


# ---------------------------------------------------------------------------------------------------- weights elsewhere


def of_a_host(network: str, optimizer: str, feedback: str, ahead: int) -> tuple[Rule, Tensor, Tensor]:
    """Return a rule whose weights rest in the machine's memory, with a batch."""
    learner, x, y = example_step("memdfa", network, 32, OPTIMIZERS[optimizer], feedback)
    store = Host(DEVICE, ahead=ahead)
    rule = ml.MemDFA(learner.blocks, OPTIMIZERS[optimizer], learner.loss_fn, learner.feedback, offload=store)
    return rule, x.to(DEVICE), y.to(DEVICE)


@rotated("optimizer feedback ahead", OPTIMIZERS, FEEDBACK[:2], (0, 1, 3), turns=2)
def test_training_from_the_machines_memory_is_that_in_the_devices(optimizer, feedback, ahead):
    torch.manual_seed(0)
    rule, x, y = of_a_host(DENSE, optimizer, feedback, ahead)
    torch.manual_seed(1)
    losses = [rule.step(x, y) for _ in range(3)]
    there = trained("memdfa", DENSE, optimizer, feedback=feedback)[1]
    ours = {name: value.cpu() for name, value in rule.store.state_dict().items()}
    assert_identical([losses, ours], there[:2])


def test_stochastic_errors_of_block_floating_point_draw_new_noise_in_each_step():
    layer = InBlockFloat(torch.nn.Linear(20, 30), ml.precision.BlockFloat(4, "stochastic")).to(DEVICE)
    h, s = torch.randn(50, 20, device=DEVICE), torch.randn(50, 30, device=DEVICE)
    found = [torch.autograd.grad(layer(h), layer.layer.bias, s)[0] for _ in range(2)]
    assert not torch.equal(*found)


@has_streams
def test_copies_overlap_with_computation():
    rule, x, y = of_a_host("784-[1024]x8-10", "sgd", "stored", 1)
    rule.step(x, y)
    with profile(activities=[ProfilerActivity.CPU, getattr(ProfilerActivity, KIND.upper())]) as profiler:
        rule.step(x, y)
        module_of(DEVICE).synchronize()
    events = [event for event in profiler.events() if event.device_type.name.lower() == KIND]
    copies = [event.time_range for event in events if event.name.startswith("Memcpy")]
    kernels = [event.time_range for event in events if not event.name.startswith("Mem")]
    assert any(one.start < other.end and other.start < one.end for one in copies for other in kernels)


# ----------------------------------------------------------------------------------------------------------- runs


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(data, tmp_path):
    def run(epochs: int, file: str) -> list[Any]:
        torch.manual_seed(0)
        rule = ml.experiments.make_rule("memdfa", DROPOUT, data, optimizer="momentum", device=DEVICE)
        torch.manual_seed(1)  # what a run that goes on finds in the checkpoint is another state
        metrics = {"cross_entropy": torch.nn.functional.cross_entropy}
        history = ml.fit(rule, data, epochs, 50, checkpoint=tmp_path / file, progress=False, metrics=metrics)
        state = {name: value.cpu() for name, value in rule.blocks.state_dict().items()}
        return [history.table["loss"].tolist(), history.table["test_accuracy"].tolist(), state]

    whole = run(2, "whole.pt")
    run(1, "parts.pt")
    assert_identical(run(2, "parts.pt"), whole)


COMMANDS = {
    "train": "--network 784-[8]x2-10 --epochs 1 --batch-size 500 --out {out}",
    "profile": "--network 784-[8]x2-10 --batch 8 --rules bp memdfa",
    "bench": "--network 784-[8]x2-10 --batch 8 --rules memdfa --pass1 bfloat16 --rounds 1 --out {out}",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run_on_the_device(command, capsys, tmp_path):
    assert cli.main([command, "--device", DEVICE, *COMMANDS[command].format(out=tmp_path).split()]) == 0
    shown = capsys.readouterr()
    assert "memdfa" in shown.out
    if command == "bench":
        assert set(pd.read_csv(tmp_path / "bench.csv")["device"]) == {DEVICE}


@pytest.mark.skipif(KIND != "cpu" and torch.accelerator.device_count() < 2, reason="needs two devices")
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_ranks_train_as_one_process(tmp_path):
    losses = []
    for ranks in (1, 2):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        how = f"--device {KIND} {COMMANDS['train'].format(out=tmp_path / str(ranks))}"
        command = [sys.executable, *torchrun, "-m", "memdfa_lab", "train", *how.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        losses.append(pd.read_csv(tmp_path / str(ranks) / "memdfa" / "history.csv")["loss"].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
