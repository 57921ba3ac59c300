"""Nonsense in, one line out: what is wrong, what was expected; no weight or file is changed. And odd but right input.

Each entry of REFUSED is a call and what its message must say; each of COMMANDS the same for the command line.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from problems import BY_NAME, RULE_NAMES, make_rule, rotated
from reference import assert_identical, refuses
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab import cli, figures, memory, widgets
from memdfa_lab.core import feedback
from memdfa_lab.lab import alignment, bench, experiments, models

SGD = partial(torch.optim.SGD, lr=0.1)
MLP, NORM = BY_NAME["mlp_relu"], BY_NAME["batchnorm"]
NAN = math.nan


# ------------------------------------------------------------------------------------------- batches that are none


def ignores_logits(logits: Tensor, y: Tensor) -> Tensor:
    return torch.zeros(())


X, Y = MLP.x, MLP.y
BATCHES = {
    "a list": (X.tolist(), Y, TypeError, "x must be one tensor (N, ...), got a list"),
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
    "labels beyond": (X, Y + 1, ValueError, "int64 from 1 to 5 (labels are int64 (6,) from 0 to 4)"),
    "labels below": (X, Y - 1, ValueError, "from -1 to 3"),
    "float labels": (X, Y.float(), ValueError, "y (6,) torch.float32 (labels are int64 (6,)"),
    "few labels": (X, Y[:4], ValueError, "y (4,) torch.int64"),
    "labels in columns": (X, Y[:, None], ValueError, "y (6, 1) torch.int64"),
    "a list of labels": (X, Y.tolist(), ValueError, "y list"),
    "no labels": (X, None, ValueError, "y NoneType"),
}


def state(learner: ml.Rule) -> list[Tensor]:
    return [p.detach() for p in learner.blocks.parameters()] + learner.tensors()["optimizer state"]


@rotated("batch rule", BATCHES, RULE_NAMES)
def test_a_batch_that_is_none_changes_nothing(batch, rule):
    x, y, error, message = BATCHES[batch]
    learner = make_rule(rule, MLP, "momentum")
    learner.step(X, Y)
    before = copy.deepcopy(state(learner))
    with refuses(error, message):
        learner.step(x, y)
    assert_identical(state(learner), before)
    assert all(p.grad is None for p in learner.blocks.parameters())
    learner.step(X, Y)  # nothing is broken


@pytest.mark.parametrize("loss", [ml.losses.mse, ml.losses.bce])
@pytest.mark.parametrize("y", [Y + 1, Y - 1, Y.float(), Y[:, None]])
def test_labels_that_another_loss_does_not_take(loss, y):
    with refuses(ValueError, "labels are int64 (6,) from 0 to 4", "no weight was changed"):
        ml.MemDFA(MLP.build(), SGD, loss).step(X, y)


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


# --------------------------------------------------------------------------------------------- odd, and still right


@rotated("rule name", RULE_NAMES, ["mlp_relu", "conv_pool", "batchnorm"], turns=2)
def test_strides_do_not_matter(rule, name):
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


# --------------------------------------------------------------------------------------------- calls that are none


def net() -> nn.Module:
    return MLP.build()


def rule() -> ml.Rule:
    return ml.MemDFA(models.build("fc_relu"), SGD)


SPECTRUM, FLAT = partial(figures.feedback, title="", steps=1), np.ones(3)  # of B
REFUSED = {
    # rules
    "loss is a number": (lambda d: ml.BP(net(), SGD, lambda a, b: 1.0).step(X, Y), "got a float"),
    "loss without logits": (lambda d: ml.BP(net(), SGD, ignores_logits).step(X, Y), "made from the logits"),
    # memory
    "steps": (lambda d: memory.measure(rule(), X, steps=-1), "steps must be a whole number from 0 on"),
    "warm-up": (lambda d: memory.measure(rule(), X, warm_up=-1), "warm_up must be a whole number from 0 on"),
    "measure nothing": (lambda d: memory.measure(None, X), "not a NoneType"),
    "measure lists": (lambda d: memory.measure(rule(), X.tolist()), "a batch must be tensors"),
    "predict nothing": (lambda d: memory.predict("bp", None, (6, 8)), "network must be a model"),
    "predict width": (lambda d: memory.predict("bp", net(), (6, 9)), "[6, 9]"),
    "too large": (lambda d: memory.predict("bp", net(), (10**18, 8)), "overflow"),
    "predict optimizer": (lambda d: memory.predict("bp", net(), (6, 8), "sgd"), "partial(torch.optim.SGD"),
    "predict feedback": (lambda d: memory.predict("bp", net(), (6, 8), None, "stored"), "ml.feedback.Stored"),
    # fit
    "fit a model": (lambda d: ml.fit(net(), d, 1), "rule must be a rule, such as ml.MemDFA(model, optimizer)"),
    "fit no data": (lambda d: ml.fit(rule(), None, 1), "not a NoneType"),
    "fit a tensor": (lambda d: ml.fit(rule(), X, 1), "data must be (x, y), a Dataset with a length"),
    "fit seed": (lambda d: ml.fit(rule(), d, 1, seed=-1), "seed must be"),
    "fit scheduler": (lambda d: ml.fit(rule(), d, 1, scheduler=3), "scheduler must be a function"),
    "fit on_epoch": (lambda d: ml.fit(rule(), d, 1, on_epoch=3), "on_epoch must be a function"),
    "output batches": (lambda d: ml.predict(net(), X, 0), "batch_size must be"),
    "output of a list": (lambda d: ml.predict(net(), X.tolist()), "x must be a tensor"),
    "accuracy of none": (lambda d: ml.accuracy(net(), X[:0], Y[:0]), "0 labels, one or more"),
    "accuracy, few": (lambda d: ml.accuracy(net(), X, Y[:3]), "a tensor of 6 labels"),
    "accuracy, columns": (lambda d: ml.accuracy(net(), X, Y[:, None]), "got shape (6, 1)"),
    "accuracy, numbers": (lambda d: ml.accuracy(net(), X, Y.float()), "outputs (6, 5) and y (6,) torch.float32"),
    "accuracy, beyond": (lambda d: ml.accuracy(net(), X, Y + 1), "from 0 to 4; got outputs (6, 5)", "from 1 to 5"),
    "accuracy, one logit": (
        lambda d: ml.accuracy(nn.Linear(8, 1), X, Y > 2),
        "its outputs are (N, C)",
        "outputs (6, 1)",
    ),
    # data
    "no image to build for": (
        lambda d: experiments.make_rule("bp", "fc_relu", replace(d, x_train=X)),
        "no images (N, C",
    ),
    "holdout of numbers": (
        lambda d: replace(d, y_train=d.y_train.float()).holdout(),
        "whole-number labels (N,), got tor",
    ),
    "holdout of columns": (lambda d: replace(d, y_train=d.y_train[:, None]).holdout(), "int64 (300, 1)"),
    "no batch": (lambda d: next(d.batches(301, drop_last=True)), "take batch_size 300 or less"),
    "holdout seed": (lambda d: d.holdout(0.5, seed=-1), "seed must be"),
    # models
    "network": (lambda d: models.build("fc_rlu"), "did you mean 'fc_relu'?"),
    "no width": (lambda d: models.build("784-[0]x3-10"), "must be a whole number from 1 on, got 0"),
    "classes": (lambda d: models.build("fc_relu", classes=0), "classes must be a whole number from 1 on"),
    "model seed": (lambda d: models.build("fc_relu", seed="a"), "seed must be"),
    "model shape": (lambda d: models.build("fc_relu", "abc"), "must be (C, H, W), such as (1, 28, 28), got 'abc'"),
    "initialisation": (lambda d: models.build("fc_relu", initialisation="he_norm"), "did you mean 'he_normal'?"),
    "widths": (lambda d: models.mlp(8, 3, 5), "hidden must be a list"),
    "part of a unit": (lambda d: models.mlp(8, [3.5], 5), "got 3.5"),
    # experiments
    "device": (lambda d: experiments.train("bp", "fc_relu", d, 1, device="cud"), "unknown device 'cud'"),
    "rules": (lambda d: experiments.compare("fc_relu", d, "bp", [0], 1), "rules and seeds must be lists"),
    "no seeds": (lambda d: experiments.compare("fc_relu", d, ["bp"], [], 1), "rules and seeds must be lists"),
    "batch": (lambda d: experiments.profile("bp", "fc_relu", 0), "the batch size must be a whole number from 1 on"),
    "more labels": (lambda d: experiments.confusion(Y, Y + 5, 5), "labels from 0 to 4"),
    "fewer labels": (lambda d: experiments.confusion(Y, Y[:3], 5), "shapes (6,) and (3,)"),
    # bench
    "bench batch": (lambda d: bench.bench("fc_relu", 0), "batch size must be a whole number from 1 on"),
    "bench threads": (lambda d: bench.bench("fc_relu", 2, threads=0), "threads must be a whole number from 1 on"),
    "bench kind": (lambda d: bench.contenders(["dfa"], ["store"]), "did you mean 'stored'?"),
    "convnet shape": (lambda d: models.convnet((28, 28), [8], 10), "the input shape must be (C, H, W)"),
    "convnet filters": (lambda d: models.convnet((1, 28, 28), 8, 10), "filters must be a list"),
    "half a filter": (lambda d: models.convnet((1, 28, 28), [8.5], 10), "must be a whole"),
    "frontier batch": (lambda d: bench.frontier("fc_relu", 0), "batch size must be a whole number from 1 on"),
    "points": (lambda d: bench.frontier("fc_relu", 3, points=1), "points must be a whole number from 2 on"),
    # alignment
    "angles of a model": (lambda d: alignment.angles(net(), X, Y), "rule must be a rule, such as ml.MemDFA(model, opt"),
    "angle of what": (lambda d: alignment.angles(rule(), X, Y, "gradients"), "did you mean 'gradient'?"),
    "responses of none": (lambda d: alignment.responses(None, X, Y), "not a NoneType"),
    "responses to nothing": (lambda d: alignment.responses(rule(), None, Y), "got a NoneType"),
    "follow a model": (lambda d: alignment.follow(net(), d, [1]), "rule must be a rule"),
    "at a number": (lambda d: alignment.follow(rule(), d, 3), "such as [0, 100], not a int"),
    "at nothing": (lambda d: alignment.follow(rule(), d, []), "at is empty"),
    "at before": (lambda d: alignment.follow(rule(), d, [3, -1]), "from 0 on, got -1"),
    "follow batch": (lambda d: alignment.follow(rule(), d, [1], 0), "batch_size must be"),
    "probe": (lambda d: alignment.follow(rule(), d, [1], probe=0), "probe must be a whole number from 1 on"),
    "follow seed": (lambda d: alignment.follow(rule(), d, [1], seed=-1), "seed must be"),
    "before step": (lambda d: alignment.follow(rule(), d, [1], before_step=3), "a function of the rule and the step"),
    # figures: those of tables are below
    "algorithm": (lambda d: figures.algorithm(9), "layers must be a whole number from 1 to 8, got 9"),
    "algorithm's units": (lambda d: figures.algorithm(units=0), "units must be a whole number from 1 on, got 0"),
    "save": (lambda d: figures.save(None, "a"), "figure must be a matplotlib Figure, not a NoneType"),
    "picture": (lambda d: figures.picture("a", "b"), "figure must be a matplotlib Figure"),
    "images": (lambda d: figures.images(X), "images takes data as ml.datasets.load returns it, not a Tensor"),
    "no image": (lambda d: figures.images(d.subset(3)), "there is no training image of class"),
    "no spectrum": (lambda d: SPECTRUM([], FLAT, FLAT, None, pd.DataFrame()), "of one number or more, got a list"),
    "spectrum of none": (lambda d: SPECTRUM(FLAT, None, FLAT, None, pd.DataFrame()), "own must be an array (N)"),
    "spectrum, no angles": (lambda d: SPECTRUM(FLAT, FLAT, FLAT, None, None), "angles must be a pandas table"),
    "spectrum, angles": (lambda d: SPECTRUM(FLAT, FLAT, FLAT, None, pd.DataFrame({"run": [1]})), "lacks step, angle"),
    "rings": (lambda d: figures.peak_against(made("peak_against"), "x", "", [1]), "measured must be a pandas table"),
    "depth": (lambda d: figures.peak_at_depth(made("peak_at_depth"), "a", ""), "depth must be a finite number above 0"),
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
    "size": (lambda d: ml.memory.bytes_of(f"{'9' * 400} GiB"), "the budget must be a size"),
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
    "film, depth": (lambda d: widgets.film("bp", [3]), "depth must be a valid integer, got [3]"),
    "player, batch": (lambda d: widgets.step_player(batch=0), "batch must be greater than or equal to 1, got 0"),
    "player, B": (lambda d: widgets.step_player(feedback=None), "feedback must be a valid string, got None"),
}


@pytest.mark.parametrize("call", REFUSED)
def test_a_call_that_makes_no_sense_gets_one_line(call, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, *hints = REFUSED[call]
    with refuses((TypeError, ValueError, RuntimeError), *hints):
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
    "sweep_summary": ("run", "", ([],)),
    "memory_profiles": ("phase category", "bytes", ()),
    "lifetimes": ("phase category", "storage block bytes", ()),
    "step_profiles": ("phase", "activations", ("bytes",)),
}
TEXTS = {"rule": "bp", "category": "activations", "phase": "forward"}
OF_MANY = ["memory_profiles", "lifetimes", "step_profiles"]


def draw(name: str, table: object) -> object:
    return getattr(figures, name)({"bp": table} if name in OF_MANY else table, *TABLES[name][2])


def made(name: str) -> pd.DataFrame:
    """Return a table of two rows with the columns of a figure, and no others; 100 bytes are a tensor."""
    names, numbers, _ = TABLES[name]
    columns = {one: [TEXTS.get(one, "n")] * 2 for one in names.split()}
    return pd.DataFrame(columns | {one: [100, 200] if one == "bytes" else [1, 2] for one in numbers.split()})


def test_every_figure_is_among_those_whose_input_is_looked_at():
    others = {
        "algorithm",
        "direct_labels",
        "draw_lines",
        "feedback",
        "images",
        "label",
        "legend",
        "marchenko_pastur",
        "panels",
        "picture",
        "save",
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
        with refuses(ValueError, f"column {column} of ", "must have numbers, got 'a'"):
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


def test_spaces_and_letters_of_any_kind_in_a_path(data, tmp_path):
    folder = tmp_path / "größere Ω; $HOME 数据 'q' \"z\""
    for _ in range(2):
        ml.experiments.train("dfa", "fc_relu", data, 1, folder=folder, progress=False)
    assert {"checkpoint.pt", "history.csv"} <= {path.name for path in folder.iterdir()}


# -------------------------------------------------------------------------------------------------- the command line

COMMANDS = {
    "nothing": ([], "required: command"),
    "command": (["trian"], "invalid choice: 'trian'"),
    "text": (["train", "--epochs", "two"], "invalid int value: 'two'"),
    "device": (["train", "--device", "tpu0"], "tpu0"),
    "no epochs": (["train", "--epochs", "0"], "epochs must be"),
    "huge batch": (["profile", "--batch", str(10**15), "--network", "fc_relu"], "allocate memory"),
    "rule": (["train", "--rule", "memdf"], "invalid choice: 'memdf'"),
    "network": (["train", "--network", "fc_rely"], "did you mean 'fc_relu'?"),
    "lr": (["train", "--lr", "nan"], "lr must be"),
    "out": (["train", "--epochs", "1", "--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    "data": (["train", "--dataset", "none.npz"], "no such file"),
    "reproduce out": (["reproduce", "--only", "02", "--out", "/proc/nowhere"], "cannot write into /proc/nowhere"),
    "reproduce only": (["reproduce", "--only", ""], "no notebook ''"),
    "reproduce what": (["reproduce", "--only", "02", "-p", "epoch", "3"], "did you mean 'epochs'?"),
    "reproduce by": (["reproduce", "-p", "epochs", "[1"], "-p takes a value in YAML"),
    "sweep status": (["sweep", "status", "no/such.yaml"], "No such file"),
    "sweep two": (["sweep", "one.yaml", "two.yaml"], "invalid choice: 'one.yaml'"),
    "budget": (["reproduce", "--paper", "--budget", "soon"], "soon"),
    "bench": (["bench", "--network", "fc_rely"], "did you mean 'fc_relu'?"),
    "bench frontier": (["bench", "--frontier", "--rules", "dfa"], "leave out --frontier, or these"),
    "bench threads": (["bench", "--threads", "1", "al"], "expected a whole number from 1 on, or all, got 'al'"),
    "bench networks": (["bench", "--network", "fc_relu", "fc_rely", "--rounds", "-1"], "did you mean 'fc_relu'?"),
    "bench batch": (["bench", "--network", "fc_relu", "--batch", "0"], "batch size must be a whole number from 1 on"),
    "empty network": (["train", "--network", ""], "unknown network ''"),
    "empty model": (["profile", "--model", ""], "unknown network ''"),
    "empty shape": (["profile", "--network", "fc_relu", "--input", ""], "--input goes with --model"),
    "empty budget": (["profile", "--network", "784-[8]x2-10", "--budget", ""], "the budget must be a size"),
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
    assert status == (1 if command == "huge batch" else 2)
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.slow
def test_a_home_that_cannot_be_written_keeps_nobody_from_training(tmp_path):
    (tmp_path / "home").write_text("a file")
    nowhere = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "/proc/nowhere", "MPLCONFIGDIR": str(tmp_path)}
    run = [sys.executable, "-m", "memdfa_lab", "train", "--epochs", "1", "--batch-size", "1000", "--out", "out"]
    done = subprocess.run(run, env={**os.environ, **nowhere}, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
