"""Training over epochs: evaluation, history, checkpoints that resume bit for bit, also after kill -9 and Ctrl-C."""

import copy
import dataclasses
import gzip
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import Words, rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import nn
from torch.optim import lr_scheduler as schedulers

import memdfa_lab as ml
from memdfa_lab.lab import files
from memdfa_lab.lab.ahead import look_ahead
from memdfa_lab.lab.datasets import order
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.examples import examples_of

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def learner(rule="memdfa", optimizer=SGD, activation=nn.ReLU, dropout=0.3, loss=F.cross_entropy, **options):
    """Return a rule on a network with BatchNorm and dropout, always from the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), activation(), nn.Dropout(dropout)]
        return ml.RULES[rule](nn.Sequential(*first, nn.Linear(20, 10)), optimizer, loss, **options)


def state(rule):
    return copy.deepcopy([rule.blocks.state_dict(), rule.tensors()["optimizer state"]])


def without_seconds(history):
    return history.table.drop(columns="seconds")


class Cut(Exception):
    pass


def cut():
    raise Cut


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def before_step(rule, number, act):
    """Let the rule act before a step, counted from 0, such as `cut` in the middle of an epoch."""
    step, taken = rule.step, []

    def acting(x, y):
        if len(taken) == number:
            act()
        taken.append(len(x))
        return step(x, y)

    rule.step = acting
    return taken


# a run goes on where it stopped


@pytest.mark.parametrize(("rule", "stop"), [("bp", cut), ("fa", press_ctrl_c), ("dfa", cut), ("memdfa", press_ctrl_c)])
def test_a_run_that_stops_within_an_epoch_resumes_to_the_result_of_one_that_does_not(rule, stop, data, tmp_path):
    def watch(rule, epoch):
        assert all(module.training for module in rule.blocks.modules())
        return {"norm": rule.blocks[0][1].weight.detach().norm(), "twice": np.float32(2 * epoch)}  # not plain numbers

    settings = {"batch_size": 32, "scheduler": partial(schedulers.StepLR, step_size=2, gamma=0.5), "on_epoch": watch}
    never_cut, stopped, resumed = (learner(rule) for _ in range(3))
    torch.manual_seed(7)
    expected = ml.fit(never_cut, data, 3, **settings)
    assert list(expected.table)[5:] == ["norm", "twice"]
    assert list(expected.table["twice"]) == [2, 4, 6]

    taken, path = before_step(stopped, 11, stop), tmp_path / "run.pt"
    torch.manual_seed(7)
    with pytest.raises((Cut, KeyboardInterrupt)):
        ml.fit(stopped, data, 3, checkpoint=path, save_every_s=0, **settings)
    assert len(taken) == (12 if stop is press_ctrl_c else 11)  # the running step ends first
    with refuses(ValueError, "past 1 epochs, at batch"):
        ml.fit(resumed, data, 1, checkpoint=path, **settings)
    torch.manual_seed(99)  # what the generator does in between must not matter
    history = ml.fit(resumed, data, 3, checkpoint=path, **settings)

    assert_identical(state(resumed), state(never_cut))
    assert without_seconds(history).equals(without_seconds(expected))
    assert [optimizer.param_groups[0]["lr"] for optimizer in resumed.optimizers] == [0.05 / 2] * 2
    settings["on_epoch"] = None  # nobody watches any more
    assert math.isnan(ml.fit(resumed, data, 4, checkpoint=path, **settings).table["twice"][3])


def test_a_finished_run_is_not_trained_again_unless_it_starts_anew(data, tmp_path):
    path, again = tmp_path / "run.pt", learner()
    first = ml.fit(learner(), data, 2, checkpoint=path)
    before_step(again, 0, cut)
    assert ml.fit(again, data, 2, checkpoint=path).rows == first.rows
    with pytest.raises(Cut):
        ml.fit(again, data, 2, checkpoint=path, overwrite=True)


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
import memdfa_lab as ml
from test_fit import learner
torch.manual_seed(7)
ml.fit(learner(), ml.datasets.load("mnist5k").subset(300, 100), 60, 32, checkpoint={path!r}, save_every_s=0)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_checkpoint_that_resumes_to_the_same_weights(data, tmp_path):
    path, never_killed, resumed = tmp_path / "run.pt", learner(), learner()
    code = CHILD.format(tests=os.path.dirname(__file__), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if path.exists():
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL, "it ended before it was killed: give it more epochs"
    ml.fit(resumed, data, 60, 32, checkpoint=path)
    torch.manual_seed(7)
    ml.fit(never_killed, data, 60, 32)
    assert_identical(state(resumed), state(never_killed))


def test_ctrl_c_while_the_last_epoch_is_evaluated_is_not_lost(data, tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        ml.fit(learner(), data, 1, checkpoint=path, on_epoch=lambda rule, epoch: press_ctrl_c() or {})
    assert len(ml.fit(learner(), data, 1, checkpoint=path).rows) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: schedulers.LambdaLR(optimizer, lambda epoch: 0.9**epoch),  # another function each time
        lambda optimizer: schedulers.MultiStepLR(optimizer, [1, 2]),
        lambda optimizer: schedulers.OneCycleLR(optimizer, 0.1, total_steps=5),
        lambda optimizer: schedulers.SequentialLR(
            optimizer, [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.5)], [1]
        ),
    ],
)
def test_a_scheduler_that_is_made_anew_is_the_same(make, data, tmp_path):
    alive = []  # so that none lies in memory where another did

    def scheduler(optimizer):
        alive.append(make(optimizer))
        return alive[-1]

    for epochs in (1, 2):
        history = ml.fit(learner(), data, epochs, scheduler=scheduler, checkpoint=tmp_path / "run.pt")
    assert len(history.rows) == 2


def test_numbers_of_numpy_resume_as_pythons_do(data, tmp_path):
    def run(epochs, name, lr, limit, size, seed):
        rule, schedule = learner(optimizer=partial(SGD, lr=lr)), partial(schedulers.StepLR, step_size=1, gamma=lr)
        rule.clip_norm = limit
        history = ml.fit(rule, data, epochs, size, seed=seed, scheduler=schedule, checkpoint=tmp_path / name)
        return state(rule), without_seconds(history)

    torch.manual_seed(3)
    of_numpy = (np.logspace(-2, -1, 3)[1], np.float64(0.5), np.int64(60), np.int64(1))
    run(1, "numpy.pt", *of_numpy)
    resumed, cut = run(2, "numpy.pt", *of_numpy)
    torch.manual_seed(3)
    never_cut, expected = run(2, "python.pt", *(number.item() for number in of_numpy))
    assert cut.equals(expected)
    assert_identical(resumed, never_cut)


# a checkpoint that does not fit is refused, and nothing changes

COSINE, SMOOTH = partial(schedulers.CosineAnnealingLR, T_max=8), partial(F.cross_entropy, label_smoothing=0.1)
DIFFERENT = {
    "batch_size 100, this one has 100, drop_last": {"drop_last": True},
    "batch_size 100, this one has 50": {"batch_size": 50},
    "seed 0, this one has 1": {"seed": 1},
    "data mnist5k-holdout, 240 examples": {"split": 1},
    "240 examples of shape (1, 28, 28), digest": {"negative": slice(120, None)},
    "T_max=8": {"scheduler": partial(schedulers.CosineAnnealingLR, T_max=12)},
    "this one has StepLR(step_size=1": {"scheduler": partial(schedulers.StepLR, step_size=1)},
    "this one has None": {"scheduler": None},
    "rule MemDFA, this one has BP": {"rule": "bp"},
    "rule MemDFA, this one has MemDFA(pack=int8)": {"pack": "int8"},
    "lr=0.05": {"optimizer": partial(torch.optim.SGD, lr=0.1)},
    "ReLU(), this one has (3): Tanh()": {"activation": nn.Tanh},
    "Dropout(p=0.3, inplace=False), this one has (4): Dropout(p=0.5, inplace=False)": {"dropout": 0.5},
    "this one has cross_entropy(label_smoothing=0.2)": {"loss": partial(F.cross_entropy, label_smoothing=0.2)},
    "this one has CrossEntropyLoss(reduction='mean', ignore_index=-100": {"loss": nn.CrossEntropyLoss()},
    "past 1 epochs, at batch 0 after epoch 2": {"epochs": 1},
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Return a checkpoint of two epochs, and a function that fits a rule from it, by other settings if given."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"

    def fit(epochs=2, split=0, negative=slice(0), batch_size=100, seed=0, scheduler=COSINE, drop_last=False, **of_rule):
        rule, chosen = learner(**{"loss": SMOOTH, **of_rule}), data.holdout(0.2, seed=split)
        chosen.x_train[negative] *= -1
        how = {"seed": seed, "scheduler": scheduler, "drop_last": drop_last, "checkpoint": path}
        before = state(rule)
        try:
            return ml.fit(rule, chosen, epochs, batch_size, **how).rows
        except ValueError:
            assert_identical(state(rule), before)
            raise

    fit()
    return path, fit


@pytest.mark.parametrize("message", DIFFERENT)
def test_a_checkpoint_of_another_run_is_refused(message, finished):
    path, fit = finished
    before = path.read_bytes()
    with refuses(ValueError, message):
        fit(**DIFFERENT[message])
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "end", "compressed", "tensor", "foreign", "version"])
def test_a_checkpoint_that_is_none_is_named_and_stays_as_it_is(damage, finished):
    path, fit = finished
    good = path.read_bytes()
    foreign = {"tensor": torch.ones(3), "foreign": {"model": {}, "epoch": 3}, "version": {"format": 1}}
    contents = {"empty": b"", "text": b"hello\n", "cut": good[: len(good) // 2], "end": good[:-50] + bytes(50)}
    if damage in foreign:
        torch.save(foreign[damage], path)
    else:
        path.write_bytes({**contents, "compressed": gzip.compress(good)}[damage])
    before = path.read_bytes()
    try:
        with refuses(ValueError, "run.pt", "version" if damage == "version" else "damaged", "overwrite=True"):
            fit()
        assert path.read_bytes() == before
    finally:
        path.write_bytes(good)


def test_damage_anywhere_in_a_checkpoint_is_refused_or_changes_nothing(finished):
    """Bytes that hold no value may change unnoticed; a value never does: torch's archive has checksums."""
    path, fit = finished
    good, expected, refused = path.read_bytes(), fit(), []
    try:
        for at in np.random.default_rng(0).integers(0, len(good), 40):
            for damaged in (good[:at], good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]):
                path.write_bytes(damaged)
                try:
                    assert fit() == expected
                except ValueError as problem:
                    refused.append(str(problem))
    finally:
        path.write_bytes(good)
    assert len(refused) > 40
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("place", ["file/run.pt", "/proc/nowhere/run.pt", "/proc/run.pt", "file/.."])
def test_a_place_that_cannot_be_written_is_refused_before_training(place, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    rule = learner()
    before_step(rule, 0, cut)
    folder = place.endswith("..")
    with refuses(ValueError, "is a folder: name a file" if folder else "cannot write into"):
        ml.fit(rule, data, 1, checkpoint=tmp_path if folder else tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_is_written_whole_or_not_at_all_and_is_as_readable_as_any_other(tmp_path, monkeypatch):
    def fails_halfway(temporary):
        temporary.write_bytes(b"half")
        raise Cut

    with pytest.raises(Cut):
        files.write_whole(tmp_path / "a" / "file", fails_halfway)
    assert list((tmp_path / "a").iterdir()) == []
    monkeypatch.delattr(os, "umask")  # to set it would change that of other threads, too
    files.write_text(tmp_path / "ours", "text")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_ctrl_c_stays_one_where_closing_the_file_fails_on_it(tmp_path):
    def write(path):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 2944")

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "new" / "run.pt"
    with files.locked(path), refuses(ValueError, f"another run is writing {path}"), files.locked(path):
        raise AssertionError("it is not locked")
    with files.locked(path):
        path.touch()


# what training does


def test_a_plateau_is_one_of_the_epochs_loss(data):
    def last_lr(**given):
        rule = learner()
        ml.fit(rule, data, 3, scheduler=partial(schedulers.ReduceLROnPlateau, patience=0, **given))
        return rule.optimizers[0].param_groups[0]["lr"]

    assert last_lr(threshold=1e-9) == 0.05  # the loss falls
    assert last_lr(threshold=0.9) == pytest.approx(0.05 * 0.1**2)  # none is better than the first by so much


def test_a_rule_that_leaves_optimizers_alone_takes_a_schedule_without_a_warning(data):
    rule = ml.experiments.make_rule("last_layer", "784-[8]x2-10", data)
    ml.fit(rule, data, 2, scheduler=COSINE)  # a warning would be an error here
    assert rule.optimizers[0].param_groups[0]["lr"] == rule.optimizers[-1].param_groups[0]["lr"] < 0.01


def test_what_is_no_scheduler_is_refused_before_a_step(data):
    rule = learner()
    before_step(rule, 0, cut)
    with refuses(TypeError, "what scheduler returns must be a scheduler of torch"):
        ml.fit(rule, data, 1, scheduler=lambda optimizer: None)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_sizes_that_make_no_sense_are_refused(data, value):
    for name in ("epochs", "batch_size"):
        with refuses(ValueError, name, repr(value)):
            ml.fit(learner(), data, **{"epochs": 1, name: value})


def test_every_example_is_seen_once_an_epoch_and_the_loss_is_the_mean_over_them(data, tmp_path):
    rule, seen, losses = learner(), [], []
    step = rule.step

    def noting(x, y):
        seen.append(x.flatten(1).sum(1))
        losses.append(step(x, y))
        return losses[-1]

    rule.step = noting
    history = ml.fit(rule, data, 1, 64)
    assert [len(batch) for batch in seen] == [64, 64, 64, 64, 44]
    assert torch.equal(torch.cat(seen).sort().values, data.x_train.flatten(1).sum(1).sort().values)
    mean = sum(loss.item() * len(batch) for loss, batch in zip(losses, seen, strict=True)) / 300
    assert history.table["loss"].item() == pytest.approx(mean, rel=1e-12)
    history.to_csv(tmp_path / "new" / "history.csv")
    header, row = (tmp_path / "new" / "history.csv").read_text().splitlines()
    assert header == "epoch,loss,train_accuracy,test_accuracy,seconds"
    assert float(row.split(",")[3]) == pytest.approx(ml.accuracy(rule, data.x_test, data.y_test))


def test_a_short_last_batch_can_be_left_out(data):
    rule, losses = learner(), []
    step = rule.step
    rule.step = lambda x, y: losses.append((len(x), step(x, y))) or losses[-1][1]
    history = ml.fit(rule, data, 2, 64, drop_last=True)
    assert [n for n, _ in losses] == [64] * 8
    assert history.rows[1]["loss"] == pytest.approx(sum(loss.item() for _, loss in losses[4:]) / 4, rel=1e-12)
    batches = data.batches(64, drop_last=True)
    assert [len(next(batches)[1]) for _ in range(9)] == [64] * 9
    whole, same = (ml.fit(learner(dropout=0.0), data, 1, 100, drop_last=drop_last) for drop_last in (True, False))
    assert without_seconds(whole).equals(without_seconds(same))  # nothing is short


def test_the_order_depends_on_seed_and_epoch_alone():
    first = order(1000, 3, 2).tolist()
    order.cache_clear()
    torch.rand(5)
    assert first == order(1000, 3, 2).tolist()
    assert first not in (order(1000, 3, 1).tolist(), order(1000, 2, 2).tolist())


def test_batches_are_those_of_fit(data):
    batches, like = data.batches(200, seed=3), torch.zeros(1, dtype=torch.float64)
    for epoch, part in ((0, slice(200)), (0, slice(200, 300)), (1, slice(200))):
        chosen = order(300, 3, epoch)[part]
        x, y = next(batches)
        assert torch.equal(x, data.x_train[chosen])
        assert torch.equal(y, data.y_train[chosen])
    assert next(data.batches(200, like=like))[0].dtype == torch.float64


def test_evaluation_is_in_eval_mode_in_batches_and_puts_each_mode_back(data):
    rule = learner()
    frozen = rule.blocks[0][2].eval()  # a BatchNorm that its user has put into eval mode
    running = frozen.running_mean.clone()
    output = ml.predict(rule, data.x_test, batch_size=7)
    assert torch.equal(output, ml.predict(rule.blocks, data.x_test, batch_size=7))
    assert torch.allclose(output, ml.predict(rule, data.x_test), atol=1e-6)
    assert torch.equal(frozen.running_mean, running)
    assert [module.training for module in (frozen, rule.blocks, rule.blocks[0])] == [False, True, True]
    right = (output.argmax(1) == data.y_test).sum().item()
    assert ml.accuracy(rule, data.x_test, data.y_test) == pytest.approx(right / 100)


def test_no_example_is_evaluated_alone():
    """BatchNorm without running statistics takes no batch of one."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(1001, 4), torch.arange(1001) % 3
    assert ml.predict(net, x).shape == (1001, 3)
    rule = ml.MemDFA(net, partial(torch.optim.SGD, lr=0.1))
    assert len(ml.fit(rule, (x, y), 1, 77, test=(x, y), progress=False).rows) == 1


def test_training_in_float64_follows_the_weights_dtype(data):
    rule = ml.MemDFA(ml.models.mlp(784, [8], 10).double(), optimizer=SGD)
    ml.fit(rule, data, 1, 64)
    assert all(p.dtype == torch.float64 for p in rule.blocks.parameters())


# other inputs, labels and losses than those of the data sets


def by_hand(x, y, tests=8):
    """Return a data set of these tensors, of which the last are for the test."""
    n = len(x) - tests
    return ml.datasets.Data("by hand", x[:n], y[:n], x[n:], y[n:], torch.zeros(1, 1, 1), 1.0, 4)


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def plain(inputs=6, outputs=4, first=(), rule="memdfa", loss=F.cross_entropy, lr=0.1):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = nn.Sequential(*(make() for make in first), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
        return ml.RULES[rule](net, partial(torch.optim.SGD, lr=lr), loss)


X, Y = numbers(48, 6), torch.arange(48) % 4
X += F.one_hot(Y, 6)  # so that there is something to learn


@rotated("rule dtype", ml.RULES, [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_inputs_of_whole_numbers_stay_what_they_are(rule, dtype):
    words, got = torch.randint(11, (48, 5), generator=torch.Generator().manual_seed(0)).to(dtype), []
    made = plain(first=[Words], rule=rule)
    made.blocks[0].register_forward_pre_hook(lambda block, inputs: got.append(inputs[0]))
    data = by_hand(words, words[:, 0].long() % 4)
    last = ml.fit(made, data, 2, 8).rows[-1]
    assert {x.dtype for x in got} == {dtype}
    with torch.no_grad():
        output = made.blocks.eval()(data.x_test)
    assert torch.equal(ml.predict(made, data.x_test), output)
    right = (output.argmax(1) == data.y_test).double().mean().item()
    assert last["test_accuracy"] == ml.accuracy(made, data.x_test, data.y_test) == pytest.approx(right)
    assert next(data.batches(4, like=numbers(1).double()))[0].dtype == dtype


def test_the_input_of_predict_is_not_changed_by_a_module_that_works_in_place():
    before = X.clone()
    ml.predict(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 4)), X)
    assert torch.equal(ml.predict(nn.ReLU(inplace=True), X), before.relu())  # without a weight
    assert torch.equal(X, before)


def test_predict_inside_autocast_sees_the_weights_that_there_are():
    net = plain().blocks
    with torch.autocast("cpu", torch.bfloat16):
        net(X).sum().backward()  # the casts of these weights are kept
        with torch.no_grad():
            net[-1].weight.zero_()
        assert torch.equal(ml.predict(net, X), net[-1].bias.bfloat16().expand(48, 4))


# what no accuracy can be told of: (outputs, y, loss)
def _first(loss):
    return lambda output, y: loss(output[:, 0], y.float())


WITHOUT_ACCURACY = {
    "one logit": (1, (Y > 1).long(), _first(F.binary_cross_entropy_with_logits)),
    "a number": (1, X[:, 0], _first(F.mse_loss)),
    "a column": (1, X[:, :1], F.mse_loss),
    "float64": (4, X[:, :4].double(), F.mse_loss),
    "probabilities of each label": (4, X[:, :4].sigmoid(), F.binary_cross_entropy_with_logits),
    "soft labels": (4, X[:, :4].softmax(1), F.cross_entropy),
    "counts": (4, Y * 2, lambda output, y: F.poisson_nll_loss(output.mean(1), y.float())),
}


@pytest.mark.parametrize("task", WITHOUT_ACCURACY)
def test_where_accuracy_means_nothing_there_is_none(task, tmp_path):
    outputs, y, loss = WITHOUT_ACCURACY[task]
    made = plain(outputs=outputs, loss=loss)
    history = ml.fit(made, by_hand(X, y), 20, 8, checkpoint=tmp_path / "run.pt")
    assert list(history.table) == ["epoch", "loss", "seconds"]
    assert history.rows[-1]["loss"] < history.rows[0]["loss"]
    with refuses(ValueError, "the task is 'classification'" if y.dim() == 1 else "a tensor of 48 labels"):
        ml.accuracy(made, X, y)


def test_without_a_test_example_the_test_accuracy_is_nan(data):
    row = ml.fit(plain(), by_hand(X, Y, tests=0), 1, 8).rows[0]
    assert math.isnan(row["test_accuracy"])
    assert row["train_accuracy"] > 0


def test_a_function_of_the_epoch_need_not_return_numbers():
    assert list(ml.fit(plain(), by_hand(X, Y), 1, on_epoch=lambda rule, epoch: None).table)[-1] == "seconds"


# what can be known before the first step


def norm():
    return nn.BatchNorm1d(6)


class OfSix(nn.Module):
    """It takes batches of six examples alone."""

    def forward(self, h):
        return h.view(6, 6)


NAN_X, NAN_Y = X.clone(), X[:, :1].clone()
NAN_X[17, 3] = math.nan
NAN_Y[-1] = math.inf
HAND, NORM = by_hand(X, Y), {"first": [norm]}
AHEAD = {  # data, batch size, the rest -> what is said
    "one left": (by_hand(X, Y, 7), 10, NORM, "1 of the 41 training examples", "batch_size 9 or drop_last=True"),
    "one left of two": (by_hand(X, Y, 45), 2, NORM, "1 of the 3 training examples", "batch_size 3 or drop_last=True"),
    "a fixed size": (HAND, 6, {"first": [OfSix]}, "have 4 of the 40 training", "batch_size 5 or drop_last=True"),
    "a label beyond": (
        by_hand(X, torch.where(Y == 3, 4, Y)),
        2,
        {},
        "whole numbers (N,) from 0 to 3; got",
        "from 0 to 4: correct y",
    ),
    "a test label beyond": (
        by_hand(X, torch.where(torch.arange(48) == 47, 9, Y)),
        8,
        {},
        "y_test is whole numbers (N,) from 0 to 3",
        "to 9",
    ),
    "NaN": (by_hand(NAN_X, Y), 8, {}, "x_train of the data holds NaN or inf"),
    "inf to test": (by_hand(X, NAN_Y), 8, {"outputs": 1, "loss": F.mse_loss}, "y_test of the data holds NaN or inf"),
    "a list": (dataclasses.replace(HAND, y_train=Y[:40].tolist()), 8, {}, "y_train must be a tensor", "not a list"),
    "many labels": (dataclasses.replace(HAND, y_train=Y), 8, {}, "of as many examples, one or more, got 40 and 48"),
    "few test labels": (dataclasses.replace(HAND, y_test=Y[:0]), 8, {}, "y_test must be of as many", "8 and 0"),
    "sparse": (
        dataclasses.replace(HAND, x_train=X[:40].to_sparse()),
        8,
        {},
        "x_train must be a dense tensor",
        "sparse",
    ),
    "another width": (dataclasses.replace(HAND, x_test=X[:8, :5]), 8, {}, "x_test: it is (8, 5)", "x_train is (N, 6)"),
    "no example": (by_hand(X, Y, 48), 8, {}, "one or more, got 0 and 0"),
    "float labels": (by_hand(X, Y.float()), 8, {}, "y (40,) torch.float32"),
    "a column of labels": (by_hand(X, Y[:, None]), 8, {}, "y (40, 1) torch.int64"),
    "no batch left": (HAND, 41, {"drop_last": True}, "drop_last leaves no batch of 41 from 40 examples"),
    "maybe": (HAND, 8, {"drop_last": 1}, "drop_last must be True or False, not a int"),
}


@rotated("case rule", AHEAD, ml.RULES)
def test_what_is_known_before_the_first_step_is_said_then(case, rule):
    data, batch_size, rest, *hints = AHEAD[case]
    drop_last = rest.get("drop_last", False)
    made = plain(rule=rule, **{name: value for name, value in rest.items() if name != "drop_last"})
    drawn = torch.get_rng_state()
    with refuses_and_keeps(made, (ValueError, TypeError, FloatingPointError), *hints):
        ml.fit(made, data, 1, batch_size, drop_last=drop_last)
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("way", ["drop_last", "batch size", "pixels", "no norm", "ml.alignment.follow"])
def test_one_example_is_left_out_or_taken_where_that_is_possible(way):
    data = by_hand(X, Y, 7)
    if way == "pixels":  # more than one value a channel
        data = by_hand(numbers(48, 2, 3, 3), Y, 7)
        first = [partial(nn.BatchNorm2d, 2), nn.Flatten]
        ml.fit(plain(18, first=first), data, 1, 10)
    elif way == "ml.alignment.follow":
        made = plain(first=[norm])
        ml.alignment.follow(made, data, [4], 10)  # the last batch is not reached
        ml.alignment.follow(made, data, [9], 10, drop_last=True)
        with refuses_and_keeps(made, ValueError, "1 of the 41 training examples", "drop_last=True"):
            ml.alignment.follow(made, data, [5], 10)
    else:
        first = [] if way == "no norm" else [norm]
        ml.fit(plain(first=first), data, 1, 9 if way == "batch size" else 10, drop_last=way == "drop_last")


@pytest.mark.parametrize("rank", [0, 1])
def test_the_part_of_each_rank_is_looked_at_on_all_of_them(rank):
    made, group = plain(first=[norm]), Group(rank, size=2)
    for examples, batch_size in ((43, 10), (42, 10), (41, 10), (40, 3)):
        data = by_hand(X, Y, 48 - examples)
        with refuses(ValueError, "a rank's part of the last batch", f"1 of the {examples} training examples"):
            look_ahead(made, examples_of(data, batch_size), examples_of(data, part="test"), group)
    assert look_ahead(made, examples_of(by_hand(X, Y, 4), 10), None, group)[0]
    assert look_ahead(made, examples_of(by_hand(X, Y, 5), 10, drop_last=True), None, group)[0]


WEIGHTS = torch.ones(10), torch.ones(10) + 1e-6


@pytest.mark.parametrize("loss", [lambda w: nn.CrossEntropyLoss(w), lambda w: partial(F.cross_entropy, weight=w)])
def test_a_run_does_not_go_on_with_other_class_weights(loss, data, tmp_path):
    how = {"epochs": 1, "checkpoint": tmp_path / "run.pt"}
    for weights in (WEIGHTS[0], WEIGHTS[0].clone()):
        ml.fit(learner(loss=loss(weights)), data, **how)
    with refuses(ValueError, "belongs to a run with loss"):
        ml.fit(learner(loss=loss(WEIGHTS[1])), data, **how)


@pytest.mark.parametrize("rule", ml.RULES)
def test_one_autocast_context_around_fit_is_one_a_step(rule):
    around, apart = plain(rule=rule), plain(rule=rule)
    step = apart.step

    def in_a_context(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return step(x, y)

    apart.step = in_a_context
    with torch.autocast("cpu", torch.bfloat16):
        found = ml.fit(around, by_hand(X, Y), 3, 8)
        accuracy = ml.accuracy(around, X, Y)
    expected = ml.fit(apart, by_hand(X, Y), 3, 8)
    assert list(found.table["loss"]) == list(expected.table["loss"])
    assert_identical(around.blocks.state_dict(), apart.blocks.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert accuracy == ml.accuracy(apart, X, Y)
