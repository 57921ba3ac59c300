"""Deep steps put together from shallow ones, against the prediction of the whole network, event for event."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import memdfa_lab as ml
from memdfa_lab import widgets
from memdfa_lab.lab.architectures import ACTIVATIONS
from memdfa_lab.memory.deep import _step
from memdfa_lab.widgets.setting import FAMILIES, LIMITS, PRECISIONS, chain_of

EVERY = [*ml.RULES, *ml.BASELINES]


def predicted(rule: str, setting: widgets.Setting):
    """Return the whole network's prediction."""
    return eval(replace(setting, rules=(rule,)).code, {"ml": ml})[rule]


def assert_the_same(rule: str, setting: widgets.Setting) -> None:
    trace = predicted(rule, setting)
    whole, found = _step(trace), chain_of(rule, setting).step(setting.depth + 1, setting.batch)
    assert found.resting_by_category == whole.resting_by_category
    for name in ("changes", "categories", "phases"):
        assert np.array_equal(getattr(found, name), getattr(whole, name)), (name, setting)
    assert (found.peak_bytes, found.peak_by_category) == (trace.peak_bytes, trace.peak_by_category)
    assert chain_of(rule, setting).peak_bytes(setting.depth + 1, setting.batch) == trace.peak_bytes


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 19, 20])
@pytest.mark.parametrize("rule", EVERY)
def test_each_depth_is_the_whole_networks(rule, depth):
    assert_the_same(rule, widgets.Setting(depth=depth, width=30, batch=7, inputs=20, classes=5))


@pytest.mark.parametrize("rule", EVERY)
def test_each_batch_is_the_whole_networks(rule):
    for batch in (1, 2, 3, 80, 81, 82, 83, 500, 40_000):  # the signal of 800 outputs is in one piece below 82
        assert_the_same(rule, widgets.Setting(depth=6, batch=batch))


@pytest.mark.parametrize("seed", range(8))
def test_any_setting_is_the_whole_networks(seed):
    choose = random.Random(seed).choice
    for rule in EVERY:
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


@pytest.mark.parametrize("seed", range(12))
def test_in_proportion_to_the_batch_from_the_first_on(seed):
    """The batches next to the one from which on a step is not predicted by itself."""
    choose = random.Random(seed).choice
    for rule in ("dfa", "memdfa"):
        setting = widgets.Setting(
            choose(list(FAMILIES)),
            depth=5,
            width=choose([1, 7, 64, 100, 800]),
            inputs=choose([784, 3072]),
            classes=choose([10, 100]),
            activation=choose(list(ACTIVATIONS)),
            batch_norm=choose([False, True]),
            feedback=choose(list(ml.feedback.KINDS)),
            precision=choose(list(PRECISIONS)),
        )
        chain = chain_of(rule, setting)
        for batch in (chain.linear_from - 1, chain.linear_from, chain.linear_from + chain.period):
            if chain.least_batch <= batch <= LIMITS["batch"]:
                assert_the_same(rule, replace(setting, batch=batch))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", EVERY)
def test_convolutions_are_the_whole_networks(rule, precision):
    for batch_norm, optimizer, width, depth, batch in (
        (False, "sgd", 3, 6, 40),
        (False, "sgd", 5, 6, 800),
        (False, "momentum", 64, 4, 200),
        (False, "momentum", 64, 4, 201),
        (True, "adam", 8, 11, 2),
    ):
        how = {"batch_norm": batch_norm, "optimizer": optimizer, "feedback": "stored", "precision": precision}
        assert_the_same(rule, widgets.Setting("convnet", depth, width, batch, **how))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rule", list(ml.RULES))
def test_filters_that_outweigh_the_batch_are_the_whole_networks(rule, precision):
    for batch in (2, 5, 6, 20):  # 512 x 512 filters of 3 x 3 have more numbers than 5 examples of 28 x 28 pixels
        how = {"batch_norm": True, "optimizer": "rmsprop", "precision": precision}
        assert_the_same(rule, widgets.Setting("convnet", 6, 512, batch, **how))


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_one_more_image_does_not_fit_or_eight_more(rule):
    """Where examples go through in eighths, the largest batch is one of whole eights, if eighths are no smaller."""
    setting = widgets.Setting("convnet", 5, 3)

    def held(batch: int) -> int:
        trace = predicted(rule, replace(setting, batch=batch))
        return trace.peak_bytes + trace.resting_bytes

    chain = chain_of(rule, setting)
    for budget in (held(1), held(77), held(301) + 5, held(3001)):
        batch = chain.largest_batch(budget, 6)
        assert held(batch) <= budget < held(batch + (chain.period if batch >= chain.linear_from else 1))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rule", ["bp", "memdfa", "checkpoint"])
def test_a_step_that_is_run_holds_what_is_shown(rule, family, precision):
    """The deep step against the ledger's count of a real one."""
    setting = widgets.Setting(family, 12, 8, 16, batch_norm=True, optimizer="momentum", precision=precision)
    kind, dtype = {**ml.RULES, **ml.BASELINES}[rule], PRECISIONS[precision]
    size = setting.x_shape[1:] if family == "convnet" else setting.inputs
    net = getattr(ml.models, family)(size, [8] * 12, 10, "relu", True).to(dtype)
    made = kind(net, ml.experiments.OPTIMIZERS["momentum"], feedback=ml.feedback.Regenerated())
    x, y = torch.randn(setting.x_shape, dtype=dtype), torch.zeros(16, dtype=torch.long)
    measured, found = ml.memory.measure(made, x, y, warm_up=1), chain_of(rule, setting).step(13, 16)
    assert (found.peak_bytes, found.peak_by_category) == (measured.peak_bytes, measured.peak_by_category)
    assert found.resting_by_category == measured.resting_by_category


@pytest.mark.parametrize("rule", ["fa", "memdfa", "checkpoint_step_in_backward"])
def test_a_deep_one_is_the_whole_networks(rule):
    assert_the_same(rule, widgets.Setting(depth=200, width=20, optimizer="adam", feedback="stored", batch_norm=True))


@pytest.mark.parametrize("depth", [1, 4, 12])
@pytest.mark.parametrize("rule", EVERY)
def test_one_more_example_or_layer_does_not_fit(rule, depth):
    setting = widgets.Setting(depth=depth, width=60, batch=30, inputs=50, optimizer="momentum", feedback="stored")

    def held(depth: int, batch: int) -> int:
        trace = predicted(rule, replace(setting, depth=depth, batch=batch))
        return trace.peak_bytes + trace.resting_bytes

    found = chain_of(rule, setting)
    for budget in (held(depth, 1), held(depth, 30) + 5, held(depth, 3000) + 1):
        batch = found.largest_batch(budget, depth + 1)
        assert held(depth, batch) <= budget < held(depth, batch + 1)
    budget = held(depth, 30)
    blocks = found.deepest(budget, 30, most=100)
    assert held(blocks - 1, 30) <= budget < held(blocks, 30)
    assert found.deepest(10**12, 30, most=100) == 100
    assert found.deepest(1000, 30, most=100) == found.largest_batch(1000, depth + 1) == 0


def test_the_closed_form_says_the_same():
    how = {"feedback": "stored", "optimizer": "adam"}
    for rule in ml.RULES:
        found = chain_of(rule, widgets.Setting(optimizer="adam", feedback="stored"))
        widths = [784, *[800] * 32, 10]
        assert found.largest_batch(2**33, 33) == ml.memory.formula.largest_batch(2**33, rule, widths, **how)
        size = {"batch": 128, "width": 800, "inputs": 784, "classes": 10}
        assert found.deepest(2**33, 128, most=10_000) - 1 == ml.memory.formula.deepest(2**33, rule, **size, **how)


def test_a_batch_norm_net_has_no_batch_of_one():
    norm = widgets.Setting(batch_norm=True)
    for rule in ("bp", "memdfa"):
        least = chain_of(rule, norm).held_bytes(33, 2)
        assert chain_of(rule, norm).largest_batch(least, 33) == 2
        assert chain_of(rule, norm).largest_batch(least - 1, 33) == 0
