"""The two transformers: torch's own layer as oracle, all rules and baselines, prediction, what is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from problems import EVERY_RULE, STORAGES, rotated
from reference import assert_identical, refuses
from torch import nn

import memdfa_lab as ml
from memdfa_lab.lab.transformers import Unit

ADAM = partial(torch.optim.Adam, lr=0.01)
DRAW = torch.Generator().manual_seed(0)
LETTERS = torch.randint(11, (6, 8), generator=DRAW)
# network -> how it is made, x and y, the loss, the blocks
NETWORKS = {
    "vit": (
        partial(ml.models.vit, (3, 8, 12), 5, width=16, depth=3),
        (torch.randn(6, 3, 8, 12, generator=DRAW), torch.arange(6) % 5),
        F.cross_entropy,
        5,
    ),
    "gpt": (
        partial(ml.models.gpt, 11, 8, width=16, depth=3),
        (LETTERS, LETTERS.roll(-1, 1)),
        ml.losses.token_cross_entropy,
        4,
    ),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def made(name: str, rule: str, storage: str = "regenerated") -> ml.Rule:
    make, _, loss, _ = NETWORKS[name]
    return EVERY_RULE[rule](make(), ADAM, loss, STORAGES[storage](3))


@pytest.mark.parametrize("causal", [False, True])
def test_a_unit_is_torchs_own_pre_norm_layer(causal):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unit, h = Unit(16, 4, causal), torch.randn(3, 5, 16)
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(16, 4, 64, **how)
    parts = [layer.norm1.weight, layer.norm1.bias, *layer.self_attn.parameters(), layer.norm2.weight, layer.norm2.bias]
    parts += [*layer.linear1.parameters(), *layer.linear2.parameters()]
    with torch.no_grad():
        for ours, theirs in zip(unit.parameters(), parts, strict=True):
            theirs.copy_(ours.normal_())
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    torch.testing.assert_close(unit(h), layer(h, mask, is_causal=causal))


@every_network
def test_a_unit_is_a_block_and_the_seed_gives_the_weights(name):
    make, (x, _), _, blocks = NETWORKS[name]
    before = torch.get_rng_state()
    net = make(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(net) == len(ml.as_blocks(net)) == blocks
    assert_identical(dict(make(seed=1).state_dict()), dict(net.state_dict()))
    assert not torch.equal(make(seed=2)[0](x), net[0](x))
    assert net(x).shape == ((6, 5) if name == "vit" else (6, 8, 11))


def test_each_letter_is_foretold_from_those_up_to_it_wherever_they_stand():
    net = NETWORKS["gpt"][0]()
    other = LETTERS.clone()
    other[:, 5] = (other[:, 5] + 1) % 11
    same = (net(other) - net(LETTERS)).abs().amax((0, 2)) < 1e-6
    assert same.tolist() == [True] * 5 + [False] * 3
    torch.testing.assert_close(net(LETTERS[:, :5]), net(LETTERS)[:, :5])


@pytest.mark.parametrize("rule", EVERY_RULE)
@every_network
def test_each_rule_learns_by_heart_and_holds_what_is_predicted(name, rule):
    make, (x, y), loss, _ = NETWORKS[name]
    learner = made(name, rule)
    losses = [learner.step(x, y).item() for _ in range(12)]
    assert losses[-1] < losses[0]
    changed = [
        any(not torch.equal(a, b) for a, b in zip(ours.parameters(), first.parameters(), strict=True))
        for ours, first in zip(learner.blocks, make(), strict=True)
    ]
    assert changed == [rule != "last_layer"] * (len(changed) - 1) + [True]
    how = {"x_dtype": x.dtype, "y_shape": y.shape, "y_dtype": torch.long, "loss_fn": loss}
    predicted = ml.memory.predict(rule, make, x.shape, ADAM, ml.feedback.Regenerated(3), **how)
    measured = ml.memory.measure(learner, x, y)
    assert predicted.peak_by_category == measured.peak_by_category
    assert (predicted.peak_bytes, predicted.resting_bytes) == (measured.peak_bytes, measured.resting_bytes)


@rotated("name storage", NETWORKS, STORAGES, turns=3)
def test_dfa_and_mem_dfa_learn_the_same_bit_for_bit(name, storage):
    x, y = NETWORKS[name][1]
    rules = [made(name, rule, storage) for rule in ("dfa", "memdfa")]
    losses = [[rule.step(x[:n], y[:n]).item() for n in (6, 6, 3, 6)] for rule in rules]
    assert losses[0] == losses[1]
    assert_identical(*(copy.deepcopy(rule.state_dict()["blocks"]) for rule in rules))


# how it is made, what the message must say
REFUSED = {
    "heads": (partial(ml.models.gpt, width=10), ("heads must divide the width", "4 heads and width 10")),
    "no units": (partial(ml.models.gpt, depth=0), ("depth", "1", "got 0")),
    "no words": (partial(ml.models.gpt, 0), ("vocabulary", "got 0")),
    "patches": (partial(ml.models.vit, (3, 30, 32), 10), ("patches of 4 x 4", "30 x 32")),
    "shape": (partial(ml.models.vit, (32, 32), 10), ("the input shape must be (C, H, W)", "(32, 32)")),
    "a long text": (lambda: ml.models.gpt(11, 4)(LETTERS), ("4 positions, got 8",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_transformer_is_refused(name):
    make, hints = REFUSED[name]
    with refuses(ValueError, *hints):
        make()
