"""The ledger for every rule: it changes nothing, survives exceptions, is flat for MEM-DFA."""

from __future__ import annotations

import re
import threading
from functools import partial
from itertools import takewhile

import pandas as pd
import pytest
import torch
from problems import BY_NAME, EVERY_RULE, STORAGES, make_rule, params, rotated, train
from reference import assert_same_training
from test_memory import TINY_BATCH, account, events, tiny, tiny_net
from torch import Tensor

import memdfa_lab as ml
from memdfa_lab.core import phases
from memdfa_lab.core.watcher import watchers
from memdfa_lab.memory import Ledger, measure, predict, readable

STEADY = {  # lr 0: very deep nets blow up at once, and how much a step needs does not depend on it
    "sgd": partial(torch.optim.SGD, lr=0.0),
    "momentum": partial(torch.optim.SGD, lr=0.0, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.0),
}


def assert_torch_is_clean() -> None:
    assert watchers() == ()
    assert phases.listeners == []


# --------------------------------------------------------------------------------------- all rules, all problems


def stepping_measured(rule: ml.Rule) -> ml.Rule:
    """Return the rule, with a step that is measured each time."""
    step = rule.step

    def step_measured(x: Tensor, y: Tensor) -> Tensor:
        losses: list[Tensor] = []
        measure(lambda x, y: losses.append(step(x, y)), x, y, tensors=rule.tensors)
        return losses[0]

    rule.step = step_measured
    return rule


@rotated("problem rule", params(), EVERY_RULE)
def test_training_under_the_ledger_is_bit_identical(problem, rule):
    plain, measured = (make_rule(rule, problem, "adamw") for _ in range(2))
    assert_same_training(train(plain, problem), train(stepping_measured(measured), problem))


@rotated("problem rule", params(), ["bp", "fa"])
def test_the_backward_pass_is_told_apart_by_block(problem, rule):
    learner = make_rule(rule, problem)
    sizes = [{p.numel() * p.element_size() for p in block} for block in learner.parameters]
    trace = measure(learner, problem.x, problem.y, warm_up=1)
    born = [e for e in trace.events if e.phase == "backward" and e.change_bytes > 0]
    gradients = [e for e in born if e.storage.category == "gradients"]
    assert all(e.block is not None for e in born)
    assert all(e.storage.size_bytes in sizes[e.block] for e in gradients)
    assert {e.block for e in gradients} == {i for i, block in enumerate(learner.parameters) if block}
    blocks = [e.block for e in born]
    assert blocks == sorted(blocks, reverse=True)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_category_is_what_the_rule_says_it_is(storage):
    problem = BY_NAME["mlp_relu"]
    learner = make_rule("memdfa", problem, "adamw", storage)
    trace = measure(learner, problem.x, problem.y, warm_up=1)
    resting = {name: sum(4 * tensor.numel() for tensor in tensors) for name, tensors in learner.tensors().items()}
    resting["input"] = 4 * 6 * 8 + 8 * 6
    assert trace.resting_by_category == {name: size for name, size in resting.items() if size}
    drawn = trace.by_category.get("feedback", pd.Series([0])).max()
    assert drawn == {"stored": 0, "regenerated": 4 * 5 * 12}.get(storage, drawn)


def test_the_copy_of_a_shared_matrix_is_feedback():
    trace = predict("memdfa", lambda: ml.models.mlp(8, [16], 5), (3, 8), feedback=ml.feedback.Shared())
    assert trace.by_category["feedback"].max() == 4 * 5 * 16


# --------------------------------------------------------------------------------------------- when a step fails


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_an_exception_leaves_an_account_and_torch_clean(rule):
    learner = EVERY_RULE[rule](tiny_net(2), STEADY["sgd"])
    right = account(measure(learner, *TINY_BATCH, warm_up=1))
    failing = learner.chain[1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"), Ledger(learner.tensors) as ledger:
        learner.step(*TINY_BATCH)
    assert_torch_is_clean()
    forward = list(takewhile(lambda row: row[:2] != ("forward", 1), right))
    trace = ledger.trace()
    assert account(trace)[: len(forward)] == forward
    assert trace.peak_bytes == trace.timeline["total_bytes"].max() == trace.at_peak()["bytes"].sum() > 0
    with pytest.raises(RuntimeError, match="in the middle"):
        measure(learner, *TINY_BATCH)
    assert_torch_is_clean()
    failing.remove()
    assert account(measure(learner, *TINY_BATCH)) == right


def fails(*given: object) -> None:
    raise RuntimeError("in the middle")


def test_nothing_is_noted_after_the_end():
    kept: list[Tensor] = []
    with Ledger() as ledger:
        kept.append(torch.ones(10))
    before = events(ledger.trace())
    kept.clear()
    torch.ones(10)
    assert events(ledger.trace()) == before
    assert ledger.trace().end_bytes == 40


# ---------------------------------------------------------------------------------------------- how it is shown


def test_to_csv_and_reprs(tmp_path):
    trace = tiny("memdfa")
    trace.to_csv(tmp_path / "deep" / "trace.csv")
    read = pd.read_csv(tmp_path / "deep" / "trace.csv", keep_default_na=False)
    for column in ("bytes", "operation", "storage", "total_bytes", "category", "phase"):
        assert read[column].tolist() == trace.timeline[column].tolist()
    text, html = repr(trace), trace._repr_html_()
    assert {readable(trace.peak_bytes), readable(trace.resting_bytes)} <= set(re.findall(r"\d+ B", text))
    assert f"{trace.peak_bytes:,} bytes" in html
    for name, size in trace.peak_by_category.items():
        assert f"{name} {readable(size)}" in text
        assert {name, f"{size:,}"} <= set(re.findall(r">([^<>]+)<", html))


def test_an_empty_trace_can_be_shown():
    trace = measure(lambda: None)
    assert (trace.peak_bytes, trace.end_bytes, trace.peak_by_category) == (0, 0, {})
    assert "peak 0 B" in repr(trace)
    assert "0 bytes" in trace._repr_html_()
    assert trace.timeline.empty
    assert trace.at_peak().empty
    assert trace.by_category.empty


def test_sizes_are_readable():
    sizes = {0: "0 B", 1023: "1023 B", 1024: "1.00 KiB", 3 << 20: "3.00 MiB", 5 << 40: "5120.00 GiB"}
    assert {size: readable(size) for size in sizes} == sizes


def test_a_ledger_does_not_hear_what_another_thread_is_doing():
    def other():
        with phases.phase("forward", 3):
            phases.label("feedback", ours)
            inside.set()
            done.wait()

    inside, done = threading.Event(), threading.Event()
    with Ledger() as ledger:
        ours = torch.ones(5)
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        torch.ones(7)
        done.set()
        thread.join()
    assert [row[:3] for row in account(ledger.trace())] == 3 * [("", None, "workspace")]  # the second is freed


# --------------------------------------------------------------------------------------------------------- flat


def check_flat(peak: list[int]) -> None:
    assert len(set(peak)) == 1, peak


def predicted_peaks(rule, depths: tuple[int, ...], optimizer: str = "sgd", width: int = 32) -> list[int]:
    kind = ml.feedback.Regenerated
    nets = [partial(ml.models.mlp, width, [width] * depth, 10) for depth in depths]
    return [predict(rule, net, (64, width), STEADY[optimizer], kind()).peak_bytes for net in nets]


def measured_peaks(rule, depths: tuple[int, ...], optimizer: str = "sgd", width: int = 32) -> list[int]:
    nets = [ml.models.mlp(width, [width] * depth, 10) for depth in depths]
    rules = [rule(net, STEADY[optimizer], feedback=ml.feedback.Regenerated()) for net in nets]
    return [measure(learner, torch.ones(64, width), torch.arange(64) % 10, warm_up=1).peak_bytes for learner in rules]


@pytest.mark.parametrize("optimizer", STEADY)
def test_memdfa_is_flat(optimizer):
    peaks = [seen(ml.MemDFA, (2, 8, 64), optimizer) for seen in (predicted_peaks, measured_peaks)]
    check_flat([*peaks[0], *peaks[1]])


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(10_000, 64), (1000, 512)])
def test_memdfa_steps_through_a_very_deep_network(depth, width):
    net = ml.models.mlp(width, [width] * depth, 10)
    before = [next(block.parameters()).clone() for block in net]
    learner = ml.MemDFA(net, partial(torch.optim.SGD, lr=1.0), feedback=ml.feedback.Regenerated())
    x, y = torch.randn(64, width, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    assert [measure(learner, x, y).peak_bytes] == predicted_peaks(ml.MemDFA, (2,), width=width)
    changed = [not torch.equal(old, next(block.parameters())) for old, block in zip(before, net, strict=True)]
    assert all(changed[:1000])  # further on, activations die out, with weights as torch draws them


class KeepsEveryOutput(ml.MemDFA):
    def begin(self, x: Tensor, y: Tensor) -> Tensor:
        self.too_long: list[Tensor] = []
        return super().begin(x, y)

    def teach(self, i, block, e):
        self.too_long.append(super().teach(i, block, e))
        return self.too_long[-1]


@pytest.mark.parametrize("peaks", [predicted_peaks, measured_peaks])
def test_a_rule_that_keeps_every_output_is_not_flat(peaks):
    with pytest.raises(AssertionError):
        check_flat(peaks(KeepsEveryOutput, (2, 8, 64)))
