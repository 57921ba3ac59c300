"""Nonsense in, one line out: what is wrong, what was expected; no weight or file is changed. And odd but right input.

Each entry of REFUSED is a call and what its message must say; each of COMMANDS the same for the command line.
"""

from __future__ import annotations

import copy
import gzip
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from problems import BY_NAME, RULE_NAMES, make_rule, train
from reference import assert_identical, assert_same_training, refuses
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab import cli, figures, memory, widgets
from memdfa_lab.core import feedback
from memdfa_lab.lab import alignment, bench, datasets, experiments, models

SGD = partial(torch.optim.SGD, lr=0.1)
MLP, NORM = BY_NAME["mlp_relu"], BY_NAME["batchnorm"]
NAN = math.nan


@pytest.fixture(scope="module")
def data() -> datasets.Data:
    return datasets.load("mnist5k").subset(50, 20)


# ------------------------------------------------------------------------------------------- batches that are none


def ignores_logits(logits: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(())


X, Y = MLP.x, MLP.y
BATCHES = {
    "a list": (X.tolist(), Y, TypeError, "x must be a dense tensor (N, ...) of real numbers, got a list"),
    "numpy": (X.numpy(), Y, TypeError, "use torch.as_tensor"),
    "nothing": (None, Y, TypeError, "got a NoneType"),
    "complex": (X.cfloat(), Y, TypeError, "torch.complex64"),
    "sparse": (X.to_sparse(), Y, TypeError, "torch.sparse_coo"),
    "no example": (X[:0], Y[:0], ValueError, "one example or more, got shape (0, 8)"),
    "no batch": (X[0], Y[:1], ValueError, "got shape (8,)"),
    "a number": (torch.tensor(1.0), Y[:1], ValueError, "got shape ()"),
    "another width": (X[:, :7], Y, RuntimeError, "6x7"),
    "another dtype": (X.double(), Y, RuntimeError, "same dtype"),
    "integers": (X.long(), Y, RuntimeError, "same dtype"),
    "nan": (X * NAN, Y, FloatingPointError, "x holds NaN or inf; no weight was changed"),
    "inf": (X / 0, Y, FloatingPointError, "x holds NaN or inf"),
    "labels beyond": (X, Y + 1, ValueError, "int64 from 1 to 5 (labels are int64 (6,) from 0 to 4)"),
    "labels below": (X, Y - 1, ValueError, "from -1 to 3"),
    "float labels": (X, Y.float(), ValueError, "y (6,) torch.float32 (labels are int64 (6,)"),
    "few labels": (X, Y[:4], ValueError, "y (4,) torch.int64"),
    "labels in columns": (X, Y[:, None], ValueError, "y (6, 1) torch.int64"),
    "a list of labels": (X, Y.tolist(), ValueError, "y list"),
    "no labels": (X, None, ValueError, "y NoneType"),
}


def held(learner: ml.Rule) -> list[Tensor]:
    return [p.detach() for p in learner.blocks.parameters()] + learner.tensors()["optimizer state"]


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_that_is_none_changes_nothing(batch, rule):
    x, y, error, message = BATCHES[batch]
    learner = make_rule(rule, MLP, "momentum")
    learner.step(X, Y)
    before = copy.deepcopy(held(learner))
    with refuses(error, message):
        learner.step(x, y)
    assert_identical(held(learner), before)
    assert all(p.grad is None for p in learner.blocks.parameters())
    learner.step(X, Y)  # nothing is broken


@pytest.mark.parametrize("loss", [ml.losses.mse, ml.losses.bce])
@pytest.mark.parametrize("y", [Y + 1, Y - 1, Y.float(), Y[:, None]])
def test_labels_that_another_loss_does_not_take(loss, y):
    with refuses(ValueError, "labels are int64 (6,) from 0 to 4", "no weight was changed"):
        ml.MemDFA(MLP.build(), SGD, loss).step(X, y)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_images_without_a_channel_and_a_batch_norm_for_other_shapes_are_told_as_by_torch(rule):
    convolution = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)]
    with refuses(RuntimeError, "6, 8, 8]"):
        ml.RULES[rule](convolution, SGD).step(torch.rand(6, 8, 8), Y)
    with refuses(ValueError, "expected 2D or 3D input (got 4D input)"):
        ml.RULES[rule]([convolution[0], nn.BatchNorm1d(4), *convolution[1:]], SGD).step(torch.rand(6, 1, 8, 8), Y)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_one_example_is_too_few_for_batch_norm_only(rule):
    learner = make_rule(rule, NORM)
    weights = [p.detach().clone() for p in learner.blocks.parameters()]
    with refuses(ValueError, "more than"):
        learner.step(NORM.x[:1], NORM.y[:1])
    assert_identical([p.detach() for p in learner.blocks.parameters()], weights)
    learner.blocks.eval()
    assert torch.isfinite(learner.step(NORM.x[:1], NORM.y[:1]))
    assert torch.isfinite(make_rule(rule, MLP).step(X[:1], Y[:1]))


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_weight_that_is_not_finite_is_refused_before_another_changes(rule, bad):
    learner = make_rule(rule, MLP)
    with torch.no_grad():
        learner.blocks[2].weight[0, 0] = bad
    before = learner.blocks[0][0].weight.detach().clone()
    with refuses(FloatingPointError, "no weight was changed"):
        learner.step(X, Y)
    assert torch.equal(learner.blocks[0][0].weight, before)


# --------------------------------------------------------------------------------------------- odd, and still right


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("name", ["mlp_relu", "conv_pool", "batchnorm"])
def test_strides_do_not_matter(name, rule):
    problem = BY_NAME[name].double()
    apart = torch.stack([problem.x, problem.x], -1)[..., 0]  # every second number
    assert not apart.is_contiguous()
    layouts = [problem.x, apart]
    if problem.x.dim() == 4:
        layouts.append(problem.x.contiguous(memory_format=torch.channels_last))
    learners = [make_rule(rule, problem) for _ in layouts]
    for learner, x in zip(learners, layouts, strict=True):
        learner.step(x, torch.stack([problem.y, problem.y], 1)[:, 0])
    for learner in learners[1:]:
        for one, other in zip(learners[0].blocks.parameters(), learner.blocks.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 2e-2), (torch.bfloat16, 1e-1), (torch.float64, 1e-5)])
def test_other_precisions_learn_the_same(dtype, near, rule):
    one, other = make_rule(rule, MLP), ml.RULES[rule](MLP.build().to(dtype), SGD, feedback=feedback.Stored(3))
    one.step(X, Y), other.step(X.to(dtype), Y)
    for p, q in zip(one.blocks.parameters(), other.blocks.parameters(), strict=True):
        torch.testing.assert_close(p, q.float(), rtol=near, atol=near)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_model_in_eval_mode_trains_and_stays_in_it(rule):
    learner = make_rule(rule, BY_NAME["everything"])
    learner.blocks.eval()
    before = {name: value.clone() for name, value in learner.blocks.named_buffers()}
    assert_same_training(train(learner, BY_NAME["everything"]), train(_eval(rule), BY_NAME["everything"]))
    assert not any(module.training for module in learner.blocks.modules())
    assert_identical(dict(learner.blocks.named_buffers()), before)


def _eval(rule):
    learner = make_rule(rule, BY_NAME["everything"])
    learner.blocks.eval()
    return learner


# --------------------------------------------------------------------------------------------- calls that are none


def lazily() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5))


def net() -> nn.Module:
    return MLP.build()


def rule() -> ml.Rule:
    return ml.MemDFA(models.build("fc_relu"), SGD)


SPECTRUM, FLAT = partial(figures.feedback, title="", steps=1), np.ones(3)  # of B
REFUSED = {
    # rules
    "no loss": (lambda d: ml.BP(net(), SGD, None), "loss_fn must be a function"),
    "loss name": (lambda d: ml.BP(net(), SGD, "mse"), "not 'mse'"),
    "loss is a number": (lambda d: ml.BP(net(), SGD, lambda a, b: 1.0).step(X, Y), "got a float"),
    "loss without logits": (lambda d: ml.BP(net(), SGD, ignores_logits).step(X, Y), "made from the logits"),
    "clip text": (lambda d: ml.BP(net(), SGD, clip_norm="1"), "clip_norm must be"),
    "keep text": (lambda d: ml.MemDFA(net(), SGD, keep_bytes="1"), "keep_bytes must be a finite number from 0 on"),
    "blocks name": (lambda d: ml.BP("fc_relu", SGD), "nn.Sequential or a list of modules, got str"),
    "no blocks": (lambda d: ml.as_blocks([]), "no weight layer"),
    "nothing": (lambda d: ml.as_blocks(None), "got NoneType"),
    "no shape yet": (lambda d: ml.as_blocks(lazily()), "0.weight has no shape yet: run the model once"),
    "complex": (lambda d: ml.as_blocks([nn.Linear(8, 5, dtype=torch.cfloat)]), "weight is torch.complex64"),
    # feedback
    "seed": (lambda d: feedback.Stored(-1), "got -1"),
    "seed text": (lambda d: feedback.Shared("a"), "seed must be"),
    "distribution": (lambda d: feedback.Stored(0, "he_norml"), "did you mean 'he_normal'?"),
    "scale": (lambda d: feedback.Stored(0, scale="2"), "scale must be"),
    "complex scale": (lambda d: feedback.Stored(0, scale=1j), "got 1j"),
    "scale nan": (lambda d: feedback.Regenerated(0, scale=NAN), "got nan"),
    # memory
    "steps": (lambda d: memory.measure(rule(), X, steps=-1), "steps must be a whole number from 0 on"),
    "warm-up": (lambda d: memory.measure(rule(), X, warm_up=-1), "warm_up must be a whole number from 0 on"),
    "measure nothing": (lambda d: memory.measure(None, X), "not a NoneType"),
    "measure lists": (lambda d: memory.measure(rule(), X.tolist()), "a batch is tensors"),
    "predict rule": (lambda d: memory.predict("memdf", net(), (6, 8)), "did you mean 'memdfa'?"),
    "predict network": (lambda d: memory.predict("bp", "fc_rel", (6, 8)), "lambda: ml.models.build"),
    "predict nothing": (lambda d: memory.predict("bp", None, (6, 8)), "network must be a model"),
    "predict no model": (lambda d: memory.predict("bp", lambda: 3, (6, 8)), "got 3"),
    "shape is a number": (lambda d: memory.predict("bp", net(), 6), "x_shape must be the shape of a batch"),
    "no batch": (lambda d: memory.predict("bp", net(), (0, 8)), "a size in x_shape must be a whole number from 1 on"),
    "negative": (lambda d: memory.predict("bp", net(), (-6, 8)), "got -6"),
    "predict width": (lambda d: memory.predict("bp", net(), (6, 9)), "[6, 9]"),
    "too large": (lambda d: memory.predict("bp", net(), (10**18, 8)), "overflow"),
    "predict optimizer": (lambda d: memory.predict("bp", net(), (6, 8), "sgd"), "partial(torch.optim.SGD"),
    "predict feedback": (lambda d: memory.predict("bp", net(), (6, 8), None, "stored"), "ml.feedback.Stored"),
    # fit
    "fit a model": (lambda d: ml.fit(net(), d, 1), "rule must be a rule, such as ml.MemDFA(model, optimizer)"),
    "fit no data": (lambda d: ml.fit(rule(), None, 1), "not a NoneType"),
    "fit a tensor": (lambda d: ml.fit(rule(), X, 1), "fit takes data as ml.datasets.load returns it"),
    "fit epochs": (lambda d: ml.fit(rule(), d, 0), "epochs must be"),
    "fit seed": (lambda d: ml.fit(rule(), d, 1, seed=-1), "seed must be"),
    "fit scheduler": (lambda d: ml.fit(rule(), d, 1, scheduler=3), "scheduler must be a function"),
    "fit on_epoch": (lambda d: ml.fit(rule(), d, 1, on_epoch=3), "on_epoch must be a function"),
    "output batches": (lambda d: ml.predict(net(), X, 0), "batch_size must be"),
    "output of a list": (lambda d: ml.predict(net(), X.tolist()), "x must be a tensor"),
    "accuracy of none": (lambda d: ml.accuracy(net(), X[:0], Y[:0]), "0 labels, one or more"),
    "accuracy, few": (lambda d: ml.accuracy(net(), X, Y[:3]), "a tensor of 6 labels"),
    "accuracy, columns": (lambda d: ml.accuracy(net(), X, Y[:, None]), "got shape (6, 1)"),
    # data
    "data name": (lambda d: datasets.load("MNIST"), "did you mean 'mnist'?"),
    "data number": (lambda d: datasets.load(3), "unknown data set 3"),
    "data shape": (lambda d: datasets.load("mnist5k", shape=(1, 20, 20)), "cannot be had as (1, 20, 20)"),
    "data shape, one": (lambda d: datasets.load("mnist5k", shape=28), "cannot be had as (28,)"),
    "subset": (lambda d: d.subset(51), "subset of 51 images: mnist5k has 1 to 50"),
    "part of an image": (lambda d: d.subset(1.5), "whole number from 1 on, got 1.5"),
    "holdout": (lambda d: d.holdout("a"), "a fraction of a cannot split"),
    "holdout seed": (lambda d: d.holdout(0.5, seed=-1), "seed must be"),
    # models
    "network": (lambda d: models.build("fc_rlu"), "did you mean 'fc_relu'?"),
    "no width": (lambda d: models.build("784-[0]x3-10"), "must be a whole number from 1 on, got 0"),
    "classes": (lambda d: models.build("fc_relu", classes=0), "classes must be a whole number from 1 on"),
    "model seed": (lambda d: models.build("fc_relu", seed="a"), "seed must be"),
    "model shape": (lambda d: models.build("fc_relu", "abc"), "must be (C, H, W), such as (1, 28, 28), got 'abc'"),
    "image too small": (lambda d: models.build("mnist_conv", (1, 2, 2)), "too small"),
    "initialisation": (lambda d: models.build("fc_relu", initialisation="he_norm"), "did you mean 'he_normal'?"),
    "widths": (lambda d: models.mlp(8, 3, 5), "hidden must be a list"),
    "part of a unit": (lambda d: models.mlp(8, [3.5], 5), "got 3.5"),
    # experiments
    "rule": (lambda d: experiments.train("memdf", "fc_relu", d, 1), "did you mean 'memdfa'?"),
    "lr": (lambda d: experiments.train("bp", "fc_relu", d, 1, lr=NAN), "lr must be"),
    "decay": (lambda d: experiments.train("bp", "fc_relu", d, 1, weight_decay=-1), "weight_decay must be"),
    "loss": (lambda d: experiments.train("bp", "fc_relu", d, 1, loss="mae"), "did you mean 'mse'?"),
    "optimizer": (lambda d: experiments.train("bp", "fc_relu", d, 1, optimizer="adm"), "did you mean 'adam'?"),
    "device": (lambda d: experiments.train("bp", "fc_relu", d, 1, device="cud"), "device 'cud' is not there"),
    "rules": (lambda d: experiments.compare("fc_relu", d, "bp", [0], 1), "rules and seeds are lists"),
    "no seeds": (lambda d: experiments.compare("fc_relu", d, ["bp"], [], 1), "rules and seeds are lists"),
    "batch": (lambda d: experiments.profile("bp", "fc_relu", 0), "the batch size must be a whole number from 1 on"),
    "more labels": (lambda d: experiments.confusion(Y, Y + 5, 5), "labels from 0 to 4"),
    "fewer labels": (lambda d: experiments.confusion(Y, Y[:3], 5), "shapes (6,) and (3,)"),
    # bench
    "bench batch": (lambda d: bench.bench("fc_relu", 0), "batch size must be a whole number from 1 on"),
    "bench kind": (lambda d: bench.contenders(["dfa"], ["store"]), "did you mean 'stored'?"),
    "convnet shape": (lambda d: models.convnet((28, 28), [8], 10), "the input shape must be (C, H, W)"),
    "convnet filters": (lambda d: models.convnet((1, 28, 28), 8, 10), "filters must be a list"),
    "half a filter": (
        lambda d: models.convnet((1, 28, 28), [8.5], 10),
        "must be a whole",
    ),
    "points": (lambda d: bench.frontier("fc_relu", 3, points=1), "points must be a whole number from 2 on"),
    # alignment
    "angles of a model": (lambda d: alignment.angles(net(), X, Y), "rule must be a rule, such as ml.MemDFA(model, opt"),
    "angle of what": (lambda d: alignment.angles(rule(), X, Y, "gradients"), "did you mean 'gradient'?"),
    "angles of lists": (lambda d: alignment.angles(rule(), X.tolist(), Y), "got a list: use torch.as_tensor"),
    "angles, no labels": (lambda d: alignment.angles(ml.MemDFA(net(), SGD), X, None), "y NoneType"),
    "responses of none": (lambda d: alignment.responses(None, X, Y), "not a NoneType"),
    "responses to nothing": (lambda d: alignment.responses(rule(), None, Y), "got a NoneType"),
    "follow a model": (lambda d: alignment.follow(net(), d, [1]), "rule must be a rule"),
    "follow no data": (lambda d: alignment.follow(rule(), X, [1]), "follow takes data as ml.datasets.load returns it"),
    "at a number": (lambda d: alignment.follow(rule(), d, 3), "such as [0, 100], not a int"),
    "at nothing": (lambda d: alignment.follow(rule(), d, []), "at is empty"),
    "at text": (lambda d: alignment.follow(rule(), d, "10"), "in at must be a whole number from 0 on, got '1'"),
    "at before": (lambda d: alignment.follow(rule(), d, [3, -1]), "from 0 on, got -1"),
    "follow batch": (lambda d: alignment.follow(rule(), d, [1], 0), "batch_size must be"),
    "probe": (lambda d: alignment.follow(rule(), d, [1], probe=0), "probe must be a whole number from 1 on"),
    "follow seed": (lambda d: alignment.follow(rule(), d, [1], seed=-1), "seed must be"),
    "before step": (lambda d: alignment.follow(rule(), d, [1], before_step=3), "a function of the rule and the step"),
    # figures: those of tables are below
    "save": (lambda d: figures.save(None, "a"), "figure must be a matplotlib Figure, not a NoneType"),
    "picture": (lambda d: figures.picture("a", "b"), "figure must be a matplotlib Figure"),
    "images": (lambda d: figures.images(X), "images takes data as ml.datasets.load returns it, not a Tensor"),
    "no image": (lambda d: figures.images(d.subset(3)), "there is no training image of class"),
    "signals": (lambda d: figures.signal_images({"B": FLAT}), "rows['B'] must be an array (channels, H, W)"),
    "no signals": (lambda d: figures.signal_images({}), "rows is empty"),
    "no spectrum": (lambda d: SPECTRUM([], FLAT, FLAT, None, pd.DataFrame()), "of one number or more, got a list"),
    "spectrum of none": (lambda d: SPECTRUM(FLAT, None, FLAT, None, pd.DataFrame()), "own must be an array (N)"),
    "spectrum, no angles": (lambda d: SPECTRUM(FLAT, FLAT, FLAT, None, None), "angles must be a pandas table"),
    "spectrum, angles": (lambda d: SPECTRUM(FLAT, FLAT, FLAT, None, pd.DataFrame({"run": [1]})), "lacks step, angle"),
    "spectrum's width": (lambda d: figures.spectrum(made("spectrum"), 1, 7), "no row of n with width 7"),
    "rings": (lambda d: figures.peak_against(made("peak_against"), "x", "", [1]), "measured must be a pandas table"),
    "depth": (lambda d: figures.peak_at_depth(made("peak_at_depth"), "a", ""), "depth must be a finite number above 0"),
    "whose pipeline": (lambda d: figures.pipelines({"memdf": made("pipelines")}), "did you mean 'memdfa'?"),
    "pipeline's batch": (lambda d: figures.pipelines({"bp": made("pipelines")}, 2), "batch 2 or the one after it"),
    "no block": (lambda d: figures.lifetimes({"bp": made("lifetimes").assign(block=NAN)}), "has no tensor of a block"),
    "filled by what": (lambda d: figures.step_profiles({"bp": made("step_profiles").assign(eror=1)}, ""), "'error'?"),
    "varied": (lambda d: figures.sweep_summary(made("sweep_summary"), "lr"), "varied must be a list of parameters"),
    # explorers
    "setting": (lambda d: widgets.explore(3), "setting must be an ml.widgets.Setting, not a int"),
    "no setting": (lambda d: widgets.memory_explorer(""), "setting must be an ml.widgets.Setting, not a str"),
    "what to set": (lambda d: widgets.explore(dept=3), "did you mean 'depth'?"),
    "setting's depth": (lambda d: widgets.memory_explorer(depth="a"), "depth must be a valid integer, got 'a'"),
    "one rule": (lambda d: widgets.Setting(rules="bp"), "rules must be a valid tuple, got 'bp'"),
    "rules, a number": (lambda d: widgets.explore(rules=3), "rules must be a valid tuple, got 3"),
    "norm": (lambda d: widgets.memory_explorer(batch_norm="no"), "batch_norm must be a valid boolean, got 'no'"),
    "budget": (lambda d: widgets.memory_explorer(budget=8), "budget must be a valid string, got 8"),
    "size": (lambda d: widgets.bytes_of(f"{'9' * 400} GiB"), "the budget must be a size"),
    "matrix": (lambda d: widgets.feedback_explorer(3), "matrix must be an ml.widgets.Matrix, not a int"),
    "matrix, what": (lambda d: widgets.feedback_explorer(widht=3), "did you mean 'width'?"),
    "matrix, half": (lambda d: widgets.Matrix(outputs=1.5), "outputs must be a valid integer, got 1.5"),
    "matrix, scale": (lambda d: widgets.Matrix(scale=None), "scale must be a valid number, got None"),
    "matrix, rule": (lambda d: widgets.Matrix(rule="bp"), "unknown rule 'bp'"),
    "race without data": (lambda d: widgets.Race(None), "Race takes data as ml.datasets.load returns it"),
    "race, no rule": (lambda d: widgets.Race(d, rules=()), "no rule is chosen"),
    "race, whose": (lambda d: widgets.Race(d, rules=["memdf"]), "did you mean 'memdfa'?"),
    "race, what": (lambda d: widgets.Race(d, layer=2), "did you mean 'layers'?"),
    "race, layers": (lambda d: widgets.Race(d, layers=0), "layers must be greater than or equal to 1, got 0"),
    "race, lr": (lambda d: widgets.Race(d, lr=NAN), "lr must be"),
    "race, storage": (lambda d: widgets.Race(d, storage="store"), "did you mean 'stored'?"),
    "live, setting": (lambda d: widgets.live_training("fast"), "must be an ml.widgets.RaceSetting, not a str"),
    "live, width": (lambda d: widgets.live_training(width=16_385), "width must be less than or equal to 16384"),
    "live, seed": (lambda d: widgets.live_training(seed=-1), "seed must be greater than or equal to 0, got -1"),
    "film": (lambda d: widgets.film("memdf"), "did you mean 'memdfa'?"),
    "film, layers": (lambda d: widgets.film("bp", [3]), "layers must be a valid integer, got [3]"),
    "player, batch": (lambda d: widgets.step_player(batch=0), "batch must be greater than or equal to 1, got 0"),
    "player, B": (lambda d: widgets.step_player(feedback=None), "feedback must be a valid string, got None"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_call_that_makes_no_sense_gets_one_line(call, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = REFUSED[call]
    with refuses((TypeError, ValueError, RuntimeError), message):
        make(data)
    assert list(tmp_path.rglob("*")) == []


# ---------------------------------------------------------------------------------------------- figures of tables

TABLES: dict[str, tuple[str, str, tuple]] = {  # figure -> columns of names, of numbers, what follows the table
    "lines": ("rule", "x y", ("x", "y")),
    "learning_curves": ("rule", "epoch loss test_accuracy", ()),
    "live_curves": ("rule", "step loss accuracy angle_deg", ()),
    "alignment": ("rule block", "step gradient_deg", ()),
    "peak_against": ("rule", "x peak_bytes", ("x", "x")),
    "peak_at_depth": ("rule", "depth bytes", (1, "bytes")),
    "peak_fillings": ("rule", "activations", ()),
    "frontier": ("network batch_size rule feedback", "ratio ratio_low ratio_high peak_bytes", ()),
    "block_angles": ("network rule layer", "block before_deg after_deg", ()),
    "spectrum": ("distribution", "width draw value", (1, 1)),
    "sweep_summary": ("run", "", ([],)),
    "memory_profiles": ("phase category", "bytes", ()),
    "lifetimes": ("phase category", "storage block bytes", ()),
    "step_profiles": ("phase", "activations", ("bytes",)),
    "pipelines": ("task", "machine batch start end", ()),
}
TEXTS = {"rule": "bp", "category": "activations", "task": "forward", "phase": "forward"}
OF_MANY = ["memory_profiles", "lifetimes", "step_profiles", "pipelines"]


def draw(name: str, table: object) -> object:
    return getattr(figures, name)({"bp": table} if name in OF_MANY else table, *TABLES[name][2])


def made(name: str) -> pd.DataFrame:
    """Return a table of two rows with the columns of a figure, and no others; 100 bytes are a tensor."""
    names, numbers, _ = TABLES[name]
    columns = {one: [TEXTS.get(one, "n")] * 2 for one in names.split()}
    return pd.DataFrame(columns | {one: [100, 200] if one == "bytes" else [1, 2] for one in numbers.split()})


def test_every_figure_is_among_those_whose_input_is_looked_at():
    others = {
        "draw_lines",
        "feedback",
        "images",
        "legend",
        "marchenko_pastur",
        "panels",
        "picture",
        "save",
        "signal_images",
    }
    assert {name for name in figures.__all__ if callable(getattr(figures, name))} == {*TABLES, *others}


@pytest.mark.parametrize("name", TABLES)
def test_a_figure_takes_its_columns_and_a_table_without_one_makes_no_sense(name):
    table = made(name)
    draw(name, table)
    for column in table:
        with refuses(ValueError, " lacks "):
            draw(name, table.drop(columns=column))
    for column in TABLES[name][1].split():
        with refuses(ValueError, f"column {column} of ", "must be of numbers, and has 'a'"):
            draw(name, table.assign(**{column: ["a", 1]}))
    with refuses(ValueError, "has no row"):
        draw(name, table[:0])
    with refuses(TypeError, "must be a pandas table"):
        draw(name, [])
    if "rule" in table and name not in ("alignment", "lines"):  # which take other names, too
        with refuses(ValueError, "unknown rule 'memdf'; did you mean 'memdfa'?"):
            draw(name, table.assign(rule="memdf"))


@pytest.mark.parametrize("name", OF_MANY)
def test_no_table_at_all_makes_no_sense_to_a_figure(name):
    with refuses(ValueError, "is empty"):
        getattr(figures, name)({}, *TABLES[name][2])
    with refuses(TypeError, "must be a dict"):
        getattr(figures, name)(made(name), *TABLES[name][2])


# --------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("place", ["file/run.pt", "/proc/nowhere/run.pt", "/proc/run.pt"])
def test_a_folder_that_cannot_be_written_is_said_before_training(place, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    learner, steps = rule(), []
    learner.step = lambda x, y: steps.append(1)
    with refuses(ValueError, "cannot write into", "choose another folder"):
        ml.fit(learner, data, 1, checkpoint=tmp_path / place)
    assert steps == []
    assert (tmp_path / "file").read_text() == "mine"


def test_a_checkpoint_that_is_a_folder_is_not_called_damaged(data, tmp_path):
    with refuses(ValueError, "is a folder: name a file in it"):
        ml.fit(rule(), data, 1, checkpoint=tmp_path)


def test_spaces_and_letters_of_any_kind_in_a_path(data, tmp_path):
    folder = tmp_path / "größere Ω; $HOME 数据 'q' \"z\""
    for _ in range(2):
        ml.experiments.train("dfa", "fc_relu", data, 1, folder=folder, progress=False)
    assert {"checkpoint.pt", "history.csv"} <= {path.name for path in folder.iterdir()}
    np.savez(folder / "d.npz", **{k: getattr(data, k).numpy()[:50] for k in datasets.KEYS})


@pytest.mark.parametrize("content", ["text", "idx", "cut", "zip", "other", "tensor", "foreign"])
def test_a_checkpoint_that_is_none_stays_as_it_is(content, data, tmp_path):
    path = tmp_path / "run.pt"
    ml.fit(rule(), data, 1, checkpoint=path)
    whole = path.read_bytes()
    written = {
        "text": b"hello\n",
        "idx": b"\x00\x00\x08\x03" + bytes(100),
        "cut": whole[: len(whole) // 2],
        "zip": whole[:-50] + bytes(50),
        "other": gzip.compress(whole),
    }
    if content in written:
        path.write_bytes(written[content])
    else:
        torch.save(torch.ones(3) if content == "tensor" else {"model": net().state_dict(), "epoch": 3}, path)
    before = path.read_bytes()
    learner = rule()
    weights = [p.detach().clone() for p in learner.blocks.parameters()]
    with refuses(ValueError, "run.pt is damaged or not a checkpoint", "start anew with overwrite=True"):
        ml.fit(learner, data, 1, checkpoint=path)
    assert path.read_bytes() == before
    assert_identical([p.detach() for p in learner.blocks.parameters()], weights)


def test_every_truncation_and_many_flips_of_a_checkpoint_are_refused_or_right(data, tmp_path):
    """Bytes that hold no value may change unnoticed; a value never does: torch's archive has checksums."""
    path = tmp_path / "run.pt"
    expected = ml.fit(rule(), data, 1, checkpoint=path).rows
    whole = path.read_bytes()
    generator, refused = np.random.default_rng(0), []
    weights = [p.clone() for p in _loaded(path, data)]
    for at in generator.integers(0, len(whole), 40):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            path.write_bytes(damaged)
            try:
                learner = rule()
                rows = ml.fit(learner, data, 1, checkpoint=path).rows
            except ValueError as problem:
                refused.append(str(problem))
            else:
                assert rows == expected
                assert_identical([p.detach() for p in learner.blocks.parameters()], weights)
    assert len(refused) > 40
    assert not any("\n" in message for message in refused)


def _loaded(path: Path, data: datasets.Data) -> list[Tensor]:
    learner = rule()
    ml.fit(learner, data, 1, checkpoint=path)
    return [p.detach() for p in learner.blocks.parameters()]


# -------------------------------------------------------------------------------------------------- the command line

COMMANDS = {
    "no epochs": (["train", "--epochs", "0"], "epochs must be"),
    "batch": (["train", "--batch-size", "-3"], "batch_size must be"),
    "huge batch": (["profile", "--batch", str(10**15), "--network", "fc_relu"], "allocate memory"),
    "rule": (["train", "--rule", "memdf"], "invalid choice: 'memdf'"),
    "network": (["train", "--network", "fc_rely"], "did you mean 'fc_relu'?"),
    "lr": (["train", "--lr", "nan"], "lr must be"),
    "lr inf": (["train", "--lr", "inf"], "lr must be"),
    "clip": (["train", "--clip-norm", "0"], "clip_norm must be"),
    "scale": (["train", "--scale", "inf"], "scale must be"),
    "seed": (["train", "--seed", "-1"], "seed must be"),
    "out": (["train", "--epochs", "1", "--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    "data": (["train", "--dataset", "none.npz"], "no such file"),
    "reproduce out": (["reproduce", "--only", "02", "--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    "reproduce only": (["reproduce", "--only", ""], "no notebook ''"),
    "budget": (["reproduce", "--paper", "--budget", "soon"], "soon"),
    "bench": (["bench", "--network", "fc_rely"], "did you mean 'fc_relu'?"),
    "bench frontier": (["bench", "--frontier", "--rules", "dfa"], "leave out --rules, or --frontier"),
    "bench networks": (["bench", "--network", "fc_relu", "fc_rely", "--rounds", "-1"], "did you mean 'fc_relu'?"),
    "bench batch": (["bench", "--network", "fc_relu", "--batch", "0"], "batch size must be a whole number from 1 on"),
    "bench rounds": (["bench", "--network", "fc_relu", "--rounds", "-1"], "rounds must be a whole number from 1 on"),
    "profile": (["profile", "--network", "784-[0]x3-10"], "must be a whole number from 1 on"),
    "csv": (
        ["profile", "--network", "784-[8]x2-10", "--predict", "--csv", "/proc/nowhere/a.csv"],
        "cannot write into /proc/nowhere",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_makes_no_sense_gets_one_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, message = COMMANDS[command]
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status in (1, 2)
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert list(tmp_path.rglob("*")) == []


def test_a_home_that_cannot_be_written_keeps_nobody_from_training(tmp_path):
    (tmp_path / "home").write_text("a file")
    nowhere = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "/proc/nowhere", "MPLCONFIGDIR": str(tmp_path)}
    run = [sys.executable, "-c", "from memdfa_lab.cli import main; import sys; sys.exit(main())", "train"]
    run += ["--epochs", "1", "--batch-size", "1000", "--out", str(tmp_path / "out")]
    done = subprocess.run(run, env={**os.environ, **nowhere}, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    run += ["--dataset", "mnist"]
    env = {**os.environ, **nowhere, "MEMDFA_DATA": ""}
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot download mnist" in done.stderr
