"""Models that are no chain, cut by torch.fx: their blocks compute what they do, and every rule trains them."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from problems import EVERY_RULE, OPTIMIZERS, rotated
from reference import assert_identical, refuses
from torch import Tensor, nn

import memdfa_lab as ml

CLASSES, SLOWLY = 5, partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


class Norm(nn.BatchNorm2d):
    """Of a class of its own, as timm's are."""


class Convolutional(nn.Module):
    """As tutorials have it, with functions in place of modules, and dropout that asks for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.more = nn.Conv2d(3, 4, 3), Norm(4), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.last = nn.Linear(64, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)), inplace=True)
        h = F.max_pool2d(F.relu(self.more(h)) + h, 3)
        h = F.dropout(F.relu(self.head(h.view(h.size(0), -1))), 0.4, training=self.training)
        return self.last(h)


class Words(nn.Module):
    """An encoder of torch with a mask that its layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(7, 8), nn.Parameter(torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, words: Tensor) -> Tensor:
        h = self.word(words) + self.place[: words.shape[1]]
        return self.head(self.layers(h, mask=self.mask)).mean(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        n, t, width = h.size()
        q, k, v = (part.view(n, t, 2, 4).transpose(1, 2) for part in self.qkv(self.norm(h)).split(width, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return h + self.out(mixed.transpose(1, 2).reshape(n, t, width))


class GPT(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.place = nn.Embedding(6, 8)
        self.layers, self.head = nn.ModuleList([Attention() for _ in range(2)]), nn.Linear(8, CLASSES)
        self.word = nn.Embedding(CLASSES, 8)
        if tied:
            self.word.weight = self.head.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.word(words) if words.dtype is torch.long else words.unflatten(1, (2, 8))
        h = h + self.place(torch.arange(0, h.size(1), device=h.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(h)[:, -1]


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "convolutional": (Convolutional, (3, 14, 14), 4),
    "words": (Words, (6,), 4),
    "vit": (lambda: zoo.VisionTransformer(16, 8, 2, 2, 16, 32, 0.1, num_classes=CLASSES), (3, 16, 16), 6),
    "resnet18": (lambda: zoo.resnet18(num_classes=CLASSES), (3, 32, 32), 10),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=CLASSES), (3, 32, 32), 18),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=CLASSES), (3, 32, 32), 28),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    x = torch.randint(7, (3, *shape)) if name == "words" else torch.randn(3, *shape)
    return make(), x, torch.arange(3)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_the_models_own_parameters_and_compute_the_same_in_both_modes(name):
    model, x, _ = made(name)
    before, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    blocks = ml.as_blocks(model)
    assert len(blocks) == MODELS[name][2]
    assert sorted(before) == sorted(id(p) for p in blocks.parameters())
    assert list(model.state_dict()) == keys
    for mode in (True, False, True):
        (model if mode else blocks).train(mode)
        outputs = []
        for run in (copy.deepcopy(model), blocks):
            torch.manual_seed(1)
            outputs.append(run(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:no test has shown:UserWarning")
def test_memdfa_makes_dfas_step_and_prediction_is_what_is_measured(name):
    states = []
    for rule in (ml.DFA, ml.MemDFA):
        model, x, y = made(name)
        learner = rule(model, SLOWLY)
        torch.manual_seed(2)
        losses = [learner.step(x, y) for _ in range(2)]
        states.append([torch.stack(losses), model.state_dict()])
    assert_identical(*states)
    dtype = torch.long if name == "words" else None
    predicted = ml.memory.predict("memdfa", made(name)[0], tuple(x.shape), SLOWLY, x_dtype=dtype)
    measured = ml.memory.measure(learner, x, y)
    assert predicted.peak_bytes == measured.peak_bytes


@rotated("name rule", ["convolutional", "words"], EVERY_RULE, turns=len(EVERY_RULE))
def test_every_rule_trains_a_traced_model_or_refuses_it(name, rule):
    model, x, y = made(name)
    before = copy.deepcopy(model.state_dict())
    learner = EVERY_RULE[rule](model, OPTIMIZERS["sgd"])
    if (name, rule) == ("words", "fa"):
        with refuses(ValueError, "FA has no B for"):
            learner.step(x, y)
        assert_identical(model.state_dict(), before)
        return
    losses = [float(learner.step(x, y)) for _ in range(12)]
    assert losses[-1] < losses[0]


def test_an_encoder_of_torch_is_a_block_a_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    blocks = ml.as_blocks(model)
    assert len(blocks) == 3
    assert torch.equal(blocks(x), model(x))


def test_show_lists_the_blocks_and_leaves_the_model_as_it_was():
    model, x, _ = made("convolutional")
    before = copy.deepcopy(model.state_dict())
    table = ml.blocks.show(model, x)
    assert_identical(model.state_dict(), before)
    assert list(table["output"]) == [(3, 4, 12, 12), (3, 64), (3, 8), (3, CLASSES)]
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert (table["kept_bytes"] > 0).all()


def test_cut_and_granularity_say_where():
    model = zoo.resnet18(num_classes=CLASSES)
    assert len(ml.as_blocks(model, cut=["layer2", "layer3", "fc"])) == 4
    assert len(ml.as_blocks(zoo.vgg11(num_classes=CLASSES), granularity="unit")) == 11
    assert len(ml.as_blocks(nn.Sequential(Convolutional()), granularity="layer")) == 4


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Two(Asks):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x) + other


class Names(Asks):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.layer(x)}


class Keeps(Asks):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.layer(x)
        return self.last


class Tied(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


@pytest.mark.parametrize(
    ("make", "cut", "error", "hints"),
    [
        (Asks, None, TypeError, ["if x.sum() > 0", "test_cut.py", "list of modules", "torch.fx.wrap"]),
        (Two, None, TypeError, ["other"]),
        (Names, None, TypeError, ["returns a dict"]),
        (Keeps, None, TypeError, ["last"]),
        (Tied, None, ValueError, ["share a tensor"]),
        (Convolutional, ["nowhere"], ValueError, ["no module 'nowhere'"]),
        (Convolutional, ["conv"], ValueError, ["no weight layer"]),
        (lambda: torch.fx.symbolic_trace(Tied()), None, TypeError, ["untraced"]),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line_and_left_as_it_was(make, cut, error, hints):
    model = make()
    before = [set(vars(part)) for part in model.modules()]
    with refuses(error, *hints):
        ml.as_blocks(model, cut)
    assert [set(vars(part)) for part in model.modules()] == before


def test_a_layer_of_a_list_that_cannot_be_traced_stays_whole():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), Asks()), Asks(), nn.Linear(4, 2))
    assert len(ml.as_blocks(model, granularity="layer")) == 4
