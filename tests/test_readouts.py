"""Readouts of words, signals and images: a classifier at each position, other sizes, groups of parameters, refusals."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import rotated
from reference import assert_identical, refuses, refuses_and_keeps
from test_positions import NETS, V, batch
from test_transformers import ADAM, LETTERS, NETWORKS
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.readout import View, warn_of
from memdfa_lab.core.seeds import mix

SGD = partial(torch.optim.SGD, lr=0.1)
X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class Half(nn.Module):
    """A convolution with as many positions as it gets, of which a pool leaves half."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(inputs, units, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))

    def forward(self, h):
        return self.inner(h)


def halved() -> list[nn.Module]:
    return [Half(2, 6), nn.Conv2d(6, 7, 3, padding=1), nn.Tanh(), nn.Upsample(scale_factor=2), nn.Conv2d(7, V, 1)]


NETS = {**NETS, "halved images": (halved, (2, 6, 4), NETS["images"][2], 1)}


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(*make())


def made(net: str, optimizer=SGD, **options) -> ml.LocalReadout:
    return ml.LocalReadout(seeded(NETS[net][0]), optimizer, NETS[net][2], **options)


def sample(net: str, n: int = 6):
    return batch("images" if net == "halved images" else net, n)


def of_transformer(name: str, **options) -> ml.LocalReadout:
    make, _, loss, _ = NETWORKS[name]
    return ml.LocalReadout(make(), ADAM, loss, **options)


def logits_of(rule: ml.LocalReadout, x) -> list[torch.Tensor]:
    """Return the logits of each readout."""
    found = []
    with torch.no_grad():
        for readout, view, block in zip(rule.readouts, rule.views[rule.shapes], rule.chain, strict=False):
            x = block(x)
            found.append(readout.classify(x, view))
    return found


def torchs_own(net: str, h) -> nn.Module:
    """Return a classifier of each position in torch's own layers."""
    if net == "words":
        return nn.Linear(h.shape[-1], V)
    layer = (nn.Conv1d if h.dim() == 3 else nn.Conv2d)(h.shape[1], V, 1)
    return nn.Sequential(layer, nn.Upsample((6, 4), mode="bilinear")) if h.shape[2:] == (3, 2) else layer


@pytest.mark.parametrize("net", NETS)
def test_each_position_has_the_same_classifier_as_in_a_plain_loop(net):
    rule, twin = made(net, seed=5), ml.as_blocks(seeded(NETS[net][0]))
    rule.blocks.double(), twin.double()
    x, y = sample(net)
    x, h, heads = x.double(), x.double(), []
    for i, block in enumerate(twin[:-1]):
        h = block(h)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(5, i))
            heads.append(torchs_own(net, h).double())
            torch.manual_seed(mix(5, i))
            linear = nn.Linear(h.shape[NETS[net][3]], V)  # of the same random numbers
        layer = next(part for part in heads[-1].modules() if hasattr(part, "weight"))
        torch.testing.assert_close(layer.weight.flatten(1), linear.weight.double())
    steps = [
        SGD([*block.parameters(), *head.parameters()])
        for block, head in zip(twin, [*heads, nn.Identity()], strict=True)
    ]
    for _ in range(3):
        loss, h = rule.step(x, y), x
        for block, head, step in zip(twin, [*heads, nn.Identity()], steps, strict=True):
            h = block(h.detach())
            own_loss = NETS[net][2](head(h), y)
            own_loss.backward()
            step.step(), step.zero_grad()
        torch.testing.assert_close(loss, own_loss.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(rule.blocks.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for readout, head in zip(rule.readouts, heads, strict=True):
        weight, bias = head.parameters()
        torch.testing.assert_close(readout.weight, weight.view_as(readout.weight), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(readout.bias, bias, rtol=1e-10, atol=1e-10)


def test_no_readout_of_a_text_sees_later_words():
    rule = of_transformer("gpt")
    for _ in range(4):
        rule.step(LETTERS, LETTERS.roll(-1, 1))
    other = LETTERS.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    for one, two in zip(logits_of(rule, LETTERS), logits_of(rule, other), strict=True):
        assert one.shape == (6, 8, 11)
        differs = (one - two).abs().amax((0, 2)) > 1e-5
        assert differs.tolist() == [False] * 5 + [True] * 3
    assert {tuple(readout.weight.shape) for readout in rule.readouts} == {(11, 16)}


def test_what_readouts_learn_of_random_words_is_no_better_than_chance():
    draw = torch.Generator().manual_seed(1)
    texts = torch.randint(4, (400, 17), generator=draw)
    rule = ml.LocalReadout(ml.models.gpt(4, 16, 16, 2, 2), ADAM, ml.losses.token_cross_entropy)
    for x in texts[:320].split(32):
        rule.step(x[:, :-1], x[:, 1:])
    last = [ml.losses.token_cross_entropy(z, texts[320:, 1:]).item() for z in logits_of(rule, texts[320:, :-1])]
    assert min(last) > 1.38  # log 4 is 1.386


def test_of_patches_each_unit_is_averaged_over_positions_and_mixed_by_a_dense_layer():
    rule = of_transformer("vit", positions=1, similarity=0.5)
    x, y = NETWORKS["vit"][1]
    rule.step(x, y)
    h = rule.chain[0](x).detach()
    readout, view = rule.readouts[0], rule.views[rule.shapes][0]
    assert (h.shape, readout.weight.shape, readout.mix.weight.shape) == ((6, 6, 16), (5, 16), (16, 16))
    torch.testing.assert_close(readout.classify(h, view), F.linear(h.mean(1), readout.weight, readout.bias))
    torch.testing.assert_close(readout.features(h, view), F.linear(h, readout.mix.weight).std(1))
    in_parts = of_transformer("vit", positions=3)
    in_parts.step(x, y)
    readout = in_parts.readouts[0]
    h = in_parts.chain[0](x).detach()
    wanted = F.linear(h.unflatten(1, (3, 2)).mean(2).transpose(1, 2).flatten(1), readout.weight, readout.bias)
    torch.testing.assert_close(readout.classify(h, in_parts.views[in_parts.shapes][0]), wanted)


def test_units_of_a_signal_are_first_where_a_convolution_made_them_or_feedback_says_so():
    def units(make, **feedback):
        rule = ml.LocalReadout(seeded(make), SGD, feedback=ml.feedback.Stored(**feedback), positions=2)
        rule.step(torch.randn(4, 3, 9), torch.arange(4) % 3)
        return rule.readouts[0].in_features

    def convolution():
        return [nn.Conv1d(3, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(7), Last(35)]

    def dense():
        return [nn.Linear(9, 7), nn.ReLU(), Last(21)]

    assert (units(convolution), units(convolution, positions="classes last")) == (5 * 2, 7 * 2)
    assert (units(dense), units(dense, positions="classes first")) == (7 * 2, 3 * 2)


class Last(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 3)

    def forward(self, h):
        return self.linear(h.flatten(1))


@pytest.mark.parametrize(("name", "similarity"), [("vit", 0.0), ("vit", 0.5), ("gpt", 0.0)])
def test_transformers_learn_by_heart_and_hold_what_is_predicted(name, similarity):
    make, (x, y), loss, _ = NETWORKS[name]
    rule = of_transformer(name, similarity=similarity)
    losses = [rule.step(x, y).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    how = {"x_dtype": x.dtype, "y_shape": y.shape, "y_dtype": torch.long, "loss_fn": loss, "similarity": similarity}
    predicted, measured = (
        ml.memory.predict("local_readout", make, x.shape, ADAM, **how),
        ml.memory.measure(rule, x, y),
    )
    assert measured.changes.tolist() == predicted.changes.tolist()
    assert measured.resting_by_category == predicted.resting_by_category


@rotated("net positions", NETS, ["shared", "dense"], turns=2)
def test_predicted_is_measured_at_each_position(net, positions):
    (x, y), feedback = sample(net, 16), ml.feedback.Stored(positions=positions)
    measured = ml.memory.measure(made(net, ADAM, feedback=feedback), x, y, warm_up=1)
    how = {"loss_fn": NETS[net][2], "y_shape": tuple(y.shape), "feedback": feedback}
    predicted = ml.memory.predict("local_readout", nn.Sequential(*NETS[net][0]()), x.shape, ADAM, **how)
    assert measured.changes.tolist() == predicted.changes.tolist()
    assert measured.resting_by_category == predicted.resting_by_category


def test_readouts_at_each_position_rest_in_as_few_bytes_at_any_size():
    def rests(make, size: int) -> int:
        """Return the bytes of weights and readouts."""
        shape = (2, 2, size, size)
        how = {"y_shape": (2, size, size), "loss_fn": NETS["images"][2], "steps": 0}
        return ml.memory.predict(
            "local_readout", lambda: nn.Sequential(*make()), shape, SGD, **how
        ).resting_by_category["parameters"]

    for net in ("images", "halved images"):
        assert rests(NETS[net][0], 8) == rests(NETS[net][0], 224) < 10_000


def test_other_lengths_and_sizes_go_on_with_the_same_readouts():
    rule = of_transformer("gpt")
    for length in (8, 5, 8, 1):
        assert rule.step(LETTERS[:, :length], LETTERS.roll(-1, 1)[:, :length]).isfinite()
    for net in ("images", "halved images"):
        rule = made(net)
        for size in (6, 10, 6):
            assert rule.step(torch.randn(3, 2, size, size), torch.zeros(3, size, size)).isfinite()


def test_a_dense_readout_refuses_another_size_before_anything_changes():
    rule = of_transformer("gpt", feedback=ml.feedback.Stored(positions="dense"))
    rule.step(LETTERS, LETTERS.roll(-1, 1))
    hints = "block 0's readout", "64 inputs and 88 logits", "(6, 5)", "64 and 55", "no weight was changed", "MemDFA"
    with refuses_and_keeps(rule, ValueError, *hints):
        rule.step(LETTERS[:, :5], LETTERS[:, :5])
    saved, other = copy.deepcopy(rule.state_dict()), of_transformer("gpt")
    other.step(LETTERS, LETTERS)
    other.load_state_dict(saved)
    other.step(LETTERS, LETTERS)
    with refuses_and_keeps(other, ValueError, "block 0's readout"):
        other.step(LETTERS[:, :5], LETTERS[:, :5])


def test_classes_that_may_be_in_either_dimension_are_asked_for():
    net = nn.Sequential(nn.Conv1d(5, 5, 1), nn.ReLU(), nn.Conv1d(5, 5, 1))
    x, y = torch.randn(4, 5, 5), torch.randn(4, 5, 5)
    with refuses(ValueError, "say which", "classes first", "no weight was changed"):
        ml.LocalReadout(net, SGD, F.mse_loss).step(x, y)
    for positions in ("classes first", "classes last", "dense"):
        rule = ml.LocalReadout(net, SGD, F.mse_loss, ml.feedback.Stored(positions=positions))
        rule.step(x, y)
        assert rule.readouts[0].weight.shape == ((25, 5 * 4) if positions == "dense" else (5, 5))


def test_a_readout_that_sees_words_which_it_may_have_to_foretell_or_is_large_is_told_of_once():
    class Fewer(nn.Linear):
        def forward(self, h):
            return super().forward(h)[:, ::2]

    class More(nn.Linear):
        def forward(self, h):
            return super().forward(h).repeat_interleave(2, 1)

    rule = ml.LocalReadout([Fewer(3, 6), More(6, 5)], SGD, NETS["words"][2])
    x, y = batch("words")
    with pytest.warns(UserWarning, match=r"readout of block 0 sees all of its output \(2, 6\)"):
        rule.step(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.step(x, y)
    large = View((2**27,), (3,), 1, False, 4)
    with pytest.warns(UserWarning, match=r"402,653,184 numbers \(1.50 GiB\), and that of block 0"):
        warn_of([large], False, True)


class Flat(nn.Module):
    """A block that puts out one number an example, (N,)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x):
        return self.linear(x)[:, 0]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 3)

    def forward(self, x):
        return self.linear(x[:, None])


@pytest.mark.parametrize("rule", ["memdfa", "dfa", "drtp", "local_readout", "similarity"])
def test_a_block_that_puts_out_one_number_an_example_is_taught(rule):
    kind = {**ml.RULES, **ml.LOCAL_RULES}.get(rule, ml.LocalReadout)
    options = {"similarity": 0.5} if rule == "similarity" else {}
    learner = kind(seeded(lambda: [Flat(), Wide()]), SGD, **options)
    before = learner.blocks[0].linear.weight.clone()
    assert learner.step(X, Y).isfinite()
    assert not torch.equal(learner.blocks[0].linear.weight, before)


# ------------------------------------------------------------------------------------------------ groups of parameters


def split(weights: dict, biases: dict, parameters):
    parameters = list(parameters)
    groups = [{"params": [p for p in parameters if p.dim() > 1], **weights}]
    return torch.optim.SGD([*groups, {"params": [p for p in parameters if p.dim() == 1], **biases}], lr=0.1)


def mlp():
    return [nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)]


def readouts_after(optimizer, steps: int = 2, each=lambda rule: None) -> list[torch.Tensor]:
    rule = ml.LocalReadout(seeded(mlp), optimizer, similarity=0.5)
    for _ in range(steps):
        rule.step(X, Y)
        each(rule)
    return [p.detach().clone() for part in (rule.blocks, *rule.readouts) for p in part.parameters()]


def test_two_groups_of_the_same_settings_are_one():
    assert_identical(readouts_after(partial(split, {}, {})), readouts_after(SGD))


def test_each_group_of_a_readout_follows_the_blocks_group_of_its_number():
    def schedule(rule):
        for optimizer in rule.optimizers:
            optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = 0.0, 0.2

    optimizer = partial(split, {"weight_decay": 0.5}, {"lr": 0.0})
    first, second = (readouts_after(optimizer, steps, schedule)[5:] for steps in (1, 2))
    drawn = [p.detach() for i in range(2) for p in own_readout(i)]
    for start, one, two in zip(drawn, first, second, strict=True):
        weight = one.dim() > 1  # which learns in the first step only, the biases in the second
        assert (torch.equal(start, one), torch.equal(one, two)) == (not weight, weight)


def own_readout(i: int) -> list[nn.Parameter]:
    """Return a new readout's weight, bias and second layer for block i of `mlp`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(0, i))
        return [*nn.Linear(5, 3).parameters(), *nn.Linear(5, 5, bias=False).parameters()]


def test_groups_of_other_numbers_for_a_readout_than_for_its_block_are_refused_before_anything_changes():
    def without_empty(parameters):
        parameters = list(parameters)
        groups = [[p for p in parameters if p.dim() == n] for n in (2, 1)]
        return torch.optim.SGD([{"params": group} for group in groups if group], lr=0.1)

    rule = ml.LocalReadout(seeded(mlp), without_empty)
    with refuses_and_keeps(rule, ValueError, "block 1's optimizer has 1", "readout's has 2", "no weight was changed"):
        rule.step(X, Y)
    net = seeded(mlp)
    net[2].requires_grad_(False)
    rule = ml.LocalReadout(net, without_empty)
    rule.step(X, Y)  # a frozen block's readout does not learn
    rule.blocks[1].requires_grad_(True)
    before = copy.deepcopy(rule.blocks.state_dict())
    with refuses(ValueError, "block 1's optimizer has 1"):
        rule.step(X, Y)
    assert_identical(rule.blocks.state_dict(), before)


@pytest.mark.parametrize("name", ["vit", "gpt", "two groups"])
def test_a_run_that_was_cut_goes_on_with_its_readouts(name, tmp_path):
    def make():
        if name == "two groups":
            of_groups = partial(split, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5})
            return ml.LocalReadout(seeded(mlp), of_groups), (X, Y)
        return of_transformer(name), NETWORKS[name][1]

    found = []
    for cuts in ([3], [1, 3]):
        for epochs in cuts:
            rule, data = make()
            scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
            ml.fit(rule, data, epochs, 4, scheduler=scheduler, checkpoint=tmp_path / str(len(cuts)), progress=False)
        optimizers = [optimizer.state_dict() for optimizer in (*rule.optimizers, *rule.readout_optimizers)]
        found.append([[p.detach() for part in (rule.blocks, *rule.readouts) for p in part.parameters()], optimizers])
    assert_identical(*found)
