"""Training over epochs: evaluation, history, checkpoints that resume bit for bit, also after kill -9 and Ctrl-C."""

import copy
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
from reference import assert_identical, refuses
from torch import nn
from torch.optim import lr_scheduler as schedulers

import memdfa_lab as ml
from memdfa_lab.lab import files
from memdfa_lab.lab.datasets import order

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def learner(rule="memdfa", optimizer=SGD, activation=nn.ReLU, dropout=0.3, loss=F.cross_entropy):
    """Return a rule on a network with BatchNorm and dropout, always from the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = [nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), activation(), nn.Dropout(dropout)]
        return ml.RULES[rule](nn.Sequential(*first, nn.Linear(20, 10)), optimizer, loss)


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
    with refuses(ValueError, "past 1 epochs, to batch"):
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
    "batch_size 100, this one has 50": {"batch_size": 50},
    "seed 0, this one has 1": {"seed": 1},
    "data mnist5k-holdout, 240 examples": {"split": 1},
    "240 examples of shape (1, 28, 28), digest": {"negative": slice(120, None)},
    "T_max=8": {"scheduler": partial(schedulers.CosineAnnealingLR, T_max=12)},
    "this one has StepLR(step_size=1": {"scheduler": partial(schedulers.StepLR, step_size=1)},
    "this one has None": {"scheduler": None},
    "rule MemDFA, this one has BP": {"rule": "bp"},
    "lr=0.05": {"optimizer": partial(torch.optim.SGD, lr=0.1)},
    "ReLU(), this one has (3): Tanh()": {"activation": nn.Tanh},
    "Dropout(p=0.3, inplace=False), this one has (4): Dropout(p=0.5, inplace=False)": {"dropout": 0.5},
    "this one has cross_entropy(label_smoothing=0.2)": {"loss": partial(F.cross_entropy, label_smoothing=0.2)},
    "this one has CrossEntropyLoss(reduction='mean', ignore_index=-100": {"loss": nn.CrossEntropyLoss()},
    "past 1 epochs, to batch 0 after 2": {"epochs": 1},
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Return a checkpoint of two epochs, and a function that fits a rule from it, by other settings if given."""
    path = tmp_path_factory.mktemp("finished") / "run.pt"

    def fit(epochs=2, split=0, negative=slice(0), batch_size=100, seed=0, scheduler=COSINE, **of_rule):
        rule, chosen = learner(**{"loss": SMOOTH, **of_rule}), data.holdout(0.2, seed=split)
        chosen.x_train[negative] *= -1
        before, how = state(rule), {"seed": seed, "scheduler": scheduler, "checkpoint": path}
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


def test_training_in_float64_follows_the_weights_dtype(data):
    rule = ml.MemDFA(ml.models.mlp(784, [8], 10).double(), optimizer=SGD)
    ml.fit(rule, data, 1, 64)
    assert all(p.dtype == torch.float64 for p in rule.blocks.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rule_on_a_gpu_learns_as_on_the_cpu(data):
    on_cpu, on_gpu = (ml.MemDFA(ml.models.mlp(784, [8], 10).to(d), optimizer=SGD) for d in ("cpu", "cuda"))
    one, other = (ml.fit(rule, data, 1, 64).table["loss"].item() for rule in (on_cpu, on_gpu))
    assert one == pytest.approx(other, rel=1e-4)
