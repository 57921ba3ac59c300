"""What a network learns: each task against a loop of plain autograd, its metrics, and labels that do not fit."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import small_data
import torch
import torch.nn.functional as F
import torchmetrics
from problems import rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

import memdfa_lab as ml
from memdfa_lab.lab.datasets import order
from memdfa_lab.lab.evaluation import metrics_of

SGD = partial(torch.optim.SGD, lr=0.1)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X, WORDS = draw(48, 6), torch.randint(7, (48, 5), generator=torch.Generator().manual_seed(6))
IMAGES = draw(48, 2, 4, 6)
CLASS = X[:, :4].argmax(1)


class Embedded(nn.Linear):
    """Words (N, T) as rows of a table, and a layer on each of them (N, T, 6)."""

    def __init__(self) -> None:
        super().__init__(3, 6)
        self.table = nn.Embedding(7, 3)

    def forward(self, words: Tensor) -> Tensor:
        return torch.tanh(super().forward(self.table(words)))


class ClassesFirst(nn.Linear):
    """A layer on each of (N, T, 6), that puts out (N, V, T)."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).movedim(-1, 1)


def dense(outputs: int) -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)]


def share(found: Tensor, y: Tensor) -> float:
    return (found == y).double().mean().item()


@dataclass
class Case:
    """A task: layers, x, y, loss, and the accuracy, if it has one, of outputs and y."""

    task: str
    layers: Callable[[], list[nn.Module]]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    accuracy: Callable[[Tensor, Tensor], float] | None = None

    def net(self) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return nn.Sequential(*self.layers())

    def rule(self, rule: str = "memdfa", loss: Any = None, **options: Any) -> ml.Rule:
        return ml.RULES[rule](self.net(), SGD, loss or self.loss, **options)

    def fit(self, rule: ml.Rule, epochs: int = 3, **options: Any) -> ml.History:
        given = {"test": (self.x[40:], self.y[40:]), "task": None if self.loss in KNOWN else self.task, **options}
        return ml.fit(rule, (self.x[:40], self.y[:40]), epochs, 8, progress=False, **given)


def unknown(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def sixth(logits: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits[:, 0], y.float())


def largest(output: Tensor, y: Tensor) -> float:
    return share(output.argmax(1), y)


def signs(output: Tensor, y: Tensor) -> float:
    return share(output > 0, y > 0)


def found_of_those_that_count(output: Tensor, y: Tensor) -> float:
    return share(output.argmax(1)[y >= 0], y[y >= 0])


BCE, NEXT = F.binary_cross_entropy_with_logits, (WORDS + 1) % 7
PIXELS = IMAGES.argmax(1) + 2 * (IMAGES[:, 0] > 0.5)
CASES = {
    "classes": Case("classification", lambda: dense(4), X, CLASS, F.cross_entropy, largest),
    "one-hot": Case("classification", lambda: dense(4), X, CLASS, ml.losses.mse, largest),
    "ignored": Case(
        "classification",
        lambda: dense(4),
        X,
        torch.where(CLASS == 3, -100, CLASS),
        nn.CrossEntropyLoss(),
        found_of_those_that_count,
    ),
    "said": Case("classification", lambda: dense(4), X, CLASS, unknown, largest),
    "one logit": Case("binary", lambda: dense(1), X, (X[:, :1] > 0).float(), BCE, signs),
    "one logit, said": Case(
        "binary", lambda: dense(1), X, (X[:, 0] > 0).long(), sixth, lambda o, y: share(o[:, 0] > 0, y > 0)
    ),
    "several labels": Case(
        "multilabel",
        lambda: dense(4),
        X,
        (X[:, :4] > 0).float(),
        nn.BCEWithLogitsLoss(),
        signs,
    ),
    "numbers": Case("regression", lambda: dense(2), X, X[:, :2] * X[:, 2:4], F.mse_loss),
    "numbers, L1": Case("regression", lambda: dense(1), X, X[:, :1] * X[:, 1:2], nn.SmoothL1Loss()),
    "probabilities": Case("soft labels", lambda: dense(4), X, X[:, :4].softmax(1), F.cross_entropy),
    "pixels": Case(
        "segmentation",
        lambda: [nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)],
        IMAGES,
        PIXELS,
        F.cross_entropy,
        largest,
    ),
    "words": Case(
        "tokens",
        lambda: [Embedded(), nn.Linear(6, 7)],
        WORDS,
        NEXT,
        ml.losses.token_cross_entropy,
        lambda o, y: share(o.argmax(2), y),
    ),
    "words, classes first": Case(
        "tokens",
        lambda: [Embedded(), ClassesFirst(6, 7)],
        WORDS,
        NEXT,
        F.cross_entropy,
        largest,
    ),
}
KNOWN = [case.loss for case in CASES.values() if case.loss not in (unknown, sixth)]


def plainly(case: Case, epochs: int) -> tuple[list[dict[str, float]], nn.Module]:
    """Train by plain autograd, in the order of `ml.fit`, and return its rows and the network."""
    net, rows = case.net(), []
    optimizer = SGD(net.parameters())
    for epoch in range(epochs):
        total = 0.0
        for chosen in order(40, 0, epoch).split(8):
            optimizer.zero_grad()
            loss = case.loss(net(case.x[chosen]), case.y[chosen])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        row = {"epoch": epoch + 1, "loss": total / 40}
        with torch.no_grad():
            for part, chosen in (("train", slice(40)), ("test", slice(40, 48))):
                output = net(case.x[chosen])
                if case.accuracy is not None:
                    row[f"{part}_accuracy"] = case.accuracy(output, case.y[chosen])
                row[f"{part}_loss"] = case.loss(output, case.y[chosen]).item()
        rows.append(row)
    return rows, net


@pytest.mark.parametrize("name", CASES)
def test_bp_is_a_loop_of_plain_autograd(name):
    case, rule = CASES[name], CASES[name].rule("bp")
    expected, net = plainly(case, 3)
    found = case.fit(rule, metrics={"loss": case.loss}).rows
    for row, other in zip(found, expected, strict=True):
        assert row.keys() - {"seconds"} == other.keys()
        assert {key: row[key] for key in other} == pytest.approx(other, rel=1e-5)
    for tensor, other in zip(rule.blocks.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(tensor, other)
    assert expected[-1]["loss"] < expected[0]["loss"]


@pytest.mark.parametrize("name", CASES)
def test_dfa_and_mem_dfa_learn_each_task_alike(name):
    case, rules = CASES[name], [CASES[name].rule(rule) for rule in ("dfa", "memdfa")]
    rows = [case.fit(rule).table.drop(columns="seconds") for rule in rules]
    assert rows[0].equals(rows[1])
    assert_identical(*(rule.state_dict()["blocks"] for rule in rules))


# labels that are not the task's

BAD = {  # case -> changes to y, x, the rest, what is said
    "a class too many": ("classes", lambda y: y + 1, {}, "y is whole numbers (N,) from 0 to 3", "from 1 to 4"),
    "floats": ("classes", Tensor.float, {}, "'classification'", "y (40,) torch.float32 from 0 to 3: correct y"),
    "below": ("ignored", lambda y: y - 1, {}, "from 0 to 3", "from -101 to"),
    "two": ("one logit", lambda y: 2 * y, {}, "'binary'", "each 0 or 1", "from 0 to 2"),
    "halves, said": ("several labels", lambda y: y / 2, {"task": "multilabel"}, "(N, K), each 0 or 1", "from 0 to 0.5"),
    "sums": ("probabilities", lambda y: y / 2, {}, "floats that sum to 1"),
    "another width": ("numbers", lambda y: y[:, :1], {}, "'regression'", "y (40, 1)", "outputs (8, 2)"),
    "pixels": ("pixels", lambda y: y[:, :3], {}, "whole numbers (N, H, W) from 0 to 3", "y (40, 3, 6)"),
    "a word too many": ("words", lambda y: y + 1, {}, "'tokens'", "whole numbers (N, T) from 0 to 6", "from 1 to 7"),
    "another task": ("classes", lambda y: y, {"task": "regression"}, "'regression'", "real numbers of that shape"),
    "no task": ("classes", lambda y: y, {"task": "classify"}, "unknown task", "did you mean 'classification'?"),
    "one class": ("classes", lambda y: y, {"task": "binary"}, "'binary'", "(N, 1) or (N,)", "got outputs (8, 4)"),
}


@rotated("bad rule", BAD, ml.RULES)
def test_labels_that_are_not_the_tasks_are_refused_before_the_first_step(bad, rule):
    name, change, options, *hints = BAD[bad]
    case = copy.copy(CASES[name])
    case.y = change(case.y)
    made = case.rule(rule)
    with refuses_and_keeps(made, ValueError, *hints):
        case.fit(made, **options)


def test_labels_to_test_on_are_looked_at_too():
    case = CASES["pixels"]
    with refuses_and_keeps(case.rule(), ValueError, "y_test is whole numbers (N, H, W) from 0 to 3", "from 9 to 9"):
        case.fit(case.rule(), test=(case.x[40:], torch.full_like(case.y[40:], 9)))


def test_of_a_loss_nobody_knows_nothing_is_assumed():
    case = CASES["said"]
    assert list(case.fit(case.rule(), task=None).table) == ["epoch", "loss", "seconds"]
    assert "test_accuracy" in case.fit(case.rule()).table


def test_without_test_data_what_is_of_them_is_nan():
    row = CASES["classes"].fit(CASES["classes"].rule(), 1, test=None, metrics={"loss": F.cross_entropy}).rows[0]
    assert math.isnan(row["test_accuracy"])
    assert math.isnan(row["test_loss"])
    assert row["train_loss"] > 0


# metrics

METRICS = {
    "classes": partial(torchmetrics.F1Score, "multiclass", num_classes=4, average="macro"),
    "one logit": partial(torchmetrics.AUROC, "binary"),
    "several labels": partial(torchmetrics.AUROC, "multilabel", num_labels=4),
    "numbers": partial(torchmetrics.R2Score),
    "pixels": partial(torchmetrics.JaccardIndex, "multiclass", num_classes=4),
    "words": partial(torchmetrics.Accuracy, "multiclass", num_classes=7, average="micro"),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_torchmetrics_are_those_of_all_outputs(name):
    case, made = CASES[name], CASES[name].rule()
    row = case.fit(made, metrics={"theirs": METRICS[name]()}).rows[-1]
    for part, chosen in (("train", slice(40)), ("test", slice(40, 48))):
        output, y = ml.predict(made, case.x[chosen]), case.y[chosen]
        theirs = METRICS[name]()
        theirs.update(output.movedim(-1, 1) if name == "words" else output, y if name == "numbers" else y.long())
        assert row[f"{part}_theirs"] == pytest.approx(theirs.compute().item())
    if name == "words":
        assert row["test_theirs"] == pytest.approx(row["test_accuracy"])


class Vector:
    """A metric of two numbers."""

    def update(self, output: Tensor, y: Tensor) -> None:
        pass

    def compute(self) -> Tensor:
        return torch.ones(2)

    def reset(self) -> None:
        pass


REFUSED = {
    "of another task": ("numbers", torchmetrics.Accuracy("multiclass", num_classes=4), "does not fit outputs (40, 2)"),
    "too few classes": ("words", torchmetrics.Accuracy("multiclass", num_classes=3), "for tokens"),
    "two numbers": ("classes", Vector(), "returns one number"),
    "a function of one": ("classes", torch.sum, "metrics['mine'] does not fit"),
    "a class": ("classes", torchmetrics.R2Score, "such as torchmetrics.AUROC(...)", "R2Score'>"),
    "a name": ("classes", "accuracy", "metrics must be a dict of objects", "got 'mine': 'accuracy'"),
}


@rotated("bad rule", REFUSED, ml.RULES)
def test_a_metric_that_does_not_fit_is_refused_before_the_first_step(bad, rule):
    name, metric, *hints = REFUSED[bad]
    made = CASES[name].rule(rule)
    with refuses_and_keeps(made, (TypeError, ValueError), *hints):
        CASES[name].fit(made, metrics={"mine": metric})


def test_an_object_is_refused_on_several_ranks():
    with refuses(ValueError, "metrics['mine'] would see one rank's part", "give a function"):
        metrics_of(None, {"mine": Vector()}, 2)


# schedulers, class and example weights


def one_cycle(optimizer: torch.optim.Optimizer, steps: int = 15) -> schedulers.LRScheduler:
    return schedulers.OneCycleLR(optimizer, 0.5, total_steps=steps)


def warmed_up(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=4), schedulers.CosineAnnealingLR(optimizer, 11)]
    return schedulers.SequentialLR(optimizer, parts, [4])


@rotated("scheduler rule", [one_cycle, warmed_up], ml.RULES, turns=4)
def test_a_scheduler_of_each_batch_goes_its_way_also_if_interrupted(scheduler, rule, tmp_path):
    case, rates = CASES["classes"], []
    made, cut, resumed = (case.rule(rule) for _ in range(3))
    step = made.step
    made.step = lambda x, y: rates.append(made.optimizers[0].param_groups[0]["lr"]) or step(x, y)
    how = {"scheduler": scheduler, "scheduler_each": "batch"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The epoch parameter")  # by SequentialLR, of its own call
        expected = case.fit(made, **how).table.drop(columns="seconds")
        theirs = SGD(case.net().parameters())
        way = scheduler(theirs)
        for rate in rates:
            assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
            theirs.step()
            way.step()
        interrupted, taken = cut.step, []

        def stop(x: Tensor, y: Tensor) -> Tensor:
            if len(taken) == 8:
                raise KeyboardInterrupt
            taken.append(1)
            return interrupted(x, y)

        cut.step = stop
        with pytest.raises(KeyboardInterrupt):
            case.fit(cut, checkpoint=tmp_path / "run.pt", save_every_s=0, **how)
        found = case.fit(resumed, checkpoint=tmp_path / "run.pt", **how).table.drop(columns="seconds")
        with refuses(ValueError, "belongs to a run with scheduler_each batch, this one has epoch"):
            case.fit(case.rule(rule), checkpoint=tmp_path / "run.pt", scheduler=scheduler)
    assert len(set(rates)) > 8
    assert found.equals(expected)
    assert_identical(resumed.state_dict(), made.state_dict())


def test_a_scheduler_that_cannot_make_its_steps_is_refused():
    case = CASES["classes"]
    for scheduler, each, *hints in (
        (partial(one_cycle, steps=14), "batch", "OneCycleLR has 14 steps", "each batch: give it total_steps=15"),
        (schedulers.ReduceLROnPlateau, "batch", "use scheduler_each='epoch'"),
        (one_cycle, "step", "unknown scheduler_each 'step'", "epoch, batch"),
    ):
        with refuses(ValueError, *hints):
            case.fit(case.rule(), scheduler=scheduler, scheduler_each=each)


WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 4.0])
OF_EXAMPLES = torch.stack([CLASS.float(), X[:, 5].exp()], 1)


def weighted_examples(output: Tensor, y: Tensor) -> Tensor:
    """y has a label and a weight for each example."""
    losses = F.cross_entropy(output, y[:, 0].long(), reduction="none")
    return (losses * y[:, 1]).mean()


@rotated("loss rule", ["function", "module", "examples"], ml.RULES, turns=4)
def test_weights_of_classes_and_of_examples_go_through_the_loss(loss, rule):
    losses = {"function": partial(F.cross_entropy, weight=WEIGHTS), "module": nn.CrossEntropyLoss(WEIGHTS)}
    y, chosen = (OF_EXAMPLES, weighted_examples) if loss == "examples" else (CLASS, losses.get(loss))
    case = Case("classification", CASES["classes"].layers, X, y, chosen)
    made, twin = case.rule(rule), CASES["classes"].rule(rule, loss=unknown)
    table = case.fit(made, task=None).table
    assert ("test_accuracy" in table) == (loss != "examples")
    for epoch in range(3):
        for part in order(40, 0, epoch).split(8):
            of_class = WEIGHTS[CLASS[part]]
            weights = OF_EXAMPLES[part, 1] / 8 if loss == "examples" else of_class / of_class.sum()
            twin.loss_fn = lambda output, y, weights=weights: F.cross_entropy(output, y, reduction="none") @ weights
            twin.step(X[part], CLASS[part])
    for one, other in zip(made.blocks.parameters(), twin.blocks.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# the best epoch


def overfits(rule: str = "memdfa", lr: float = 1.0) -> ml.Rule:
    """Return a rule that learns too fast, so that its test loss rises at some point."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(6, 60), nn.BatchNorm1d(60), nn.Tanh(), nn.Linear(60, 4))
    return ml.RULES[rule](net, partial(torch.optim.SGD, lr=lr))


NOISY = torch.randint(4, (48,), generator=torch.Generator().manual_seed(8))


def fit_noisy(rule: ml.Rule, epochs: int = 30, **options: Any) -> ml.History:
    return ml.fit(rule, (X[:24], NOISY[:24]), epochs, 8, test=(X[24:], NOISY[24:]), progress=False, **options)


@rotated("monitor rule", ["test_loss", "test_accuracy", "test_area"], ml.RULES, turns=2)
def test_training_stops_after_so_many_epochs_without_a_better_one_and_has_the_best_weights(monitor, rule, tmp_path):
    metrics = {"area": torchmetrics.AUROC("multiclass", num_classes=4)}
    how = {"stop_after": 3, "monitor": monitor, "metrics": metrics}
    made, stopped, resumed, same = (overfits(rule) for _ in range(4))
    table = fit_noisy(made, **how).table
    column = table[monitor] if monitor == "test_loss" else -table[monitor]
    best = int(column.idxmin()) + 1
    assert len(table) == best + 3 < 30
    fit_noisy(same, best)
    assert_identical(made.blocks.state_dict(), same.blocks.state_dict())

    path = tmp_path / "run.pt"
    fit_noisy(stopped, best + 1, checkpoint=path, **how)
    assert_identical(stopped.blocks.state_dict(), same.blocks.state_dict())  # all epochs are done, and it was better
    for _ in range(2):  # the second time, there is nothing to do
        again = fit_noisy(resumed, checkpoint=path, **how).table
        assert again.drop(columns="seconds").equals(table.drop(columns="seconds"))
        assert_identical(resumed.blocks.state_dict(), made.blocks.state_dict())
    with refuses(ValueError, f"belongs to a run with stop_after 3 by {monitor}, this one has None"):
        fit_noisy(resumed, checkpoint=path, metrics=metrics)


@pytest.mark.parametrize(
    ("how", "hint"),
    [
        ({"stop_after": 0}, "stop_after must be a whole number from 1"),
        ({"stop_after": 2, "test": None}, "stop_after needs test data"),
        ({"stop_after": 2, "monitor": "accuracy"}, "one of the columns test_accuracy"),
        ({"stop_after": 2, "monitor": "test_mine", "metrics": {"mine": Vector()}}, "returns one number"),
        ({"stop_after": 2, "monitor": "test_mean", "metrics": {"mean": torchmetrics.MeanMetric()}}, "mean"),
        ({"stop_after": 2, "monitor": "test_mine", "metrics": {"mine": F.cross_entropy}}, "set its higher_is_better"),
    ],
)
def test_what_cannot_say_when_to_stop_is_refused(how, hint):
    made = CASES["classes"].rule()
    with refuses_and_keeps(made, ValueError, hint):
        CASES["classes"].fit(made, **how)


# real data


def split(pair: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return training and test data: every fifth example is for the test."""
    chosen = torch.arange(len(pair[0])) % 5 == 4
    return tuple(part[~chosen] for part in pair), tuple(part[chosen] for part in pair)


class Letters(nn.Linear):
    """Letters (N, T) as vectors that know of the two letters before, (N, T, 64)."""

    def __init__(self) -> None:
        super().__init__(3 * 32, 128)
        self.table = nn.Embedding(128, 32)

    def forward(self, letters: Tensor) -> Tensor:
        h = F.pad(self.table(letters), (0, 0, 2, 0))
        return torch.relu(super().forward(torch.cat([h[:, 2:], h[:, 1:-1], h[:, :-2]], 2)))


REAL = {
    "digits": (
        lambda: [nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)],
        F.cross_entropy,
        ("test_accuracy", 0.94),
    ),
    "regression": (lambda: [nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 1)], F.mse_loss, ("test_R2", 0.4)),
    "time_series": (
        lambda: [nn.Flatten(), nn.Linear(128, 40), nn.Tanh(), nn.Linear(40, 4)],
        F.mse_loss,
        ("test_R2", 0.7),
    ),
    "text": (
        lambda: [Letters(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)],
        ml.losses.token_cross_entropy,
        ("test_accuracy", 0.35),
    ),
}


@rotated("name rule", REAL, ["bp", "memdfa"], turns=2, quick=1)
def test_real_data_of_each_task_are_learned(name, rule):
    layers, loss, (column, least) = REAL[name]
    (x, y), test = split(getattr(small_data, name)())
    if name == "time_series":  # which is of all sizes
        x, y, test = (x / x.std(), y / x.std(), tuple(part / x.std() for part in test))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        feedback = ml.feedback.Stored(positions="classes last")  # one layer is as wide as the outputs
        made = ml.RULES[rule](nn.Sequential(*layers()), partial(torch.optim.Adam, lr=0.003), loss, feedback)
    metrics = {} if column == "test_accuracy" else {"R2": torchmetrics.R2Score()}
    row = ml.fit(made, (x, y), 20, 32, test=test, metrics=metrics).rows[-1]
    assert row[column] > least
