"""The closed form against the ledger: each term to the byte, the peak, and what is solved from it."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from problems import RULE_NAMES, rotated
from reference import refuses
from torch import Tensor

import memdfa_lab as ml
from memdfa_lab.memory import Trace, allocator_peak, formula, measure, predict
from memdfa_lab.memory.formula import C, L, N, deepest, depth_from_which, largest_batch, moments, n, n_0, s, terms

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


def learner_and_batch(rule, widths, batch, feedback="stored", optimizer="sgd") -> tuple[ml.Rule, Tensor, Tensor]:
    rule = ml.RULES[rule] if isinstance(rule, str) else rule
    x = torch.randn(batch, widths[0], generator=torch.Generator().manual_seed(0))
    return rule(net(widths), OPTIMIZERS[optimizer], feedback=FEEDBACK[feedback]()), x, torch.arange(batch) % widths[-1]


def measured(*setting, **how) -> Trace:
    return measure(*learner_and_batch(*setting, **how), warm_up=1)


def predicted(rule, widths, batch, feedback="stored", optimizer="sgd", offloaded=False) -> Trace:
    more = {"offload": ml.offload.Host("cpu", ahead=0)} if offloaded else {}
    return predict(rule, lambda: net(widths), (batch, widths[0]), OPTIMIZERS[optimizer], FEEDBACK[feedback](), **more)


def total(*setting, **how) -> int:
    """Return what a step needs, with what is in memory between steps."""
    trace = predicted(*setting, **how)
    return trace.resting_bytes + trace.peak_bytes


def value(expression, widths=None, **symbols) -> int:
    """Return a number of bytes; given widths, those of an expression in n_0, n, L, C."""
    values = {N: symbols["batch"], s: 4, formula.k: formula.SMALL_BYTES}
    if widths is not None:
        values |= {n_0: widths[0], n: widths[1], L: len(widths) - 2, C: widths[-1]}
    return int(expression.subs(values))


def just_before(trace: Trace, phase: str, category: str) -> int:
    """Return the bytes of a category when a phase began."""
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


HOW = {
    optimizer: {"feedback": feedback, "optimizer": optimizer}
    for feedback, optimizer in (("stored", "sgd"), ("regenerated", "adam"), ("shared", "momentum"))
}


@rotated("rule how batch", RULE_NAMES, HOW, [2, 33], turns=3)
def test_each_term_is_what_the_ledger_counts(rule, how, batch):
    for widths in [*EQUAL, *UNEQUAL]:
        found = terms_of(measured(rule, widths, batch, **HOW[how]), rule)
        assert {k: value(v, batch=batch) for k, v in terms(rule, widths, **HOW[how]).items()} == found
        if widths in EQUAL and len(widths) > 3:
            assert {k: value(v, widths, batch=batch) for k, v in terms(rule, None, **HOW[how]).items()} == found


def test_the_slopes_over_depth_are_the_textbooks():
    P = s * n * (n + 1)
    for rule in ml.RULES:
        slopes = {k: v.diff(L) for k, v in terms(rule, optimizer="momentum").items()}
        assert slopes["activations"] == (0 if rule == "memdfa" else s * N * n)
        assert (slopes["gradients"] - (P if rule in ("bp", "fa") else 0)).expand() == 0
        assert slopes["feedback"] == {"bp": 0, "fa": s * n**2}.get(rule, s * C * n)
        assert (slopes["optimizer state"] - P).expand() == (slopes["parameters"] - P).expand() == 0
    assert terms("memdfa", feedback="regenerated")["feedback"] == 0


def ledger_peak(*batch) -> int:
    return measure(*batch, warm_up=1).peak_bytes


@pytest.mark.parametrize(("seen", "batch"), [(ledger_peak, 8), (ledger_peak, 100), (allocator_peak, 8)])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_the_peak_grows_by_the_slope(rule, seen, batch):
    """Whether MEM-DFA is flat, too: its slope is 0."""
    peaks = {depth: seen(*learner_and_batch(rule, [16] * (depth + 1) + [10], batch)) for depth in (4, 8, 64)}
    # The larger of the two, not the sum: in BP an activation is freed as a block's gradients are made.
    stored = [terms(rule)[name].diff(L) for name in ("activations", "gradients")]
    slope = max(value(term.subs(n, 16), batch=batch) for term in stored)
    assert {depth: value - peaks[4] for depth, value in peaks.items()} == {4: 0, 8: 4 * slope, 64: 60 * slope}


@rotated("rule how batch", [*RULE_NAMES, "offloaded"], HOW, [2, 200], turns=3)
def test_the_peak_is_the_largest_of_the_moments(rule, how, batch):
    rule, how = ("memdfa", {**HOW[how], "offloaded": True}) if rule == "offloaded" else (rule, HOW[how])
    for widths in EQUAL if batch == 2 else [EQUAL[-1], *UNEQUAL]:
        trace = predicted(rule, widths, batch, **how)
        assert max(value(size, batch=batch) for size in moments(rule, widths, **how).values()) == trace.peak_bytes
        assert value(formula.resting(rule, widths, **how), batch=batch) == trace.resting_bytes
        if widths in EQUAL and len(widths) > 3:
            symbolic = moments(rule, None, **how).values()
            assert max(value(size, widths, batch=batch) for size in symbolic) == trace.peak_bytes
            assert value(formula.resting(rule, **how), widths, batch=batch) == trace.resting_bytes


def test_widths_can_be_symbols():
    a, b = formula.sp.symbols("n_1 n_2")
    stored = terms("bp", [n_0, a, b, C])
    assert (stored["activations"] - s * N * (a + b + C)).expand() == 0
    assert formula.sp.latex(stored["gradients"])


# ------------------------------------------------------------------------------------------------ what it solves


@rotated("rule how", RULE_NAMES, HOW, turns=3)
def test_one_more_example_does_not_fit(rule, how):
    for widths in ([20, 32, 32, 32, 32, 10], [20, 50, 10], [20, 7, 600, 10]):
        least = total(rule, widths, 1, **HOW[how])
        for budget in (least + 2_000, 9 * least + 123, 10**8):
            batch = largest_batch(budget, rule, widths, **HOW[how])
            assert total(rule, widths, batch, **HOW[how]) <= budget < total(rule, widths, batch + 1, **HOW[how])


@rotated("rule how", RULE_NAMES, HOW, turns=3)
def test_one_more_layer_does_not_fit(rule, how):
    for depth in (1, 2, 6):
        budget = total(rule, [20, *[24] * depth, 10], 50, **HOW[how]) + 7
        assert deepest(budget, rule, batch=50, width=24, inputs=20, classes=10, **HOW[how]) == depth
        assert total(rule, [20, *[24] * (depth + 1), 10], 50, **HOW[how]) > budget


@rotated("sizes against how", [(64, 32, 32), (500, 8, 30), (16, 50, 400)], ["bp", "dfa"], HOW, turns=2)
def test_depth_from_which_memdfa_holds_less(sizes, against, how):
    batch, width, inputs = sizes
    depth = depth_from_which(batch=batch, width=width, inputs=inputs, classes=10, against=against, **HOW[how])

    def less(layers: int) -> bool:
        widths = [inputs, *[width] * layers, 10]
        return total("memdfa", widths, batch, **HOW[how]) < total(against, widths, batch, **HOW[how])

    assert all(less(layers) for layers in (depth, depth + 1, 12))
    assert depth == 1 or not less(depth - 1)


def test_a_deep_net_is_solved_at_once():
    found = deepest(10**12, "memdfa", batch=128, width=800, inputs=784, classes=10, feedback="regenerated")
    assert found > 100_000


ONE_LAYER = {"batch": 5, "width": 20, "inputs": 20, "classes": 10}
REFUSED = [
    (partial(largest_batch, 1000, "bp", [20, 30, 30, 10]), "not even one example fits into 1000 B"),
    (partial(largest_batch, 1000, "bp", [20, 30.5, 10]), "a width must be a whole number", "30.5"),
    (partial(deepest, 1000, "bp", **ONE_LAYER), "not even one hidden layer fits into 1000 B"),
    (partial(deepest, 10**6, "bp", **{**ONE_LAYER, "batch": 0}), "batch must be a whole number from 1 on", "0"),
    # B grows faster than what BP keeps
    (partial(depth_from_which, batch=2, width=4, inputs=4, classes=100), "MEM-DFA never holds less than bp"),
    (partial(terms, "bp", [3, 4]), "one or more hidden layers"),
    (partial(moments, "memdfaa"), "'memdfa'"),
    (partial(moments, "bp", optimizer="adamm"), "'adam'"),
    (partial(moments, "bp", feedback="store"), "'stored'"),
]


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_solution_is_refused(case):
    solve, *hints = case
    with refuses(ValueError, *hints):
        solve()


def test_whole_numbers_of_numpy_are_whole_numbers():
    assert largest_batch(10**9, "bp", [784, np.int64(800), 10]) == largest_batch(10**9, "bp", [784, 800, 10])
