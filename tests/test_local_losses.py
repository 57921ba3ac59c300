"""Local readouts and DRTP: the numbers of a plain loop, predictions to the byte, runs that go on, what is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import BY_NAME, OPTIMIZERS, Problem, params, record, rotated
from reference import assert_same_training, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.local_losses import DRTP, LOCAL_RULES, LocalReadout
from memdfa_lab.core.seeds import mix

MLP, SGD = BY_NAME["mlp_relu"], OPTIMIZERS["sgd"]
RULES = {name: (name, {}) for name in LOCAL_RULES} | {"similarity": ("local_readout", {"similarity": 0.9})}
IN_LOOP = ("mlp_relu", "conv_pool", "batchnorm")


class Head(nn.Module):
    """A readout in torch's own layers, and the similarity loss from Nøkland and Eidnes's description."""

    def __init__(self, h, classes: int, positions: int, similarity: float):
        super().__init__()
        on_map = h.dim() == 4
        pool = [nn.AdaptiveAvgPool2d([min(positions, n) for n in h.shape[2:]])] if on_map else []
        self.seen, self.similarity = nn.Sequential(*pool, nn.Flatten()), similarity
        self.linear = nn.Linear(self.seen(h).shape[1], classes)
        if similarity:
            C = h.shape[1]
            self.mix = nn.Conv2d(C, C, 3, padding=1, bias=False) if on_map else nn.Linear(C, C, bias=False)

    def forward(self, h, y):
        loss = F.cross_entropy(self.linear(self.seen(h)), y)
        if not self.similarity:
            return loss
        mixed = self.mix(h)
        mixed = mixed.flatten(2).std(2) if h.dim() == 4 else mixed
        alike, wanted = (torch.corrcoef(rows) for rows in (mixed, F.one_hot(y, self.linear.out_features).to(h)))
        return (1 - self.similarity) * loss + self.similarity * (alike - wanted).square().mean()


def heads_of(blocks, x, classes: int, positions: int, similarity: float) -> list[nn.Module]:
    found: list[nn.Module] = []
    for i, block in enumerate(blocks[:-1]):
        x = block(x)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(5, i))
            found.append(Head(x, classes, positions, similarity).to(x))
    return [*found, lambda h, y: F.cross_entropy(h, y)]


# AdamW makes a step of the rounding before BatchNorm
@rotated(
    "problem optimizer similarity",
    params(lambda problem: problem.name in IN_LOOP),
    ["sgd", "momentum"],
    [0.0, 0.7],
    turns=2,
)
def test_each_block_learns_from_its_own_readout_and_no_other(problem: Problem, optimizer, similarity):
    check_equals_a_plain_loop(problem, optimizer, similarity)


def check_equals_a_plain_loop(problem: Problem, optimizer="sgd", similarity=0.7, rule=LocalReadout):
    problem, factory = problem.double(), OPTIMIZERS[optimizer]
    rule = rule(problem.build(), factory, positions=2, similarity=similarity, seed=5)
    twin = ml.as_blocks(problem.build())
    with torch.random.fork_rng(devices=[]):
        x, y = next(problem.batches(1))
        heads = heads_of(ml.as_blocks(problem.build()), x, int(problem.y.max()) + 1, 2, similarity)
    own = [[*block.parameters(), *getattr(head, "parameters", list)()] for block, head in zip(twin, heads, strict=True)]
    steps = [factory(parameters) for parameters in own]
    for x, y in problem.batches(4):
        loss = rule.step(x, y)
        h = x
        for block, head, step in zip(twin, heads, steps, strict=True):
            h = block(h.detach())
            own_loss = head(h, y)
            own_loss.backward()
            step.step()
            step.zero_grad()
        torch.testing.assert_close(loss, own_loss.detach(), rtol=1e-12, atol=1e-12)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(rule.blocks.state_dict()[name], value, rtol=1e-10, atol=1e-10)
    for readout, head in zip(rule.readouts, heads, strict=False):
        torch.testing.assert_close(readout.weight, head.linear.weight, rtol=1e-10, atol=1e-10)
        if similarity:
            torch.testing.assert_close(readout.mix.weight, head.mix.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_similarity_is_finite_where_examples_are_not_told_apart(dims):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    pools = nn.AdaptiveAvgPool3d if dims == 3 else nn.AdaptiveAvgPool2d if dims == 2 else nn.AdaptiveAvgPool1d
    net = nn.Sequential(conv(2, 5, 3), nn.ReLU(), conv(5, 6, 1), pools(1), nn.Flatten(), nn.Linear(6, 3))
    rule = LocalReadout(net, SGD, similarity=0.99)
    for _ in range(2):
        assert rule.step(torch.zeros(4, 2, *[3] * dims), torch.tensor([0, 1, 2, 0])).isfinite()


def test_drtp_sends_the_targets_through_b():
    check_sends_the_targets()


def check_sends_the_targets(rule=DRTP):
    net = MLP.build()
    rule, (x, y) = rule(MLP.build(), SGD, feedback=ml.feedback.Stored(3)), (MLP.x, MLP.y)
    before = {name: value.clone() for name, value in rule.blocks.state_dict().items()}
    rule.step(x, y)
    target = -F.one_hot(y, 5).float() / len(y)
    h = x
    for i, block in enumerate(ml.as_blocks(net)[:-1]):
        out = block(h)
        (signal := target @ ml.feedback.Stored(3).dense(i, 5, out.shape[1], out))
        out.backward(signal)
        for name, parameter in block.named_parameters():
            changed = before[f"{i}.{name}"] - 0.1 * parameter.grad
            torch.testing.assert_close(rule.blocks.state_dict()[f"{i}.{name}"], changed, rtol=1e-4, atol=1e-6)
        h = out.detach()


@rotated("problem rule optimizer", params(), RULES, OPTIMIZERS)
def test_what_is_predicted_is_measured_to_the_byte(problem, rule, optimizer):
    factory, (name, options) = OPTIMIZERS[optimizer], RULES[rule]
    rule = LOCAL_RULES[name](problem.build(), factory, problem.loss, **options)
    with torch.random.fork_rng(devices=[]):
        measured = ml.memory.measure(rule, problem.x, problem.y, warm_up=1)
    how = {
        "loss_fn": problem.loss,
        "y_shape": tuple(problem.y.shape),
        "y_dtype": torch.long,
        "x_dtype": problem.x.dtype,
    }
    predicted = ml.memory.predict(name, problem.build(), problem.x.shape, factory, **how, **options)
    assert measured.changes.tolist() == predicted.changes.tolist()
    assert measured.resting_by_category == predicted.resting_by_category


@pytest.mark.parametrize("name", LOCAL_RULES)
def test_the_peak_does_not_grow_with_depth(name):
    peaks = [
        ml.memory.predict(name, partial(ml.models.mlp, 32, [32] * depth, 10), (64, 32)).peak_bytes for depth in (4, 40)
    ]
    assert peaks[0] == peaks[1] > 64 * 32 * 4


def test_angles_and_frozen_blocks_leave_readouts_as_they_are():
    rule, twin = (LocalReadout(MLP.build(), SGD) for _ in range(2))
    rule.step(MLP.x, MLP.y), twin.step(MLP.x, MLP.y)
    ml.alignment.angles(rule, MLP.x, MLP.y)
    assert torch.equal(rule.readouts[0].weight, twin.readouts[0].weight)
    rule.blocks[0].requires_grad_(False)
    rule.step(MLP.x, MLP.y)
    assert torch.equal(rule.readouts[0].weight, twin.readouts[0].weight)
    assert not torch.equal(rule.readouts[1].weight, twin.readouts[1].weight)


def test_readouts_follow_the_blocks_learning_rate_and_clip_norm():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)

    rule = LocalReadout(MLP.build(), SGD)
    ml.fit(rule, (MLP.x, MLP.y), 2, 6, scheduler=schedule, progress=False)
    assert rule.readout_optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    rule = LocalReadout(MLP.build(), SGD, clip_norm=1e-6)
    rule.step(MLP.x, MLP.y)
    before = rule.readouts[0].weight.clone()
    rule.step(MLP.x, MLP.y)
    assert 0 < (rule.readouts[0].weight - before).norm() < 1.1e-7


def test_a_batch_that_gives_a_readout_other_inputs_is_refused_in_a_line():
    pooled = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
    rule = LocalReadout(nn.Sequential(nn.Conv2d(1, 2, 3), pooled, nn.Linear(2, 3)), SGD)
    rule.step(torch.randn(4, 1, 8, 8), torch.arange(4) % 3)
    hints = (
        "block 0's readout",
        "made for 32 inputs",
        "3 logits",
        "now gives 2 and 3;",
        "no weight was changed",
        "MemDFA",
    )
    with refuses_and_keeps(rule, ValueError, *hints):
        rule.step(torch.randn(4, 1, 3, 3), torch.arange(4) % 3)


def test_what_is_not_finite_in_a_readout_is_refused():
    rule = LocalReadout(MLP.build(), SGD)
    rule.step(MLP.x, MLP.y)
    with torch.no_grad():
        rule.readouts[1].weight.fill_(torch.inf)
    with refuses(FloatingPointError, "block 1's readout", "earlier blocks have learned"):
        rule.step(MLP.x, MLP.y)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_was_cut_goes_on_bit_for_bit(rule, tmp_path):
    problem, found, (name, options) = BY_NAME["dropout"], [], RULES[rule]
    data = problem.x.repeat(3, 1, 1, 1), problem.y.repeat(3)
    for cuts in ([3], [1, 3]):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            for epochs in cuts:
                rule = LOCAL_RULES[name](problem.build(), OPTIMIZERS["adamw"], **options)
                ml.fit(rule, data, epochs, 8, checkpoint=tmp_path / f"{len(cuts)}.pt", progress=False)
            own = nn.ModuleList([rule.blocks, *getattr(rule, "readouts", [])])
            found.append(record([], own, [*rule.optimizers, *getattr(rule, "readout_optimizers", [])]))
    assert_same_training(*found)


def test_the_command_trains_and_learns(tmp_path, capsys):
    common = ["train", "--network", "784-[64]x2-10", "--dataset", "mnist5k", "--optimizer", "adam", "--lr", "0.002"]
    for name in LOCAL_RULES:
        status = cli.main([*common, "--epochs", "10", "--rule", name, "--out", str(tmp_path / name)])
        assert status == 0, capsys.readouterr().err
        accuracy = float(capsys.readouterr().out.splitlines()[1].split()[4])
        assert accuracy > (0.9 if name == "local_readout" else 0.4)


def test_what_does_not_fit_is_refused_in_a_line(tmp_path):
    for kind in LOCAL_RULES.values():
        for options in ({"clip_global_norm": 1.0}, {"pass1": "int8"}):
            with refuses(ValueError, next(iter(options))):
                kind(MLP.build(), SGD, **options)
        with refuses(ValueError, "cannot offload"):
            kind(MLP.build(), SGD, offload=ml.offload.Host("cpu"))
        with refuses(ValueError, "feedback that learns"):
            kind(MLP.build(), SGD, feedback=ml.feedback.Learned(lr=0.1))
    for wrong in ({"positions": 0}, {"seed": -1}, {"similarity": -0.1}, {"similarity": 1.1}):
        with refuses(ValueError, next(iter(wrong))):
            LocalReadout(MLP.build(), SGD, **wrong)
    with refuses(TypeError, "labels", "MemDFA"):
        DRTP(MLP.build(), SGD, F.mse_loss).step(MLP.x, torch.randn(6, 5))
    compared = LocalReadout(MLP.build(), SGD, F.mse_loss, similarity=0.5)
    with refuses_and_keeps(compared, TypeError, "labels", "leave it out"):
        compared.step(MLP.x, torch.randn(6, 5))
    for kind in LOCAL_RULES.values():
        rule = kind(MLP.build(), SGD)
        rule.loss_fn = lambda z, y, net=rule.blocks: (
            F.cross_entropy(z, y) + sum(p.abs().sum() for p in net.parameters())
        )
        with refuses_and_keeps(rule, ValueError, "penalty", "weight_decay"):
            rule.step(MLP.x, MLP.y)
    other, rule = ml.MemDFA(MLP.build(), SGD), LocalReadout(MLP.build(), SGD)
    with refuses(ValueError, "no readouts"):
        rule.load_state_dict(other.state_dict())
    rule.step(MLP.x, MLP.y)
    for name, value in {"positions": 2, "similarity": 0.5}.items():
        with refuses_and_keeps(other := LocalReadout(MLP.build(), SGD, **{name: value}), ValueError, f"not {value}"):
            other.load_state_dict(rule.state_dict())
