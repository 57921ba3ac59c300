"""What test_distributed.py runs on two ranks, and once more alone: each case is a function of the group."""

import os
import signal
import sys
import time
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.lab.batchnorm import synchronise
from memdfa_lab.lab.distributed import RankLost, ranks

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "clipped": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


def mlp(depth=3):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(12, 12), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 12), *layers, nn.Linear(12, 5))


def conv():
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5))


def conv_batchnorm():
    first = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    second = [nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=None, affine=False), nn.Tanh()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16, 5))


def mlp_batchnorm():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5))


NETS = {net.__name__: net for net in (mlp, conv, conv_batchnorm, mlp_batchnorm)}


def build(make, dtype=torch.float64, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().to(dtype)


def examples(n, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, dtype=dtype, generator=generator), torch.randint(5, (n,), generator=generator)


def learner(group, rule, net, optimizer=OPTIMIZERS["sgd"], dtype=torch.float64, seed=1, sync=False, **options):
    """Return a rule on a new network, whose ranks are the group's, and BatchNorm's statistics too if `sync`."""
    model = build(net, dtype, seed)
    if sync:
        synchronise(model, group)
    found = {**ml.RULES, **ml.BASELINES, **ml.LOCAL_RULES}[rule](model, optimizer, **options)
    found.group = group
    return found


def outcome(rule, **more):
    state = {name: value.clone() for name, value in rule.blocks.state_dict().items()}
    return {"state": state, **more}


def learn(group, rule, optimizer, net, sizes, dtype=torch.float64, sync=True, B_lr=None, **options):
    """Learn from batches of these sizes, this rank's part of each, with BatchNorm's statistics over all if `sync`."""
    options |= {"feedback": ml.feedback.Learned(lr=B_lr)} if B_lr else {}
    options |= {"clip_norm": 0.3} if optimizer == "clipped" else {}
    trained = learner(group, rule, NETS[net], OPTIMIZERS[optimizer], dtype, sync=sync, **options)
    losses = []
    for step, n in enumerate(sizes):
        x, y = examples(n, dtype, seed=step)
        mine = group.part(torch.arange(n))
        losses.append(trained.step(x[mine], y[mine]).item())
    trained.blocks.eval()
    return outcome(trained, losses=losses, output=trained.blocks(x).detach())


DROPPED = [(True, True), (False, True), (True, False), (False, False), (True, True)]  # by which half, in each step


class Unit(nn.Linear):
    """A residual unit that neither half, one or both halves of the batch skip."""

    dropped = (False, False)

    def forward(self, h):
        if all(self.dropped):
            return h
        return h + kept_rows(self.dropped, h) * super().forward(h)


def kept_rows(dropped, h):
    return torch.tensor([float(not one) for one in dropped]).to(h).repeat_interleave(len(h) // 2)[:, None]


class OfKeptRows(ml.feedback.Learned):
    """What ranks learn of which one has not taught a block: without the examples of that rank."""

    dropped = (False, False)

    def learn(self, i, e, h, *others):
        super().learn(i, kept_rows(self.dropped, e) * e if i == 1 else e, h, *others)


def with_unit():
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(72, 12)), Unit(12, 12), nn.Linear(12, 5))


def learn_dropped(group, rule, learns=False):
    """Learn with a unit that ranks drop in different steps, as layer dropout does; alone, halves of the batch do."""
    kind = ml.feedback.Learned if group.size > 1 else OfKeptRows
    options = {"feedback": kind(lr=0.01)} if learns else {}
    trained = learner(group, rule, with_unit, OPTIMIZERS["clipped"], **options)
    losses = []
    for step, dropped in enumerate(DROPPED):
        x, y = examples(12, seed=step)
        mine = group.part(torch.arange(12))
        of_ranks = dropped if group.size == 1 else (dropped[group.rank],) * 2
        trained.chain[1].dropped = trained.feedback.dropped = of_ranks
        losses.append(trained.step(x[mine], y[mine]).item())
    B = {f"B {k}": tensor.clone() for k, tensor in enumerate(trained.feedback.tensors())}
    found = outcome(trained, losses=losses)
    return {**found, "state": found["state"] | B}


WEIGHTS = torch.tensor([0.3, 2.0, 0.0, 1.1, 5.0], dtype=torch.float64)
LOSS_RULES = ("bp", "dfa", "memdfa")
IGNORED = {"none": None, "torch's own": -100, "a class": 1, "weighs 0": 2}  # the label that is put in


def weighted(logits, y):
    return F.cross_entropy(logits, y, WEIGHTS, ignore_index=1)


def contrastive(logits, y):
    """Return a loss of pairs: examples of one class are to be nearer to each other than to the rest."""
    logits = F.normalize(logits, dim=1)
    near, others = logits @ logits.T / 0.2, ~torch.eye(len(y), dtype=torch.bool)
    alike = (y[:, None] == y) & others
    chances = near.masked_fill(~others, -1e9).log_softmax(1)
    return -(chances * alike).sum() / alike.sum().clamp(min=1) + 0.01 * logits.square().sum()


def chances(y):
    return F.one_hot(y, 5).to(torch.float64) * 0.7 + 0.06


def penalised(logits, y, net):
    """Return a mean with a penalty on the weights of each block, one of its own for each."""
    return F.cross_entropy(logits, y) + 0.01 * sum(p.abs().sum() for p in net.parameters())


# name -> the loss, the label that weighs nothing in it, how y is made of labels, whether ranks exchange three numbers
LOSSES = {
    "a mean": (F.cross_entropy, "none", None, True),
    "a mean, smoothed": (partial(F.cross_entropy, label_smoothing=0.1), "torch's own", None, True),
    "ignored labels": (F.cross_entropy, "torch's own", None, True),
    "class weights": (partial(F.cross_entropy, weight=WEIGHTS), "none", None, True),
    "weights, ignored labels": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=1), "a class", None, True),
    "weights, smoothed": (nn.CrossEntropyLoss(WEIGHTS, ignore_index=1, label_smoothing=0.2), "weighs 0", None, False),
    "probabilities": (partial(F.cross_entropy, weight=WEIGHTS), "none", chances, True),
    "squares": (ml.losses.mse, "none", None, True),
    "a function": (weighted, "a class", None, False),
    "a sum": (partial(F.cross_entropy, reduction="sum"), "torch's own", None, False),
    "KL, a mean over the batch": (nn.KLDivLoss(reduction="batchmean"), "none", chances, False),
    "many labels": (lambda z, y: F.multilabel_soft_margin_loss(z, y.to(z)), "none", lambda y: chances(y) > 0.5, False),
    "pairs": (contrastive, "none", None, False),
    "a penalty": (penalised, "a class", None, False),
}


def learn_loss(group, name, rule):
    """Learn by a loss from batches of which rank 1 has as much, less, no label that counts, and no example."""
    loss_fn, ignored, make, _ = LOSSES[name]
    trained = learner(group, rule, mlp, loss_fn=loss_fn)
    trained.loss_fn = partial(penalised, net=trained.blocks) if loss_fn is penalised else loss_fn
    losses, shares, exchanged, call = [], [], [], group.call
    for n, all_ignored in ((12, False), (13, False), (12, True), (1, False), (12, False)):
        x, y = examples(n, seed=n)
        if IGNORED[ignored] is not None:
            y[y == 0] = IGNORED[ignored]
            y[n // 2 :] = IGNORED[ignored] if all_ignored else y[n // 2 :]
        y[0] = 3
        mine, y = group.part(torch.arange(n)), y if make is None else make(y)
        exchanged.clear()
        group.call = lambda what, *others, **options: (exchanged.append(what), call(what, *others, **options))[1]
        losses.append(trained.step(x[mine], y[mine]).item())
        group.call = call
        shares.append(group.share)
    return outcome(trained, losses=losses, shares=shares, exchanged=exchanged)


def losses_refused(group):
    """Say how each loss that ranks cannot share ends: in a second step, as the first is by a plain mean."""
    x, y = examples(6)
    other = torch.full((5,), 1.0 + group.rank, dtype=torch.float64)
    cases = {
        "the form of y": (weighted, torch.zeros(6, 2 + group.rank)),
        "y that is no tensor": (lambda logits, pair: weighted(logits, pair[0]), (y, y)),
        "y that is no batch": (lambda logits, centres: (logits - centres).square().mean(), torch.zeros(5)),
        "other class weights": (partial(F.cross_entropy, weight=other), y),
        "another loss on one rank": ([F.cross_entropy, weighted][group.rank], y),
        "another function on one rank": (lambda logits, y: weighted((1 + group.rank) * logits, y), y),
        "random numbers": (lambda logits, y: weighted(logits * torch.rand(len(y), 1), y), y),
        "no label that counts": (F.cross_entropy, torch.full((6,), -100)),
    }
    found = {}
    for name, (loss_fn, labels) in cases.items():
        rule = learner(group, "memdfa", mlp)
        rule.step(x, y)
        group.draw_apart(1)
        before, rule.loss_fn = outcome(rule)["state"], loss_fn
        problem = refused(rule.step, x, labels)
        unchanged = all(torch.equal(value, before[key]) for key, value in rule.blocks.state_dict().items())
        found[name] = problem, unchanged
    return found


def peaks(group, rule):
    """Return this rank's peak above rest, and the gradients at it, for two depths."""
    deeper = [learner(group, rule, partial(mlp, depth), feedback=ml.feedback.Regenerated()) for depth in (4, 24)]
    traces = [ml.memory.measure(one, *examples(16), warm_up=1) for one in deeper]
    return [trace.peak_bytes for trace in traces], [trace.peak_by_category.get("gradients", 0) for trace in traces]


def data(tests=20, n=70):
    x, y = examples(n + 20)
    return ml.datasets.Data("random", x[:n], y[:n], x[n:], y[n:], torch.zeros(2, 1, 1), 1.0, classes=5).subset(n, tests)


def noisy(x):
    return x + torch.randn_like(x)


def loaded(tests=20):
    """Return the training data in a loader, whose order and noise all ranks draw alike."""
    both = data(tests)
    return DataLoader(TensorDataset(both.x_train, both.y_train), 23, shuffle=True)


def with_dropout():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 5))


def of_one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=60)


def squared_error(outputs, y):
    return ml.losses.mse(outputs, y)


squared_error.higher_is_better = False
# the mean of a loss over parts of different sizes, and when to stop by it
STOPPED = {"epochs": 15, "metrics": {"mse": squared_error}, "monitor": "test_mse", "stop_after": 1, "tests": 15}
STOPPED |= {"scheduler": of_one_cycle, "scheduler_each": "batch"}


def fitted(group, path=None, make=conv, rule="memdfa", cut=None, lr=0.1, net_seed=1, tests=20, source=data, **options):
    """Fit, and evaluate on `tests` images; `cut`: a step in which this rank is asked to stop, as by Ctrl-C."""
    trained = learner(group, rule, make, partial(torch.optim.SGD, lr=lr, momentum=0.9), seed=net_seed)
    steps, step = [], trained.step

    def counting(x, y):
        steps.append(len(x))
        if cut == len(steps):
            os.kill(os.getpid(), signal.SIGINT)
        return step(x, y)

    trained.step = counting
    settings = {"epochs": 3, "batch_size": 23, "checkpoint": path, "save_every_s": 1e9, **options}
    try:
        history = ml.fit(trained, source(tests), **settings).rows
    except KeyboardInterrupt:
        history = "interrupted"
    return outcome(trained, history=history, steps=steps)


LOADED = {"source": loaded, "batch_size": None, "augment": noisy}


def refused(run, *arguments, **options):
    try:
        run(*arguments, **options)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was refused"


def not_finite(group):
    """The loss is infinite on rank 1 alone, and then its gradient is."""
    found = []
    for wrong in (lambda logits: logits.sum() * torch.inf, lambda logits: (0 * logits).sqrt().sum()):

        def loss_fn(logits, y, wrong=wrong):
            return F.cross_entropy(logits, y) + (wrong(logits) if group.rank else 0)

        rule = learner(group, "memdfa", mlp, loss_fn=loss_fn)
        before = outcome(rule)["state"]
        problem = refused(rule.step, *examples(8))
        unchanged = all(torch.equal(value, before[name]) for name, value in rule.blocks.state_dict().items())
        found.append((problem, unchanged))
    return found


def downloads(group, folder):
    """Tell whether this rank finds the file that a rank without it makes, as a download would."""
    with group.first_rank_first():
        found = (folder / "downloaded").exists()
        if not found:
            time.sleep(0.2)
            (folder / "downloaded").touch()
    return found


def all_cases(group, folder):
    """Run everything that two ranks in good health do; `folder` has one.pt, a checkpoint that one process wrote."""
    found = {name: learn(group, **options) for name, options in EQUAL.items()}
    found |= {("peaks", rule): peaks(group, rule) for rule in ml.RULES}
    found |= {("dropped", *case): learn_dropped(group, *case) for case in DROP}
    found["own statistics"] = learn(group, "bp", "sgd", "conv_batchnorm", [12], sync=False)
    found |= {("loss", name, rule): learn_loss(group, name, rule) for name in LOSSES for rule in LOSS_RULES}
    found["losses refused"] = losses_refused(group)
    found["not finite"] = not_finite(group)
    found["finds the download"] = downloads(group, folder)
    found["fit"] = fitted(group, folder / "fit.pt")
    found["fit, stopped"] = fitted(group, **STOPPED)
    found["loader"] = fitted(group, **LOADED)
    found["fit, one's own statistics"] = fitted(group, make=conv_batchnorm)
    found["files"] = sorted(path.name for path in folder.glob("*.pt"))
    found["two to one"] = fitted(group, folder / "two.pt", cut=6 if group.rank else None)
    found["one to two"] = fitted(group, folder / "one.pt", tests=1)  # rank 1 has none
    never_cut = fitted(group, make=with_dropout)
    torch.manual_seed(99)
    cut = fitted(group, folder / "dropout.pt", with_dropout, cut=6)
    torch.manual_seed(98)
    found["dropout"] = never_cut, cut, fitted(group, folder / "dropout.pt", with_dropout)
    group.draw_apart(1, 2, 3)
    found["drawn"] = torch.rand(5)
    found["refused"] = {
        "seed": refused(fitted, group, seed=group.rank),
        "weights": refused(fitted, group, net_seed=group.rank),
        "optimizer": refused(fitted, group, lr=0.1 + group.rank),
        "rule": refused(fitted, group, rule=["bp", "dfa"][group.rank]),
        "where training begins": refused(fitted, group, folder / ("fit.pt" if group.rank else "none.pt")),
    }
    return found


def lost(group, how):
    """Rank 1 is killed, or hangs, in its third step; say how that ended for rank 0, after how long, in which step."""
    rule = learner(group, "memdfa", mlp)
    for step in range(10):
        started = time.monotonic()
        if group.rank and step == 2:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        try:
            rule.step(*examples(8))
        except RankLost as problem:
            return str(problem), time.monotonic() - started, step
    return "nobody was missed"


EQUAL = {}  # name -> arguments of `learn`: each rule on each network, and each of both with each optimizer in turn
for i, rule in enumerate(ml.RULES):
    for k, net in enumerate(NETS):
        optimizer = list(OPTIMIZERS)[(i + k) % 3]
        last = 2 if net == "mlp_batchnorm" else 1  # too small for two ranks, but where BatchNorm needs two examples
        EQUAL[f"{rule} {net}"] = {"rule": rule, "optimizer": optimizer, "net": net, "sizes": [12, 13, last]}
ALONE = ("mezo",)  # baselines that are for one process
for rule, optimizer in zip([rule for rule in ml.BASELINES if rule not in ALONE], cycle(["adamw", "sgd", "clipped"])):
    EQUAL[rule] = {"rule": rule, "optimizer": optimizer, "net": "mlp", "sizes": [12, 13]}
# 2 images on rank 0 outweigh the filters, 1 on rank 1 does not: their gradients come in two layouts.
EQUAL["layouts"] = {"rule": "dfa", "optimizer": "sgd", "net": "conv", "sizes": [3, 5], "dtype": torch.float32}
EQUAL["learned B"] = {
    "rule": "memdfa",
    "optimizer": "adamw",
    "net": "conv_batchnorm",
    "sizes": [12, 13, 1],
    "B_lr": 0.01,
}
LOCAL = {"local_readout": "mlp", "drtp": "conv_batchnorm", "similarity": "conv_batchnorm"}
for (rule, net), optimizer in zip(LOCAL.items(), OPTIMIZERS, strict=True):
    one = {"rule": rule, "optimizer": optimizer, "net": net, "sizes": [12, 13, 1]}
    EQUAL[rule] = one | ({"rule": "local_readout", "similarity": 0.8} if rule == "similarity" else {})
EQUAL["some kept"] = {"rule": "memdfa", "optimizer": "adamw", "net": "mlp", "sizes": [12, 13], "keep_bytes": 3000}


DROP = [("bp", False), ("fa", False), ("dfa", False), ("memdfa", False), ("dfa", True), ("memdfa", True)]


def threads():
    """Count the threads of this process by which ranks talk."""
    tasks = Path("/proc/self/task")
    return sum("gloo" in (task / "comm").read_text() for task in tasks.iterdir()) if tasks.exists() else 0


def well(folder):
    """Join for a step and part; then join again and run all cases; then rank 1 is killed."""
    with ranks() as group:
        learn(group, "memdfa", "sgd", "mlp", [12])
        during = threads()
    after, os.environ["MASTER_PORT"] = threads(), os.environ["SECOND_PORT"]
    with ranks() as group:
        found = all_cases(group, folder) | {"threads": (during, after)}
        torch.save(found, folder / f"cases-{group.rank}")
        torch.save(lost(group, "killed"), folder / "killed")


def ill(folder):
    """Start the command with another seed on each rank; then rank 1 hangs."""
    seed = os.environ["RANK"]
    status = cli.main(["train", "--epochs", "1", "--out", str(folder / "run"), "--seed", seed])
    torch.save(status, folder / f"status-{seed}")
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    with ranks(timeout_s=3) as group:
        torch.save(lost(group, "hangs"), folder / "hangs")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"well": well, "ill": ill}[sys.argv[1]](Path(sys.argv[2]))
