"""Models that are no chain, cut by torch.fx: their blocks compute what they do, and every rule trains them."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from problems import EVERY_RULE, Problem, make_rule, rotated, train
from reference import assert_close_training, assert_identical, refuses, refuses_and_keeps
from test_transport import train_by_oracle
from torch import Tensor, nn
from torchvision_models import row

import memdfa_lab as ml
from memdfa_lab.core.generators import drawn, states

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
        self.word, self.place = nn.Embedding(CLASSES, 8), nn.Parameter(torch.randn(6, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(6))

    def forward(self, words: Tensor) -> Tensor:
        h = self.word(words) + self.place[: words.shape[1]]
        return self.head(self.layers(h, mask=self.mask, is_causal=True)).mean(1)


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
    def __init__(self, words: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(CLASSES, 8) if words else nn.Linear(8, 8), nn.Embedding(6, 8)
        self.layers, self.head = nn.ModuleList([Attention() for _ in range(2)]), nn.Linear(8, CLASSES)
        if tied:
            self.head.weight = self.word.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.word(words) + self.place(torch.arange(0, words.size(1), device=words.device))
        for layer in self.layers:
            h = layer(h)
        return self.head(h)[:, -1]


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "convolutional": (Convolutional, (3, 14, 14), 4),
    "words": (Words, (6,), 4),
    "gpt": (GPT, (6,), 4),
    "vit": (lambda: zoo.VisionTransformer(16, 8, 2, 2, 16, 32, 0.1, num_classes=CLASSES), (3, 16, 16), 6),
    "resnet18": (lambda: zoo.resnet18(num_classes=CLASSES), (3, 32, 32), 10),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=CLASSES), (3, 32, 32), 18),
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=CLASSES), (3, 32, 32), 28),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    make, shape, _ = MODELS[name]
    x = torch.randint(CLASSES, (3, *shape)) if name in ("words", "gpt") else torch.randn(3, *shape)
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


@pytest.mark.parametrize("again", [copy.deepcopy, lambda blocks: pickle.loads(pickle.dumps(blocks))])
def test_a_copy_of_the_blocks_computes_the_same_from_weights_of_its_own(again):
    model, x, _ = made("gpt")
    blocks = again(ml.as_blocks(model))
    assert torch.equal(blocks(x), model(x))
    with torch.no_grad():
        next(blocks.parameters()).add_(1)
    assert not torch.equal(blocks(x), model(x))


def test_blocks_follow_the_model_to_another_dtype():
    model, x, _ = made("words")
    blocks = ml.as_blocks(model.eval())
    model.double()
    assert blocks(x).dtype is torch.float64
    assert torch.equal(blocks(x), model(x))


def test_a_mode_for_which_there_is_no_code_is_refused():
    model = nn.Sequential(Convolutional())
    blocks = ml.as_blocks(model, granularity="layer")
    model[0].eval()
    with refuses(RuntimeError, "other modes", "train()"):
        blocks(torch.randn(2, 3, 14, 14))


class AsksUnseen(nn.Module):
    """A model that asks something of x that torch.fx does not see, and takes the other way with it."""

    def __init__(self, much):
        super().__init__()
        self.first, self.second, self.much = nn.Linear(8, 8), nn.Linear(8, 5), much

    def forward(self, x):
        h = self.first(x).relu()
        return self.second(h * self.much if x.dtype is torch.float32 else h)


@pytest.mark.parametrize("rule", ml.RULES)
@pytest.mark.parametrize("given", [lambda model: model, ml.as_blocks])
def test_blocks_that_compute_something_else_than_the_model_are_refused_at_the_first_step(rule, given):
    x, y = torch.randn(6, 8), torch.arange(6) % 5
    learner = ml.RULES[rule](given(AsksUnseen(3.0)), SLOWLY)
    with refuses_and_keeps(learner, ValueError, "AsksUnseen", "something else than the model"):
        learner.step(x, y)
    assert ml.RULES[rule](given(AsksUnseen(1.0)), SLOWLY).step(x, y).isfinite()


def test_what_is_there_for_chains_takes_traced_models(tmp_path):
    model, x, y = made("convolutional")
    learner = ml.MemDFA(model, SLOWLY)
    assert len(ml.alignment.angles(learner, x, y)) == 4
    states = []
    for turns in ([3], [1, 3]):
        model = made("convolutional")[0]
        for epochs in turns:
            keeps = {} if len(turns) == 1 else {"keep_bytes": 10**6}
            learner = ml.MemDFA(model, SLOWLY, **keeps)
            path = tmp_path / str(turns)
            ml.fit(learner, (x.repeat(4, 1, 1, 1), y.repeat(4)), epochs, 3, checkpoint=path, progress=False)
            model = made("convolutional")[0] if epochs == 1 else model
        assert torch.equal(ml.predict(learner, x).argmax(1), model.eval()(x).argmax(1))
        states.append(model.state_dict())
    assert_identical(*states)


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
    predicted = ml.memory.predict("memdfa", made(name)[0], tuple(x.shape), SLOWLY, x_dtype=x.dtype)
    measured = ml.memory.measure(learner, x, y)
    assert predicted.peak_bytes == measured.peak_bytes


@rotated("name rule", ["convolutional", "words", "vit", "gpt"], EVERY_RULE, turns=len(EVERY_RULE), quick=5)
def test_every_rule_trains_a_traced_model_or_refuses_it(name, rule):
    model, x, y = made(name)
    before = copy.deepcopy(model.state_dict())
    lr = 1e-3 if rule == "mezo" else 0.1 if name == "convolutional" else 0.03
    learner = EVERY_RULE[rule](model, partial(torch.optim.SGD, lr=lr))
    if rule == "fa" and name in ("words", "vit"):
        with refuses(ValueError, "FA has no B for"):
            learner.step(x, y)
        assert_identical(model.state_dict(), before)
        return
    losses = [float(learner.step(x, y)) for _ in range(60 if rule == "mezo" else 12)]
    assert losses[-1] < losses[0]


def test_fa_goes_through_attention_as_B_has_it():
    problem = Problem("attention", lambda: ml.as_blocks(GPT(words=False)), (6, 8)).double()
    assert_close_training(train(make_rule("fa", problem), problem), train_by_oracle(problem, steps=4))


class First(nn.Module):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return parts[0] + 1


class Listed(nn.Module):
    """Its last block calls a module on a list, and drops what another one returns."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.first, self.dropped = nn.Sequential(First()), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.layers[1](self.layers[0](x))
        self.dropped(h)
        return self.first([h])


def test_what_is_called_otherwise_than_in_a_chain_is_called_so():
    model, x = Listed(), torch.randn(2, 4)
    blocks = ml.as_blocks(model, granularity="unit")
    assert torch.equal(blocks(x), model(x))


def test_an_encoder_of_torch_is_a_block_a_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval(), torch.randn(2, 5, 8)
    blocks = ml.as_blocks(model)
    assert len(blocks) == 3
    assert torch.equal(blocks(x), model(x))
    assert len(ml.as_blocks(zoo.vit_b_16(image_size=32, num_classes=CLASSES))) >= 13


def test_show_lists_the_blocks_and_leaves_the_model_as_it_was():
    model, x, _ = made("convolutional")
    before = copy.deepcopy(model.state_dict())
    table = ml.blocks.show(model, x)
    assert_identical(model.state_dict(), before)
    assert list(table["output"]) == [(3, 4, 12, 12), (3, 64), (3, 8), (3, CLASSES)]
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert (table["kept_bytes"] > 0).all()
    assert not any(table["note"])
    model, x, _ = made("gpt")
    table = ml.blocks.show(model, x)
    assert "a skip spans 2 weight layers" in table["note"][1]
    assert "LayerNorm" not in table["modules"][0]
    assert table._repr_html_()


def test_cut_and_granularity_say_where():
    model = zoo.resnet18(num_classes=CLASSES)
    assert len(ml.as_blocks(model, cut=["layer2", "layer3", "fc"])) == 4
    assert len(ml.as_blocks(model, cut="fc")) == 2
    assert len(ml.as_blocks(zoo.squeezenet1_1(num_classes=CLASSES), granularity="unit")) == 10
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


class Draws(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(1)


class DrawsByNumpy(Asks):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * np.random.rand()  # noqa: NPY002  (what a user may write)


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
        (lambda: GPT(tied=True), None, ValueError, ["share a tensor (word.weight and head.weight)"]),
        (Draws, None, TypeError, ["random numbers"]),
        (DrawsByNumpy, None, TypeError, ["random numbers"]),
        (Convolutional, ["nowhere"], ValueError, ["no module 'nowhere'"]),
        (Convolutional, ["conv"], ValueError, ["no weight layer"]),
        (lambda: torch.fx.symbolic_trace(Tied()), None, TypeError, ["untraced"]),
    ],
)
def test_what_cannot_be_cut_is_refused_in_a_line_and_left_as_it_was(make, cut, error, hints):
    model = make()
    before, generators = [set(vars(part)) for part in model.modules()], states("cpu")
    with refuses(error, *hints):
        ml.as_blocks(model, cut)
    assert not drawn(generators, states("cpu"))
    assert [set(vars(part)) for part in model.modules()] == before


def test_a_layer_of_a_list_that_cannot_be_traced_stays_whole():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), Asks()), Asks(), nn.Linear(4, 2))
    assert len(ml.as_blocks(model, granularity="layer")) == 4


# the smallest of each family that no test above has
FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "regnet_y_400mf", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_t", "vgg11", "vit_b_16",
    "wide_resnet50_2",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:no test has shown:UserWarning")
def test_a_family_of_torchvision_is_cut_and_trained_as_the_table_has_it(name):
    assert row(name)[3:] == [True, True, True, ""]
