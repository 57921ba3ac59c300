"""Training over epochs: evaluation, history, checkpoints that resume bit for bit, also after kill -9 and Ctrl-C."""

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
from reference import refuses
from torch import nn

import memdfa_lab as ml
from memdfa_lab.lab import files
from memdfa_lab.lab.datasets import order
from memdfa_lab.lab.fit import _Run

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def data():
    return ml.datasets.load("mnist5k").subset(300, 100)


def with_dropout_and_batch_norm(rule="memdfa", optimizer=SGD):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Flatten(), nn.Linear(784, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 10)]
        return ml.RULES[rule](nn.Sequential(*layers), optimizer=optimizer)


def assert_same_rule(a, b):
    for (name, one), other in zip(a.blocks.state_dict().items(), b.blocks.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(a.optimizers, b.optimizers, strict=True):
        for p, q in zip(one.state.values(), other.state.values(), strict=True):
            assert torch.equal(p["momentum_buffer"], q["momentum_buffer"])


def without_seconds(history):
    return history.table.drop(columns="seconds")


class Cut(Exception):
    pass


def cut_after(rule, steps):
    """Make the rule fail at a step, in the middle of an epoch."""
    step, taken = rule.step, []

    def failing(x, y):
        if len(taken) == steps:
            raise Cut
        taken.append(1)
        return step(x, y)

    rule.step = failing


@pytest.mark.parametrize("rule", ml.RULES)
def test_a_run_cut_within_an_epoch_resumes_to_the_result_of_one_never_cut(rule, data, tmp_path):
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    settings = {"batch_size": 32, "scheduler": halved}
    whole = with_dropout_and_batch_norm(rule)
    torch.manual_seed(7)
    expected = ml.fit(whole, data, 3, **settings)

    cut = with_dropout_and_batch_norm(rule)
    cut_after(cut, 14)
    torch.manual_seed(7)
    with pytest.raises(Cut):
        ml.fit(cut, data, 3, checkpoint=tmp_path / "run.pt", save_every_s=0, **settings)
    torch.manual_seed(99)  # what the generator does in between must not matter
    resumed = with_dropout_and_batch_norm(rule)
    history = ml.fit(resumed, data, 3, checkpoint=tmp_path / "run.pt", **settings)

    assert_same_rule(whole, resumed)
    assert without_seconds(expected).equals(without_seconds(history))
    assert [o.param_groups[0]["lr"] for o in resumed.optimizers] == [0.05 / 8] * 2


def test_a_finished_run_is_returned_without_training_and_can_be_made_longer(data, tmp_path):
    path = tmp_path / "run.pt"
    first = ml.fit(with_dropout_and_batch_norm(), data, 2, checkpoint=path)
    again = with_dropout_and_batch_norm()
    cut_after(again, 0)
    assert ml.fit(again, data, 2, checkpoint=path).rows == first.rows
    longer = ml.fit(with_dropout_and_batch_norm(), data, 3, checkpoint=path)
    assert longer.rows[:2] == first.rows
    assert len(longer.rows) == 3
    anew = with_dropout_and_batch_norm()
    cut_after(anew, 0)
    with pytest.raises(Cut):
        ml.fit(anew, data, 2, checkpoint=path, overwrite=True)


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
import memdfa_lab as ml
from test_fit import with_dropout_and_batch_norm
torch.manual_seed(7)
rule = with_dropout_and_batch_norm()
ml.fit(rule, ml.datasets.load("mnist5k").subset(300, 100), {epochs}, 32, checkpoint={path!r}, save_every_s=0)
torch.save(rule.state_dict(), {path!r} + ".final")
"""


def start(path, epochs):
    code = CHILD.format(tests=os.path.dirname(__file__), path=str(path), epochs=epochs)
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def wait_for(path):
    limit = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < limit, "no checkpoint came"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1)])
def test_a_killed_process_leaves_a_checkpoint_that_resumes_to_the_same_weights(data, tmp_path, number, status):
    epochs = 60
    torch.manual_seed(7)
    whole = with_dropout_and_batch_norm()
    ml.fit(whole, data, epochs, 32)

    path = tmp_path / "run.pt"
    process = start(path, epochs)
    wait_for(path)
    process.send_signal(number)
    assert process.wait(60) in (status, -number)
    assert not (tmp_path / "run.pt.final").exists(), "it ended before it was killed: give it more epochs"
    resumed = with_dropout_and_batch_norm()
    ml.fit(resumed, data, epochs, 32, checkpoint=path)
    assert_same_rule(whole, resumed)


def test_a_rank_without_a_test_image_has_no_say_in_the_accuracy(data):
    rule = with_dropout_and_batch_norm()
    rule.group = ml.distributed.Group(rank=1, size=2)
    rule.group.total = lambda values, what: torch.tensor(values) + torch.tensor([1.0, 1.0])  # rank 0's image is right
    assert _Run(rule, data, 100, 0)._accuracy(data.x_test[:1], data.y_test[:1]) == 1.0


def test_ctrl_c_while_the_last_epoch_is_evaluated_is_not_lost(data, tmp_path):
    def press(rule, epoch):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        ml.fit(with_dropout_and_batch_norm(), data, 1, checkpoint=path, on_epoch=press)
    assert len(ml.fit(with_dropout_and_batch_norm(), data, 1, checkpoint=path).rows) == 1


def test_no_temporary_file_is_left_when_writing_fails(tmp_path):
    def fails_halfway(temporary):
        temporary.write_bytes(b"half")
        raise Cut

    with pytest.raises(Cut):
        files.write_whole(tmp_path / "a" / "file", fails_halfway)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_file_is_as_readable_as_any_other_and_no_other_thread_has_its_umask_changed(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "umask")
    files.write_text(tmp_path / "ours", "text")
    (tmp_path / "any").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_checkpoint_of_another_setting_is_refused_and_nothing_changes(data, tmp_path):
    path = tmp_path / "run.pt"
    ml.fit(with_dropout_and_batch_norm(), data, 1, checkpoint=path)
    before = path.read_bytes()
    cases = {
        "batch_size 100, this one has 50": lambda: ml.fit(with_dropout_and_batch_norm(), data, 1, 50, checkpoint=path),
        "rule MemDFA, this one has BP": lambda: ml.fit(with_dropout_and_batch_norm("bp"), data, 1, checkpoint=path),
        "lr=0.05": lambda: ml.fit(
            with_dropout_and_batch_norm(optimizer=partial(torch.optim.SGD, lr=0.1)), data, 1, checkpoint=path
        ),
        "seed 0, this one has 1": lambda: ml.fit(with_dropout_and_batch_norm(), data, 1, seed=1, checkpoint=path),
        "300 examples": lambda: ml.fit(with_dropout_and_batch_norm(), data.subset(200), 1, checkpoint=path),
        "scheduler None, this one has ConstantLR": lambda: ml.fit(
            with_dropout_and_batch_norm(), data, 1, scheduler=torch.optim.lr_scheduler.ConstantLR, checkpoint=path
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message) as problem:
            call()
        assert "\n" not in str(problem.value)
    assert path.read_bytes() == before


def test_a_checkpoint_of_another_scheduler_is_refused(data, tmp_path):
    path, schedulers = tmp_path / "run.pt", torch.optim.lr_scheduler
    eight = partial(schedulers.CosineAnnealingLR, T_max=8)
    ml.fit(with_dropout_and_batch_norm(), data, 1, scheduler=eight, checkpoint=path)
    before = path.read_bytes()
    for other, said in (
        (partial(schedulers.CosineAnnealingLR, T_max=12), r"T_max=8, .*, this one has CosineAnnealingLR\(T_max=12"),
        (partial(schedulers.StepLR, step_size=1), r"this one has StepLR\(step_size=1"),
        (None, "this one has None"),
    ):
        with pytest.raises(ValueError, match=said) as problem:
            ml.fit(with_dropout_and_batch_norm(), data, 2, scheduler=other, checkpoint=path)
        assert "\n" not in str(problem.value)
    assert path.read_bytes() == before
    assert len(ml.fit(with_dropout_and_batch_norm(), data, 2, scheduler=eight, checkpoint=path).rows) == 2


def test_a_checkpoint_of_another_network_loss_or_split_is_refused(data, tmp_path):
    smooth = partial(F.cross_entropy, label_smoothing=0.1)

    def fit(activation=nn.ReLU, loss=smooth, split=0, epochs=2, dropout=0.2):
        layers = [nn.Flatten(), nn.Linear(784, 20), activation(), nn.Dropout(dropout), nn.Linear(20, 10)]
        net = nn.Sequential(*layers)
        path = tmp_path / "run.pt"
        return ml.fit(ml.BP(net, SGD, loss), data.holdout(0.2, seed=split), epochs, checkpoint=path)

    fit(epochs=1)
    before = (tmp_path / "run.pt").read_bytes()
    for given, said in (
        ({"activation": nn.Tanh}, "ReLU(), this one has (2): Tanh()"),
        ({"dropout": 0.5}, "Dropout(p=0.2, inplace=False), this one has (3): Dropout(p=0.5, inplace=False)"),
        ({"loss": partial(F.cross_entropy, label_smoothing=0.2)}, "this one has cross_entropy(label_smoothing=0.2)"),
        ({"loss": nn.CrossEntropyLoss()}, "this one has CrossEntropyLoss(reduction='mean', ignore_index=-100"),
        ({"split": 1}, "data mnist5k-holdout, 240 examples"),
    ):
        with refuses(ValueError, said):
            fit(**given)
    assert (tmp_path / "run.pt").read_bytes() == before
    assert len(fit().rows) == 2


def test_a_checkpoint_that_has_come_past_what_is_asked_for_is_refused(data, tmp_path):
    path, rule = tmp_path / "run.pt", with_dropout_and_batch_norm()
    ml.fit(with_dropout_and_batch_norm(), data, 2, checkpoint=path)
    before = path.read_bytes(), {name: value.clone() for name, value in rule.blocks.state_dict().items()}
    with refuses(ValueError, "past 1 epochs, to batch 0 after 2: ask for more epochs"):
        ml.fit(rule, data, 1, checkpoint=path)
    assert path.read_bytes() == before[0]
    assert all(torch.equal(value, before[1][name]) for name, value in rule.blocks.state_dict().items())
    assert len(ml.fit(rule, data, 2, checkpoint=path).rows) == 2  # as many: there is nothing to do


@pytest.mark.parametrize("name", ["LambdaLR", "MultiStepLR", "OneCycleLR", "SequentialLR"])
def test_a_scheduler_that_is_made_anew_is_the_same(data, tmp_path, name):
    made = torch.optim.lr_scheduler
    schedulers = {
        "LambdaLR": lambda optimizer: made.LambdaLR(optimizer, lambda epoch: 0.9**epoch),  # another function each time
        "MultiStepLR": lambda optimizer: made.MultiStepLR(optimizer, [1, 2]),
        "OneCycleLR": lambda optimizer: made.OneCycleLR(optimizer, 0.1, total_steps=5),
        "SequentialLR": lambda optimizer: made.SequentialLR(
            optimizer, [made.ConstantLR(optimizer), made.ExponentialLR(optimizer, 0.5)], [1]
        ),
    }
    alive = []  # so that none lies where another did

    def scheduler(optimizer):
        alive.append(schedulers[name](optimizer))
        return alive[-1]

    for epochs in (1, 2):
        history = ml.fit(
            with_dropout_and_batch_norm(), data, epochs, scheduler=scheduler, checkpoint=tmp_path / "run.pt"
        )
    assert len(history.rows) == 2


def test_a_plateau_is_one_of_the_epochs_loss(data, tmp_path):
    def steps(**given):
        rule = with_dropout_and_batch_norm()
        ml.fit(rule, data, 3, scheduler=partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, **given))
        return next(made for made in rule.optimizers if made is not None).param_groups[0]["lr"]

    assert steps(threshold=1e-9) == 0.05  # the loss falls
    assert steps(threshold=0.9) == pytest.approx(0.05 * 0.1**2)  # none is better than the first by so much


def test_what_is_no_scheduler_is_refused_before_a_step(data):
    rule = with_dropout_and_batch_norm()
    before = {name: value.clone() for name, value in rule.blocks.state_dict().items()}
    with pytest.raises(TypeError, match="what scheduler returns must be a scheduler of torch"):
        ml.fit(rule, data, 1, scheduler=lambda optimizer: None)
    assert all(torch.equal(value, before[name]) for name, value in rule.blocks.state_dict().items())


def test_numbers_of_numpy_resume_as_pythons_do(data, tmp_path):
    def run(epochs, name, lr, limit, size, seed):
        rule = with_dropout_and_batch_norm(optimizer=partial(SGD, lr=lr))
        rule.clip_norm = limit
        schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=lr)
        return rule, ml.fit(rule, data, epochs, size, seed=seed, scheduler=schedule, checkpoint=tmp_path / name)

    torch.manual_seed(3)
    of_numpy = (np.logspace(-2, -1, 3)[1], np.float64(0.5), np.int64(60), np.int64(1))
    run(1, "numpy.pt", *of_numpy)
    resumed, cut = run(2, "numpy.pt", *of_numpy)
    torch.manual_seed(3)
    never_cut, whole = run(2, "python.pt", *(number.item() for number in of_numpy))
    assert without_seconds(cut).equals(without_seconds(whole))
    assert_same_rule(resumed, never_cut)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 broken"])
def test_a_damaged_checkpoint_is_named(data, tmp_path, content):
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.pt is damaged or not a checkpoint"):
        ml.fit(with_dropout_and_batch_norm(), data, 1, checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_that_would_run_code_is_refused(data, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "made"),))

    torch.save({"format": 1, "rule": Evil()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="damaged or not a checkpoint"):
        ml.fit(with_dropout_and_batch_norm(), data, 1, checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3"])
def test_sizes_that_make_no_sense_are_refused(data, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number from 1 on"):
        ml.fit(with_dropout_and_batch_norm(), data, **{"epochs": 1, name: value})


def test_the_last_batch_is_short_and_every_example_is_seen_once_an_epoch(data):
    rule, seen = with_dropout_and_batch_norm(), []
    step = rule.step
    rule.step = lambda x, y: seen.append(x.flatten(1).sum(1)) or step(x, y)
    ml.fit(rule, data, 1, 64)
    assert [len(batch) for batch in seen] == [64, 64, 64, 64, 44]
    assert torch.equal(torch.cat(seen).sort().values, data.x_train.flatten(1).sum(1).sort().values)


def test_the_order_depends_on_seed_and_epoch_alone():
    first = order(1000, 3, 2).clone()
    torch.rand(5)
    assert torch.equal(first, order(1000, 3, 2))
    assert not torch.equal(first, order(1000, 3, 1))
    assert not torch.equal(first, order(1000, 2, 2))


def test_evaluation_is_in_eval_mode_in_batches_and_puts_each_mode_back(data):
    rule = with_dropout_and_batch_norm()
    frozen = rule.blocks[0][2].eval()  # a BatchNorm that its user has put into eval mode
    running = frozen.running_mean.clone()
    output = ml.predict(rule, data.x_test, batch_size=7)
    assert torch.equal(output, ml.predict(rule.blocks, data.x_test, batch_size=7))
    assert torch.allclose(output, ml.predict(rule, data.x_test), atol=1e-6)
    assert torch.equal(frozen.running_mean, running)
    assert [module.training for module in (frozen, rule.blocks, rule.blocks[0])] == [False, True, True]
    right = (output.argmax(1) == data.y_test).sum().item()
    assert ml.accuracy(rule, data.x_test, data.y_test) == pytest.approx(right / 100)


def test_history_has_the_mean_loss_of_the_epoch_and_is_written_whole(data, tmp_path):
    rule, losses = with_dropout_and_batch_norm(), []
    step = rule.step
    rule.step = lambda x, y: losses.append((step(x, y), len(x))) or losses[-1][0]
    history = ml.fit(rule, data, 1, 64)
    mean = sum(loss.item() * n for loss, n in losses) / 300
    assert history.table["loss"].item() == pytest.approx(mean, rel=1e-12)
    history.to_csv(tmp_path / "new" / "history.csv")
    lines = (tmp_path / "new" / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,train_accuracy,test_accuracy,seconds"
    assert len(lines) == 2


def test_training_in_float64_follows_the_weights_dtype(data):
    rule = ml.MemDFA(ml.models.mlp(784, [8], 10).double(), optimizer=SGD)
    ml.fit(rule, data, 1, 64)
    assert all(p.dtype == torch.float64 for p in rule.blocks.parameters())


def test_what_on_epoch_returns_is_in_the_history_and_resumes_with_it(data, tmp_path):
    def watch(rule, epoch):
        assert all(module.training for module in rule.blocks.modules())
        return {"norm": rule.blocks[1].weight.detach().norm(), "twice": np.float32(2 * epoch)}  # not plain numbers

    settings = {"batch_size": 32, "on_epoch": watch, "progress": False}
    torch.manual_seed(7)
    whole = ml.fit(with_dropout_and_batch_norm("bp"), data, 3, **settings)
    assert list(whole.table)[5:] == ["norm", "twice"]
    assert list(whole.table["twice"]) == [2, 4, 6]
    assert whole.table["norm"].nunique() == 3

    path = tmp_path / "run.pt"
    cut = with_dropout_and_batch_norm("bp")
    cut_after(cut, 14)  # in the second epoch
    torch.manual_seed(7)
    with pytest.raises(Cut):
        ml.fit(cut, data, 3, checkpoint=path, save_every_s=0, **settings)
    resumed = ml.fit(with_dropout_and_batch_norm("bp"), data, 3, checkpoint=path, **settings)
    assert without_seconds(resumed).equals(without_seconds(whole))
    longer = ml.fit(with_dropout_and_batch_norm("bp"), data, 4, 32, checkpoint=path).table  # nobody watches any more
    assert list(longer["twice"][:3]) == [2, 4, 6]
    assert math.isnan(longer["twice"][3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rule_on_a_gpu_learns_as_on_the_cpu(data):
    on_cpu, on_gpu = (ml.MemDFA(ml.models.mlp(784, [8], 10).to(d), optimizer=SGD) for d in ("cpu", "cuda"))
    one, other = (ml.fit(rule, data, 1, 64).table["loss"].item() for rule in (on_cpu, on_gpu))
    assert one == pytest.approx(other, rel=1e-4)
