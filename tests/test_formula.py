"""The closed form against the ledger: each term to the byte, the peak, and what is solved from it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

import memdfa_lab as ml
from memdfa_lab.memory import Trace, allocator_peak, formula, measure, predict
from memdfa_lab.memory.formula import C, L, N, deepest, depth_from_which, largest_batch, moments, n, n_0, peak, s, terms

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}
FEEDBACK = ml.feedback.KINDS
EQUAL = [[12, *[9] * depth, 4] for depth in (1, 2, 7)]
UNEQUAL = [[784, 30, 10], [3, 9, 100, 2, 40, 50], [9, 70, 70, 33, 100], [9, 900, 700, 10]]


def net(widths):
    return ml.models.mlp(widths[0], widths[1:-1], widths[-1])


def made(rule, widths, batch, feedback="stored", optimizer="sgd") -> tuple[ml.Rule, Tensor, Tensor]:
    rule = ml.RULES[rule] if isinstance(rule, str) else rule
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(0))
    return rule(net(widths), OPTIMIZERS[optimizer], feedback=FEEDBACK[feedback]()), x, torch.arange(batch) % widths[-1]


def measured(*setting) -> Trace:
    return measure(*made(*setting), warm_up=1)


def predicted(rule, widths, batch, feedback="stored", optimizer="sgd") -> Trace:
    return predict(rule, lambda: net(widths), (batch, widths[0]), OPTIMIZERS[optimizer], FEEDBACK[feedback]())


def value(expression, widths=None, **symbols) -> int:
    """Return a number of bytes; given widths, those of an expression in n_0, n, L, C."""
    values = {N: symbols["batch"], s: 4, formula.k: formula.SMALL_BYTES}
    if widths is not None:
        values |= {n_0: widths[0], n: widths[1], L: len(widths) - 2, C: widths[-1]}
    return int(expression.subs(values))


def just_before(trace: Trace, phase: str, category: str) -> int:
    """Return what a category held when a phase began."""
    start = int((trace.timeline["phase"] == phase).idxmax())
    assert start > 0
    return int(trace.by_category[category].iloc[start - 1])


def terms_of(trace: Trace, rule: str) -> dict[str, int]:
    """Return the ledger's numbers for the terms of the formula."""
    together = rule in ("bp", "fa")
    ends = trace.by_category.iloc[-1]
    return {
        **{name: trace.resting_by_category.get(name, 0) for name in ("parameters", "optimizer state", "feedback")},
        "activations": just_before(trace, "error", "activations"),
        "gradients": just_before(trace, "update", "gradients") if together else int(ends["gradients"]),
    }


HOW = [("stored", "sgd"), ("regenerated", "adam"), ("shared", "momentum")]


@pytest.mark.parametrize("batch", [2, 33])
@pytest.mark.parametrize(("feedback", "optimizer"), HOW)
@pytest.mark.parametrize("rule", ml.RULES)
def test_each_term_is_what_the_ledger_counts(rule, optimizer, feedback, batch):
    for widths in [*EQUAL, *UNEQUAL]:
        found = terms_of(measured(rule, widths, batch, feedback, optimizer), rule)
        assert {k: value(v, batch=batch) for k, v in terms(rule, widths, feedback, optimizer).items()} == found
        if widths in EQUAL and len(widths) > 3:
            symbolic = terms(rule, feedback=feedback, optimizer=optimizer)
            assert {k: value(v, widths, batch=batch) for k, v in symbolic.items()} == found


def test_the_slopes_over_depth_are_the_textbooks():
    P = s * n * (n + 1)
    for rule in ml.RULES:
        slopes = {k: v.diff(L) for k, v in terms(rule, optimizer="momentum").items()}
        assert slopes["activations"] == (0 if rule == "memdfa" else s * N * n)
        assert (slopes["gradients"] - (P if rule in ("bp", "fa") else 0)).expand() == 0
        assert slopes["feedback"] == {"bp": 0, "fa": s * n**2}.get(rule, s * C * n)
        assert (slopes["optimizer state"] - P).expand() == (slopes["parameters"] - P).expand() == 0
    assert terms("memdfa", feedback="regenerated")["feedback"] == 0


def by_the_ledger(*setting) -> int:
    return measured(*setting).peak_bytes


def by_the_allocator(*setting) -> int:
    return allocator_peak(*made(*setting))


@pytest.mark.parametrize("seen", [by_the_ledger, by_the_allocator])
@pytest.mark.parametrize("batch", [8, 100])
@pytest.mark.parametrize("rule", ml.RULES)
def test_the_peak_grows_by_the_slope(rule, batch, seen):
    width = 16
    peaks = [seen(rule, [16, *[width] * depth, 10], batch) for depth in (4, 8, 16)]
    # The larger of the two, not the sum: in BP an activation is freed as a block's gradients are made.
    stored = [terms(rule)[name].diff(L) for name in ("activations", "gradients")]
    slope = max(value(term.subs(n, width), batch=batch) for term in stored)
    assert peaks[1] - peaks[0] == 4 * slope
    assert peaks[2] - peaks[1] == 8 * slope


@pytest.mark.parametrize("batch", [2, 200])
@pytest.mark.parametrize(("feedback", "optimizer"), HOW)
@pytest.mark.parametrize("rule", ml.RULES)
def test_the_peak_is_the_largest_of_the_moments(rule, optimizer, feedback, batch):
    how = {"feedback": feedback, "optimizer": optimizer}
    for widths in EQUAL if batch == 2 else [EQUAL[-1], *UNEQUAL]:
        trace = predicted(rule, widths, batch, feedback, optimizer)
        assert max(value(held, batch=batch) for held in moments(rule, widths, **how).values()) == trace.peak_bytes
        assert value(formula.resting(rule, widths, **how), batch=batch) == trace.resting_bytes
        if widths in EQUAL and len(widths) > 3:
            assert max(value(held, widths, batch=batch) for held in moments(rule, **how).values()) == trace.peak_bytes
            assert value(formula.resting(rule, **how), widths, batch=batch) == trace.resting_bytes


class KeepsOneMore(ml.MemDFA):
    def teach(self, i: int, block, e: Tensor) -> Tensor:
        out = super().teach(i, block, e)
        self.kept = [*getattr(self, "kept", []), out][-2:]
        return out


def test_a_rule_that_keeps_one_more_is_noticed():
    widths = [9, 9, 9, 9, 4]
    for rule, right in ((ml.MemDFA, True), (KeepsOneMore, False)):
        trace = measured(rule, widths, 20)
        assert (trace.peak_bytes == value(peak("memdfa", widths), batch=20)) is right


def test_widths_can_be_symbols():
    a, b = formula.sp.symbols("n_1 n_2")
    stored = terms("bp", [n_0, a, b, C])
    assert (stored["activations"] - s * N * (a + b + C)).expand() == 0
    assert formula.sp.latex(stored["gradients"])


# ------------------------------------------------------------------------------------------------ what it solves


def held(rule, widths, batch, feedback, optimizer) -> int:
    trace = predicted(rule, widths, batch, feedback, optimizer)
    return trace.resting_bytes + trace.peak_bytes


@pytest.mark.parametrize(("feedback", "optimizer"), HOW)
@pytest.mark.parametrize("rule", ml.RULES)
def test_one_more_example_does_not_fit(rule, feedback, optimizer):
    how = {"feedback": feedback, "optimizer": optimizer}
    for widths in ([20, 32, 32, 32, 32, 10], [20, 50, 10], [20, 7, 600, 10]):
        least = held(rule, widths, 1, feedback, optimizer)
        for budget in (least + 2_000, 9 * least + 123, 10**8):
            batch = largest_batch(budget, rule, widths, **how)
            assert held(rule, widths, batch, feedback, optimizer) <= budget
            assert held(rule, widths, batch + 1, feedback, optimizer) > budget


@pytest.mark.parametrize(("feedback", "optimizer"), HOW)
@pytest.mark.parametrize("rule", ml.RULES)
def test_one_more_layer_does_not_fit(rule, feedback, optimizer):
    how = {"feedback": feedback, "optimizer": optimizer}
    for depth in (1, 2, 6):
        budget = held(rule, [20, *[24] * depth, 10], 50, feedback, optimizer) + 7
        found = deepest(budget, rule, batch=50, width=24, inputs=20, classes=10, **how)
        assert found == depth
        assert held(rule, [20, *[24] * (found + 1), 10], 50, feedback, optimizer) > budget


@pytest.mark.parametrize(("feedback", "optimizer"), HOW)
@pytest.mark.parametrize("against", ["bp", "dfa"])
@pytest.mark.parametrize(("batch", "width", "inputs"), [(64, 32, 32), (500, 8, 30), (16, 50, 400)])
def test_depth_from_which_memdfa_holds_less(batch, width, inputs, against, feedback, optimizer):
    how = {"feedback": feedback, "optimizer": optimizer}
    depth = depth_from_which(batch=batch, width=width, inputs=inputs, classes=10, against=against, **how)

    def less(layers: int) -> bool:
        widths = [inputs, *[width] * layers, 10]
        return held("memdfa", widths, batch, feedback, optimizer) < held(against, widths, batch, feedback, optimizer)

    assert all(less(layers) for layers in (depth, depth + 1, 12))
    assert depth == 1 or not less(depth - 1)


def test_a_deep_net_is_solved_at_once():
    found = deepest(10**12, "memdfa", batch=128, width=800, inputs=784, classes=10, feedback="regenerated")
    assert found > 100_000


def test_what_has_no_solution_is_said():
    with pytest.raises(ValueError, match="not even one example fits into 1000 B: it takes"):
        largest_batch(1000, "bp", [20, 30, 30, 10])
    with pytest.raises(ValueError, match="not even one hidden layer fits into 1000 B: it takes"):
        deepest(1000, "bp", batch=5, width=20, inputs=20, classes=10)
    with pytest.raises(ValueError, match="MEM-DFA never holds less than bp"):  # B grows faster than what BP keeps
        depth_from_which(batch=2, width=4, inputs=4, classes=100)
    with pytest.raises(ValueError, match="batch must be a whole number from 1 on, got 0"):
        deepest(10**6, "bp", batch=0, width=20, inputs=20, classes=10)
    with pytest.raises(ValueError, match="one or more"):
        terms("bp", [3, 4])
    with pytest.raises(ValueError, match="memdfa"):
        moments("memdfaa")
    with pytest.raises(ValueError, match="adam"):
        moments("bp", optimizer="adamm")
    with pytest.raises(ValueError, match="stored"):
        moments("bp", feedback="store")


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert largest_batch(10**9, "bp", [784, np.int64(800), 10]) == largest_batch(10**9, "bp", [784, 800, 10])
