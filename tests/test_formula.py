"""The closed form against the ledger: each term and the peak, to the byte."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from problems import RULE_NAMES, rotated
from reference import refuses
from torch import Tensor

import memdfa_lab as ml
from memdfa_lab.memory import Trace, allocator_peak, formula, measure, predict
from memdfa_lab.memory.formula import C, L, N, moments, n, n_0, s, terms

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1e-3),
    "momentum": partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3),
}
FEEDBACK = ml.feedback.KINDS | {"learned": partial(ml.feedback.Learned, lr=1e-3)}
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


LEARNED, OFFLOADED = {"feedback": "learned"}, {"offloaded": True}
FORMS = {name: (name, {}) for name in (*RULE_NAMES, *ml.LOCAL_RULES)}
FORMS |= {"learned B": ("memdfa", LEARNED), "learned B, DFA": ("dfa", LEARNED), "offloaded": ("memdfa", OFFLOADED)}
FORMS["learned B, offloaded"] = ("memdfa", LEARNED | OFFLOADED)


@rotated("form how batch", FORMS, HOW, [2, 200], turns=3, quick=1)
def test_the_peak_is_the_largest_of_the_moments(form, how, batch):
    rule, how = FORMS[form][0], HOW[how] | FORMS[form][1]
    for widths in EQUAL if batch == 2 else [EQUAL[-1], *UNEQUAL, [20, 900, 5, 100]]:
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


REFUSED = [
    (partial(terms, "bp", [3, 4]), "one or more hidden layers"),
    (partial(moments, "memdfaa"), "'memdfa'"),
    (partial(moments, "bp", optimizer="adamm"), "'adam'"),
    (partial(moments, "bp", feedback="store"), "'stored'"),
    (partial(moments, "fa", feedback="learned"), "unknown feedback 'learned'", "stored"),
    (partial(moments, "drtp", offloaded=True), "drtp cannot offload"),
]


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_no_formula_for_is_refused(case):
    solve, *hints = case
    with refuses(ValueError, *hints):
        solve()


def test_numbers_may_be_put_in_one_after_another_in_any_order():
    """sympy compares 256 with k / (N s) wrongly once two of the three are numbers."""
    numbers = {n: 1024, n_0: 784, C: 10, s: 4, formula.k: formula.SMALL_BYTES, L: 16, N: 128}
    peak = formula.peak("dfa", feedback="regenerated")
    at_once = peak.subs(numbers)
    for first in permutations((formula.k, n, s)):
        partly = peak
        for symbol in first:
            partly = partly.subs(symbol, numbers[symbol])
        assert partly.subs(numbers) == at_once, first
