"""Any data: each source trains as a loop by hand does, goes on bit for bit, and says in one line what is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children

import numpy as np
import pytest
import small_data
import torch
from problems import rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import memdfa_lab as ml
from memdfa_lab.lab.datasets import order
from memdfa_lab.lab.examples import examples_of

X, Y = (tensor[:90] for tensor in small_data.digits())
SIZE = 16


class Items(Dataset):
    """Digits with noise from the three global generators, or without."""

    def __init__(self, noise=0.0, pause_s=0.0):
        self.noise, self.pause_s = noise, pause_s

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        time.sleep(self.pause_s)
        drawn = torch.rand(()).item() + np.random.rand() + random.random() if self.noise else 0.0  # noqa: NPY002
        return X[i] + self.noise * drawn, int(Y[i])


class Stream(IterableDataset):
    """The digits one after another; each process of several gives a part of them."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        return zip(X, Y, strict=True) if worker is None else zip(X[worker.id :: 2], Y[worker.id :: 2], strict=True)


def learner(rule="memdfa", dropout=0.2):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 10))
        return ml.RULES[rule](net, partial(torch.optim.SGD, lr=0.1, momentum=0.9))


def read_only(array):
    array.flags.writeable = False
    return array


def flipped(x):
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def sampled(generator):
    """Return a loader whose generator is in the sampler of its batch sampler."""
    sampler = torch.utils.data.RandomSampler(X, generator=generator)
    return DataLoader(Items(0.1), batch_sampler=torch.utils.data.BatchSampler(sampler, SIZE, drop_last=True))


OURS, NOISY = {"batch_size": SIZE}, Items(0.1)
SOURCES = {  # how to make the data anew, and what else fit is given
    "tensors": (lambda: (X, Y), OURS),
    "arrays": (lambda: [read_only(X.double().numpy()), Y.numpy()], OURS),
    "TensorDataset": (lambda: TensorDataset(X, Y), OURS),
    "Dataset": (lambda: Items(), OURS),
    "Dataset, noise": (lambda: NOISY, OURS),
    "Dataset, augmented": (lambda: NOISY, {**OURS, "augment": flipped, "drop_last": True}),
    "tensors, augmented": (lambda: (X, Y), {**OURS, "augment": ml.datasets.flip_and_crop(1)}),
    "loader": (lambda: DataLoader(Items(), SIZE), {}),
    "loader, shuffled": (lambda: DataLoader(NOISY, SIZE, shuffle=True, drop_last=True), {"augment": flipped}),
    "loader, workers": (lambda: DataLoader(NOISY, SIZE, shuffle=True, num_workers=2), {}),
    "loader, generator": (lambda: DataLoader(NOISY, SIZE, True, generator=torch.Generator().manual_seed(3)), {}),
    "loader, batch sampler": (lambda: sampled(torch.Generator().manual_seed(3)), {}),
    "loader, stream": (lambda: DataLoader(Stream(), SIZE, num_workers=2), {}),
    "loader of batches": (lambda: DataLoader(TensorDataset(X.view(9, 10, 1, 8, 8), Y.view(9, 10)), None), {}),
}


class Cut(Exception):
    pass


def run(data, path=None, cut=None, epochs=3, rule="memdfa", **options):
    """Train; return the losses and all that was learned. `cut`: the step before which an error comes, from 0 on."""
    trained, steps = learner(rule), []
    step = trained.step

    def counting(x, y):
        if len(steps) == cut:
            raise Cut
        steps.append((x, y))
        return step(x, y)

    trained.step = counting
    history = ml.fit(trained, data, epochs, checkpoint=path, save_every_s=0, **options)
    return history.table.drop(columns="seconds"), trained.state_dict(), steps


@rotated("source rule", SOURCES, ml.RULES)
def test_a_run_that_is_cut_goes_on_bit_for_bit_with_any_data(source, rule, tmp_path):
    make, options = SOURCES[source]
    torch.manual_seed(7)
    table, state, steps = run(make(), rule=rule, **options)
    steps_in_all, path = len(steps), tmp_path / "run.pt"
    torch.manual_seed(7)
    with pytest.raises(Cut):
        run(make(), path, cut=9, rule=rule, **options)
    assert not active_children(), "processes that load batches are left"
    torch.manual_seed(99)
    resumed_table, resumed, steps = run(make(), path, rule=rule, **options)
    assert resumed_table.equals(table)
    assert_identical(resumed, state)
    assert len(steps) == steps_in_all - 9
    assert table["loss"].iloc[-1] < table["loss"][0]


def by_hand(batches):
    """Train by a plain loop over the batches."""
    rule = learner()
    for x, y in batches:
        rule.step(x.float(), y)
    return rule.state_dict()


def test_the_batches_are_those_of_a_loop_by_hand():
    ours = [indices for epoch in range(2) for indices in order(90, 5, epoch).split(SIZE)]
    torch.manual_seed(7)
    expected = by_hand((X[indices], Y[indices]) for indices in ours)
    for source in ("tensors", "arrays", "TensorDataset", "Dataset"):
        torch.manual_seed(7)
        _, state, _ = run(SOURCES[source][0](), epochs=2, seed=5, **OURS)
        assert_identical(state, expected, source)
    own = {"generator": torch.Generator()}  # or a loader draws from the one that dropout draws from
    for data, size, options in ((Items(), SIZE, {"drop_last": True}), (Stream(), 7, {"num_workers": 2})):
        torch.manual_seed(7)
        loader = DataLoader(data, size, **options, **own)
        expected = by_hand(pair for _ in range(2) for pair in loader)
        torch.manual_seed(7)
        assert_identical(run(loader, epochs=2)[1], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_drawn_depends_on_seed_epoch_and_batch_alone(workers):
    def batches(epoch, first=0, seed=1, own=3):
        loader = DataLoader(NOISY, SIZE, True, num_workers=workers, generator=torch.Generator().manual_seed(own))
        return [x for x, _ in examples_of(loader, seed=seed, augment=flipped).batches(epoch, first)]

    def states():
        return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # noqa: NPY002

    before = states()
    whole = batches(1)
    assert states() == before
    torch.rand(3)
    loader = DataLoader(NOISY, SIZE, True, num_workers=workers, generator=torch.Generator().manual_seed(3))
    examples, state = examples_of(loader, seed=1, augment=flipped), loader.generator.get_state()
    list(examples.first(40))
    examples.last = ""
    with pytest.warns(UserWarning, match="a batch differs from the one read before the checkpoint"):
        assert_identical([x for x, _ in examples.batches(1, first=2)], whole[2:])
    assert torch.equal(loader.generator.get_state(), state)  # its owner's
    for other in (batches(2), batches(1, seed=2), batches(1, own=4)):
        assert not any(torch.equal(one, two) for one, two in zip(whole, other, strict=True))


def test_data_that_are_others_after_a_resume_are_warned_of(tmp_path):
    changing = Items(0.1)
    changing.__class__ = type("Changing", (Items,), {"__getitem__": lambda self, i: (X[i] + time.monotonic(), Y[i])})
    with pytest.raises(Cut):
        run(DataLoader(changing, SIZE), tmp_path / "run.pt", cut=3)
    with pytest.warns(UserWarning, match="a batch differs from the one read before the checkpoint"):
        run(DataLoader(changing, SIZE), tmp_path / "run.pt")


def test_an_epoch_is_seen_whole_augmented_in_training_alone_and_tested_as_it_is():
    def bright(x):
        return x + 100

    for data in ((X, Y), Items(), DataLoader(Items(), SIZE)):
        size = {} if isinstance(data, DataLoader) else OURS
        table, _, steps = run(data, epochs=1, augment=bright, test=data, **size)
        assert [len(x) for x, _ in steps] == [16] * 5 + [10]
        x, y = map(torch.cat, zip(*steps, strict=True))
        assert torch.equal((x - 100).sum((1, 2, 3)).sort().values, (X + 100 - 100).sum((1, 2, 3)).sort().values)
        assert torch.equal(y.bincount(), Y.bincount())
        assert table["train_accuracy"].equals(table["test_accuracy"].rename("train_accuracy"))
        examples = examples_of(data, **size, augment=bright)
        assert torch.equal(torch.cat([x for x, _ in examples.first(40)]), X[:40])
        assert (len(examples), examples.sizes) == (90, (16, 10))


def test_test_data_may_be_of_any_kind(data):
    given = [None, (data.x_test, data.y_test.numpy()), TensorDataset(data.x_test, data.y_test), data]
    given += [Subset(TensorDataset(data.x_test, data.y_test), range(100))]
    given += [DataLoader(given[-1], 32, shuffle=True), DataLoader(given[-1], 32, num_workers=2)]
    given.append(DataLoader(TensorDataset(data.x_test.view(5, 20, 1, 28, 28), data.y_test.view(5, 20)), None))
    rule = ml.MemDFA(ml.models.mlp(784, [8], 10), partial(torch.optim.SGD, lr=0.0))
    expected = ml.accuracy(rule, data.x_test, data.y_test)
    for test in given:
        assert ml.fit(rule, data, 1, test=test).rows[0]["test_accuracy"] == expected


# what is wrong is said before the first step


def generator():
    yield X, Y


class Dicts(Items):
    def __getitem__(self, i):
        return {"image": X[i], "label": Y[i]}


class Unending(Dataset):
    def __getitem__(self, i):
        return X[0], Y[0]


class Triples(Items):
    def __getitem__(self, i):
        return X[i], Y[i], i


NAN = TensorDataset(torch.where(torch.arange(90).view(-1, 1, 1, 1) == 3, torch.nan, X), Y)
WRONG = {  # data, the rest -> what is said
    "generator": (generator(), {}, "data is a generator, which can be read only once", "a DataLoader"),
    "zip": (zip(X, Y, strict=True), {}, "data is a zip, which can be read only once"),
    "generator to test": ((X, Y), {"test": generator()}, "test is a generator"),
    "batch_size": (DataLoader(Items(), 8), {"batch_size": 8}, "batch_size and drop_last are the DataLoader's own"),
    "drop_last": (DataLoader(Items(), 8), {"drop_last": True}, "batch_size and drop_last are the DataLoader's own"),
    "dicts": (Dicts(), {}, "pairs (x, y) of tensors, got a dict of image, label", "collate_fn that makes pairs"),
    "dicts of a loader": (DataLoader(Dicts(), 8), {}, "got a dict of image, label", "collate_fn that makes pairs"),
    "three": (DataLoader(Triples(), 8), {}, "got a list of 3"),
    "x alone": (DataLoader(X, 8), {}, "batches must be pairs (x, y) of tensors, got a Tensor"),
    "a tensor": (X, {}, "data must be (x, y), a Dataset with a length, a DataLoader", "not a Tensor"),
    "a list of pairs": ([(X, Y), (X, Y)], {}, "data must be (x, y)", "not a list"),
    "a stream": (Stream(), {}, "not a Stream: put it into a DataLoader"),
    "no length": (Unending(), {}, "a Dataset with a length", "not a Unending"),
    "empty": ((X[:0], Y[:0]), {}, "of as many examples, one or more, got 0 and 0"),
    "empty Dataset": (Subset(Items(), []), {}, "one or more, got 0 and 0"),
    "empty loader": (DataLoader(Items(), 91, drop_last=True), {}, "x_train and y_train", "got 0 and 0"),
    "lengths": ((X, Y[:89]), {}, "x_train and y_train must be of as many examples, one or more, got 90 and 89"),
    "lengths to test": ((X, Y), {"test": (X.numpy(), Y[:9].numpy())}, "x_test and y_test", "got 90 and 9"),
    "NaN": (Subset(NAN, range(8)), {}, "x_train of the data holds NaN or inf"),
    "NaN in a loader": (DataLoader(NAN, 8), {}, "x_train of the data holds NaN or inf"),
    "label": (DataLoader(TensorDataset(X, Y * 2), 90), {}, "whole numbers (N,) from 0 to 9", "from 0 to 18"),
    "objects": ((X.numpy().astype(object), Y), {}, "object_"),
    "augment": ((X, Y), {"augment": 3}, "augment must be a function, not a int"),
    "one left": (DataLoader(Items(), 89), {}, "1 of the 90 training examples", "batch_size 88 or drop_last=True"),
}


@rotated("case rule", WRONG, ml.RULES)
def test_what_is_wrong_with_data_is_said_before_the_first_step(case, rule):
    data, options, *hints = WRONG[case]
    made = learner(rule)
    if case == "one left":
        made = ml.RULES[rule](nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)), torch.optim.SGD)
    with refuses_and_keeps(made, (TypeError, ValueError, FloatingPointError), *hints):
        ml.fit(made, data, 1, **options)


@pytest.mark.parametrize("augment", [lambda x: x[1:], lambda x: None])
def test_what_augment_returns_is_looked_at(augment):
    with refuses_and_keeps(
        made := learner(), TypeError, "augment must take a batch x (16, ...) and return one of equally many"
    ):
        ml.fit(made, (X, Y), 1, SIZE, augment=augment)


def test_a_run_goes_on_with_its_own_data_alone(tmp_path):
    run((X, Y), tmp_path / "run.pt", epochs=1, **OURS, augment=ml.datasets.flip_and_crop(1))
    for data, options, hint in (
        ((X, Y), {"augment": ml.datasets.flip_and_crop(2)}, "padding=1"),
        ((X, Y), {}, "augment"),
        ((X + 1, Y), {"augment": ml.datasets.flip_and_crop(1)}, "digest"),
        (Items(), {"augment": ml.datasets.flip_and_crop(1)}, "Items, 90 examples of shape (1, 8, 8)"),
    ):
        with refuses(ValueError, "belongs to a run with", hint):
            run(data, tmp_path / "run.pt", epochs=1, **OURS, **options)


def test_a_batch_is_flipped_and_cropped_image_by_image():
    x = torch.arange(64.0).view(1, 1, 8, 8).repeat(200, 3, 1, 1) + 1
    torch.manual_seed(0)
    out = ml.datasets.flip_and_crop(1)(x)
    places = {tuple(image[0, 1:-1, 1:-1].flatten().tolist()) for image in out}
    assert len(places) == 18  # nine places, flipped or not
    assert torch.equal(out[:, 0], out[:, 2])
    with refuses(ValueError, "padding"):
        ml.datasets.flip_and_crop(-1)


# Ctrl-C reaches the processes that load batches, too


class Interrupted(IterableDataset):
    """Items that Ctrl-C ends, as it ends the processes that load them, before the item `at`, once it is `armed`."""

    def __init__(self, at):
        self.at, self.armed = at, False

    def __iter__(self):
        if self.armed and self.at == 0:
            self.end()
        return self.items()

    def items(self):
        for k, pair in enumerate(zip(X, Y, strict=True)):
            if self.armed and k == self.at:
                self.end()
            yield pair

    def end(self):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("worker exited unexpectedly")


@pytest.mark.parametrize("batch", [0, 3])
def test_what_ctrl_c_makes_of_loading_is_ctrl_c_at_any_batch(batch, tmp_path):
    data, path = Interrupted(batch * SIZE), tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        ml.fit(
            learner(),
            DataLoader(data, SIZE),
            9,
            checkpoint=path,
            progress=False,
            on_epoch=lambda rule, epoch: setattr(data, "armed", epoch == 2),
        )
    progress = torch.load(path, weights_only=True)["progress"]
    assert (progress["epoch"], progress["batch"]) == (2, batch)


CHILD = """
import signal, sys
sys.path.insert(0, {tests!r})
from test_examples import *
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
loader = DataLoader(Items(pause_s=0.005), SIZE, True, num_workers=2, persistent_workers={started})
if {started}:
    next(iter(loader))
torch.manual_seed(7)
try:
    ml.fit(learner(), loader, 200, checkpoint={path!r}, save_every_s=0, progress=False)
except KeyboardInterrupt:
    print({started} or len(active_children()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("started", [False, True])
def test_ctrl_c_with_two_workers_ends_the_step_saves_and_leaves_no_process(started, tmp_path):
    """Workers that were started before `fit` end on Ctrl-C by themselves."""
    path = tmp_path / "run.pt"
    code = CHILD.format(tests=os.path.dirname(__file__), started=started, path=str(path))
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = time.monotonic() + 120
    while not path.exists():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < limit, "nothing was written"
        time.sleep(0.01)
    time.sleep(0.2)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    out, errors = child.communicate(timeout=60)
    assert (out.strip(), child.returncode) == ("True" if started else "0", 0), errors[-1500:]
    progress = torch.load(path, weights_only=True)["progress"]
    loader = DataLoader(Items(), SIZE, True, num_workers=2, persistent_workers=started)
    epochs = progress["epoch"] + 1
    _, state, steps = run(loader, path, epochs=epochs)
    assert len(steps) == 6 - progress["batch"]
    torch.manual_seed(7)
    assert_identical(state, run(loader, epochs=epochs)[1])
