"""The ledger: accounts written down by hand."""

from __future__ import annotations

from functools import partial

import torch
from problems import BY_NAME, make_rule
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.core import phases
from memdfa_lab.memory import CATEGORIES, Trace, measure


def events(trace: Trace) -> list[tuple]:
    """Return all of a trace but the time."""
    return [
        (e.operation, e.name, e.phase, e.block, e.change_bytes, e.storage.category, e.storage.shape, e.storage.dtype)
        for e in trace.events
    ]


def account(trace: Trace, *left_out: str) -> list[tuple]:
    """Return (phase, block, category, change) of each event; phases can be left out."""
    rows = [(e.phase, e.block, e.storage.category, e.change_bytes) for e in trace.events]
    return [row for row in rows if row[0] not in left_out]


def check_account(trace: Trace, left: int = 0) -> None:
    """Check what is true of every account."""
    table, by_category = trace.timeline, trace.by_category
    assert (by_category.sum(axis=1) == table["total_bytes"]).all()
    assert (by_category >= 0).all().all()
    assert (table.groupby("storage")["bytes"].cumsum() >= 0).all()
    assert table["total_bytes"].tolist() == table["bytes"].cumsum().tolist()
    assert table["time_s"].is_monotonic_increasing
    assert table["operation"].is_monotonic_increasing
    assert set(table["category"]) <= set(CATEGORIES)
    assert trace.peak_bytes == table["total_bytes"].max() == sum(trace.peak_by_category.values())
    at_peak = trace.at_peak()
    assert at_peak["bytes"].sum() == trace.peak_bytes
    assert at_peak.groupby("category")["bytes"].sum().to_dict() == trace.peak_by_category
    assert at_peak["bytes"].is_monotonic_decreasing
    assert trace.resting_bytes == sum(trace.resting_by_category.values())
    assert trace.end_bytes == table["total_bytes"].iloc[-1] == left


# ---------------------------------------------------------------------------------------- accounts by hand


def test_a_callable_by_hand():
    x, W = torch.ones(4, 3), torch.ones(3, 5)

    def step(x: Tensor) -> None:
        with phases.phase("forward", 7):
            a = x @ W  # 80 bytes
            h = a.relu()
            del a
        with phases.phase("error"):
            e = (h * 2).sum()
            del h
        named = phases.label("feedback", torch.zeros(6, dtype=torch.float64))
        del e, named

    trace = measure(step, x, tensors=lambda: {"parameters": [W]})
    rows = [(e.operation, e.name, *row) for e, row in zip(trace.events, account(trace), strict=True)]
    assert rows == [
        (1, "aten::mm", "forward", 7, "activations", 80),
        (2, "aten::relu", "forward", 7, "activations", 80),
        (2, "aten::relu", "forward", 7, "activations", -80),
        (3, "aten::mul", "error", None, "error", 80),
        (4, "aten::sum", "error", None, "error", 4),
        (4, "aten::sum", "error", None, "error", -80),
        (4, "aten::sum", "error", None, "activations", -80),
        (5, "aten::zeros", "", None, "feedback", 48),
        (5, "aten::zeros", "", None, "error", -4),
        (5, "aten::zeros", "", None, "feedback", -48),
    ]
    assert trace.peak_bytes == 164
    assert trace.peak_by_category == {"activations": 80, "error": 84}
    assert trace.resting_by_category == {"parameters": 60, "input": 48}
    check_account(trace)


def tiny_net(classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, classes))


TINY_BATCH = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 0, 1, 1])


def tiny(rule: str) -> Trace:
    learner = ml.RULES[rule](tiny_net(2), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    return measure(learner, *TINY_BATCH, warm_up=1)


def test_backpropagation_by_hand():
    trace = tiny("bp")
    assert account(trace, "begin", "error") == [
        ("forward", 0, "activations", 60),  # x W^T + b
        ("forward", 0, "activations", 60),  # h_1, which autograd keeps
        ("forward", 0, "activations", -60),
        ("forward", 1, "activations", 40),  # the logits
        ("backward", 1, "error", 60),  # e W_2
        ("backward", 1, "gradients", 24),
        ("backward", 1, "gradients", 8),
        ("backward", 0, "error", 60),  # through the ReLU
        ("backward", 0, "error", -60),
        ("backward", 0, "activations", -60),  # h_1
        ("backward", 0, "gradients", 48),
        ("backward", 0, "gradients", 12),
        ("backward", 0, "error", -60),
        ("update", 0, "gradients", -48),
        ("update", 0, "gradients", -12),
        ("update", 1, "gradients", -24),
        ("update", 1, "gradients", -8),
        ("", None, "activations", -40),
        ("", None, "error", -40),  # e
        ("", None, "error", -4),  # the loss
    ]
    names = [e.name for e in trace.events if e.change_bytes > 0 and e.phase in ("forward", "backward")]
    linear, its_gradients = "aten::addmm", ["aten::mm", "aten::sum"]
    back = ["aten::mm", *its_gradients, "aten::threshold_backward", *its_gradients]
    assert names == [linear, "aten::relu", linear, *back]
    assert trace.resting_by_category == {"parameters": 92, "optimizer state": 92, "input": 120}
    # At the ReLU's backward: h_1, logits; e, the loss, and the error on both sides of the ReLU; W_2's gradients.
    assert trace.peak_by_category == {"activations": 100, "error": 164, "gradients": 32}


def test_memdfa_by_hand():
    trace = tiny("memdfa")
    kept = [row for row in account(trace, "begin", "error", "forward") if row[0]]
    first = [row for row in account(trace) if row[0] == "forward"]
    assert first == [("forward", 0, "activations", 60), ("forward", 1, "activations", 40), *first[2:]]
    assert sum(change for *_, change in first) == 40
    assert kept[:9] == [
        ("recompute", 0, "activations", 60),
        ("local gradient", 0, "error", 60),  # e B_1
        ("local gradient", 0, "gradients", 48),
        ("local gradient", 0, "gradients", 12),
        ("local gradient", 0, "error", -60),
        ("update", 0, "gradients", -48),
        ("update", 0, "gradients", -12),
        ("recompute", 1, "activations", 40),
        ("local gradient", 1, "gradients", 24),
    ]
    assert trace.resting_by_category == {"parameters": 92, "optimizer state": 92, "feedback": 24, "input": 120}


def test_views_and_operations_in_place_count_nothing():
    def step(x: Tensor) -> None:
        x.view(2, 6).t()[1].unsqueeze(0).expand(4, 2).detach()
        x.add_(1).relu_().mul_(2).copy_(x)
        torch.relu_(x.view(-1)[2:])
        x.untyped_storage()

    assert measure(step, torch.ones(3, 4)).events == []
    own = measure(lambda: torch.ones(3, 4).view(-1).add_(1)[2:].t())
    assert account(own) == [("", None, "workspace", 48), ("", None, "workspace", -48)]


def test_a_view_keeps_its_storage_alive():
    kept = []
    trace = measure(lambda: kept.append(torch.ones(1000)[:1]))
    assert trace.end_bytes == 4000


def test_resized_storages_are_counted():
    def step() -> None:
        tensor = torch.empty(4)
        tensor.resize_(10)
        tensor.resize_(2)  # the storage stays
        tensor.untyped_storage().resize_(0)
        tensor.detach()  # the ledger sees it here

    trace = measure(step)
    assert [change for *_, change in account(trace)] == [16, 24, -40]
    check_account(trace)
    out = measure(lambda: torch.add(torch.ones(8), 1, out=torch.empty(0)))
    assert out.peak_bytes == 64
    check_account(out)


def test_what_autograd_saves_is_counted_while_it_lives():
    W = torch.ones(3, 5, requires_grad=True)

    def step(x: Tensor) -> None:
        y = (x @ W).exp().sum()  # nobody but the graph holds the exponential
        torch.zeros(1)
        (gradient,) = torch.autograd.grad(y, W)
        del y, gradient

    trace = measure(step, torch.ones(4, 3), tensors=lambda: {"parameters": [W]})
    meanwhile = next(i for i, e in enumerate(trace.events) if e.name == "aten::zeros")
    assert trace.timeline["total_bytes"].iloc[meanwhile - 1] == 84
    check_account(trace)


def test_steps_and_warm_up():
    calls = []

    def step(x: Tensor) -> None:
        calls.append(float(x.exp().sum()))

    once, thrice = (measure(step, torch.zeros(5), steps=steps, warm_up=2) for steps in (1, 3))
    assert len(calls) == 3 + 5
    assert account(thrice) == 3 * account(once)
    assert thrice.peak_bytes == once.peak_bytes == 24


def test_a_first_step_leaves_the_optimizers_state_and_the_feedback():
    problem = BY_NAME["mlp_relu"]
    rule = make_rule("memdfa", problem, "momentum")
    first, second = (measure(rule, problem.x, problem.y) for _ in range(2))
    left, kept = first.by_category.iloc[-1], second.resting_by_category
    assert left["optimizer state"] == kept["optimizer state"] == kept["parameters"]
    assert left["feedback"] == kept["feedback"] == 4 * 5 * (12 + 10)
    check_account(first, left=kept["optimizer state"] + kept["feedback"])
    check_account(second)
