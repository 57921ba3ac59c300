"""Deep steps put together from shallow ones, against the prediction of the whole network, event for event."""

from __future__ import annotations

import random
from functools import partial
from itertools import cycle, product

import pytest
import torch
from reference import held_by_formula

import memdfa_lab as ml
from memdfa_lab import widgets
from memdfa_lab.core.rules import ALL_RULES, find_rule
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.memory.sizing import largest
from memdfa_lab.widgets.memory import step_of
from memdfa_lab.widgets.setting import PRECISIONS


def predicted(rule: str, setting: widgets.Setting):
    """Return the whole network's prediction."""
    return eval(setting.changed(rules=(rule,)).code, {"ml": ml})[rule]


def assert_the_same(rule: str, setting: widgets.Setting) -> None:
    whole, found = predicted(rule, setting), step_of(rule, setting, setting.depth)
    assert found.resting_by_category == whole.resting_by_category
    for one, other in zip(found.events, whole.events, strict=True):
        assert (one.change_bytes, one.storage.category, one.phase) == (
            other.change_bytes,
            other.storage.category,
            other.phase,
        )
    assert (found.peak_bytes, found.peak_by_category) == (whole.peak_bytes, whole.peak_by_category)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 19, 20])
@pytest.mark.parametrize("rule", ALL_RULES)
def test_each_depth_is_the_whole_networks(rule, depth):
    assert_the_same(rule, widgets.Setting(depth=depth, width=30, batch=7, inputs=20, classes=5))


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_so_it_is_with_a_b_that_learns(rule):
    assert_the_same(rule, widgets.Setting(depth=7, width=30, batch=7, inputs=20, classes=5, feedback="learned"))


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 1)) for seed in range(8)])
def test_any_setting_is_the_whole_networks(seed):
    choose = random.Random(seed).choice
    for rule in ALL_RULES:
        setting = widgets.Setting(
            depth=choose([2, 3, 6, 10, 13]),
            width=choose([1, 7, 16, 100, 800]),
            batch=choose([2, 3, 33, 128, 5000]),
            inputs=choose([784, 20]),
            classes=choose([10, 100]),
            activation=choose(list(ACTIVATIONS)),
            batch_norm=choose([False, True]),
            optimizer=choose(list(ml.experiments.OPTIMIZERS)),
            feedback=choose(list(ml.feedback.KINDS)),
            precision=choose(list(PRECISIONS)),
        )
        assert_the_same(rule, setting)


@pytest.mark.parametrize("rule", ALL_RULES)
def test_convolutions_are_the_whole_networks(rule):
    precisions = cycle(PRECISIONS)
    for _ in range(list(ALL_RULES).index(rule)):  # another one first for each rule
        next(precisions)
    for batch_norm, optimizer, width, depth, batch in (
        (False, "sgd", 3, 6, 40),
        (False, "momentum", 64, 4, 201),
        (True, "adam", 8, 11, 2),
        (True, "rmsprop", 512, 6, 5),  # filters that outweigh the batch
    ):
        how = {"batch_norm": batch_norm, "optimizer": optimizer, "feedback": "stored", "precision": next(precisions)}
        assert_the_same(rule, widgets.Setting(family="convnet", depth=depth, width=width, batch=batch, **how))


@pytest.mark.parametrize("family", ["mlp", "convnet"])
@pytest.mark.parametrize("rule", ["bp", "memdfa", "checkpoint"])
def test_a_step_that_is_run_holds_what_is_shown(rule, family):
    """The deep step against the ledger's count of a real one."""
    setting = widgets.Setting(family=family, depth=12, width=8, batch=16, batch_norm=True, optimizer="momentum")
    size = setting.x_shape[1:] if family == "convnet" else setting.inputs
    net = getattr(ml.models, family)(size, [8] * 12, 10, "relu", True)
    learner = find_rule(rule)(net, ml.experiments.OPTIMIZERS["momentum"], feedback=ml.feedback.Regenerated())
    x, y = torch.randn(setting.x_shape), torch.zeros(16, dtype=torch.long)
    measured, found = ml.memory.measure(learner, x, y, warm_up=1), step_of(rule, setting, 12)
    assert (found.peak_bytes, found.peak_by_category) == (measured.peak_bytes, measured.peak_by_category)
    assert found.resting_by_category == measured.resting_by_category


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["fa", "memdfa", "checkpoint_step_in_backward"])
def test_a_deep_one_is_the_whole_networks(rule):
    assert_the_same(rule, widgets.Setting(depth=200, width=20, optimizer="adam", feedback="stored", batch_norm=True))


# Two of the six pairs of family and depth for each rule, in turn
PAIRS = list(product(["mlp", "convnet"], [1, 4, 12]))
FITTED = [(rule, *PAIRS[(i + k) % 6]) for i, rule in enumerate(ALL_RULES) for k in (0, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "family", "depth"), FITTED)
def test_one_more_example_or_layer_does_not_fit(rule, family, depth):
    """What the explorer shows as the largest batch and depth, against predictions of whole networks."""
    setting = widgets.Setting(family=family, depth=depth, width=6, batch=30, optimizer="momentum", feedback="stored")

    def held(depth: int, batch: int) -> int:
        trace = predicted(rule, setting.changed(depth=depth, batch=batch))
        return trace.peak_bytes + trace.resting_bytes

    for budget in (held(depth, 1), held(depth, 30) + 5):
        (row,) = widgets.explore(setting.changed(rules=(rule,), budget=f"{budget} B")).table.to_dict("records")
        batch, deepest = row["largest_batch"], row["deepest"]
        assert held(depth, batch) <= budget < held(depth, batch + 1)
        assert budget < held(deepest + 1, 30)
        assert deepest == 0 or held(deepest, 30) <= budget
    (row,) = widgets.explore(setting.changed(rules=(rule,), budget="1 KB")).table.to_dict("records")
    assert (row["largest_batch"], row["deepest"]) == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_that_fits_a_budget(seed):
    """Any function that grows along lines, smooth or in steps of eight."""
    draw = random.Random(seed)
    lines = [(draw.randrange(1, 1000), draw.randrange(10**6)) for _ in range(3)]
    step, most, budget = draw.choice([1, 8]), draw.choice([None, 5, 10**6]), draw.randrange(10**8)
    asked = []

    def size(n: int) -> int:
        asked.append(n)
        return max(slope * -(-n // step) * step + at_zero for slope, at_zero in lines)

    found = largest(size, budget, most=most)
    assert len(asked) < 150
    assert (size(1) > budget) if found == 0 else size(found) <= budget
    assert found == most or size(found + 1) > budget


@pytest.mark.slow
def test_the_closed_form_says_the_same():
    how = {"feedback": "stored", "optimizer": "adam"}
    table = widgets.explore(**how).table.set_index("rule")
    for rule in ml.RULES:
        depth, batch = table["deepest"][rule], table["largest_batch"][rule]
        held = partial(held_by_formula, rule, width=800, inputs=784, classes=10, **how)
        assert held(depth, 128) <= 2**33 < held(depth + 1, 128)
        assert held(32, batch) <= 2**33 < held(32, batch + 1)


def test_a_batch_norm_net_has_no_batch_of_one():
    norm = widgets.Setting(batch_norm=True, rules=("bp", "memdfa"), batch=2)
    for rule in norm.rules:
        least = step_of(rule, norm, 32).held_bytes
        for budget, batch in ((least, 2), (least - 1, 0)):
            assert widgets.explore(norm.changed(rules=(rule,), budget=f"{budget} B")).table["largest_batch"][0] == batch
