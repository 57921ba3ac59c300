"""Feedback at each position of words, signals and images, the same at all of them, or on a grid of a few."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import STORAGES, rotated
from reference import assert_identical, refuses, refuses_and_keeps
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.core.signal import Signal
from memdfa_lab.memory import measure, predict

SGD = partial(torch.optim.SGD, lr=0.1)
V = 5


def of_words(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.movedim(-1, 1), y.long())


def of_pixels(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y.long())


def conv(kind: type[nn.Module]) -> list[nn.Module]:
    return [kind(2, 6, 3, padding=1), nn.ReLU(), kind(6, 7, 3, padding=1), nn.Tanh(), kind(7, V, 1)]


class Patches(nn.Conv2d):
    """A convolution that autograd teaches, not the formulas by hand."""


# the blocks, the shape of x, the loss, the dimension of the classes
NETS = {
    "words": (lambda: [nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, V)], (4, 3), of_words, -1),
    "signals": (lambda: conv(nn.Conv1d), (2, 9), of_pixels, 1),
    "images": (lambda: conv(nn.Conv2d), (2, 6, 4), of_pixels, 1),
    "images by autograd": (lambda: conv(Patches), (2, 6, 4), of_pixels, 1),
}


def made(net: str, rule: str = "memdfa", storage: str = "stored", optimizer=SGD, **positions) -> ml.Rule:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(*NETS[net][0]())
    return ml.RULES[rule](model, optimizer, NETS[net][2], STORAGES[storage](3, **positions))


def batch(net: str, n: int = 6) -> tuple[Tensor, Tensor]:
    """Return x and y, whose labels are floats, as `predict` has them."""
    shape, dim, draw = NETS[net][1], NETS[net][3], torch.Generator().manual_seed(2)
    positions = shape[:-1] if dim == -1 else shape[1:]
    return torch.randn(n, *shape, generator=draw), torch.randint(V, (n, *positions), generator=draw).float()


def at_positions(h: Tensor, dim: int) -> np.ndarray:
    """Return a row for each position of each example."""
    h = h.movedim(dim, -1)
    return h.reshape(-1, h.shape[-1]).double().numpy()


@rotated("net storage", NETS, STORAGES, turns=3)
def test_the_signal_is_e_times_one_matrix_at_each_position(net, storage):
    rule, (x, y), dim = made(net, storage=storage), batch(net), NETS[net][3]
    outputs = [x]
    with torch.no_grad():
        for block in rule.blocks:
            outputs.append(block(outputs[-1]))
    _, e = rule.error(outputs[-1], y)
    for i, out in enumerate(outputs[1:-1]):
        B = STORAGES[storage](3).dense(i, V, out.shape[dim], e).double().numpy()
        signal = rule.signal(i, e).shaped_like(out)
        assert signal.stride() == out.stride()
        np.testing.assert_allclose(at_positions(signal, dim), at_positions(e, dim) @ B, rtol=0, atol=1e-7)
        parts = rule.signal(i, e).reusable(out)
        halves = [parts.of(half).shaped_like(out[half]) for half in (slice(3), slice(3, 6))]
        torch.testing.assert_close(torch.cat(halves), signal, rtol=0, atol=1e-7)


def test_what_a_dense_block_learns_is_the_numpy_twins():
    """dW = (e B * f'(a))^T h, a sum over examples and words."""
    rule, (x, y) = made("words"), batch("words")
    W, b = (p.detach().double().numpy() for p in rule.blocks[0][0].parameters())
    with torch.no_grad():
        _, e = rule.error(rule.blocks(x), y)
    h, B = x.double().numpy().reshape(-1, 3), rule.feedback.dense(0, V, 6, e).double().numpy()
    s = (e.double().numpy().reshape(-1, V) @ B) * (1 - np.tanh(h @ W.T + b) ** 2)
    rule.step(x, y)
    np.testing.assert_allclose(rule.blocks[0][0].weight.detach(), W - 0.1 * s.T @ h, rtol=0, atol=1e-7)
    np.testing.assert_allclose(rule.blocks[0][0].bias.detach(), b - 0.1 * s.sum(0), rtol=0, atol=1e-7)
    assert {tuple(B.shape) for B in rule.feedback.matrices.values()} == {(6, V), (8, V)}


@rotated("net storage positions", NETS, STORAGES, ["shared", "dense"], turns=6)
def test_dfa_and_mem_dfa_learn_the_same_bit_for_bit(net, storage, positions):
    rules = [made(net, rule, storage, positions=positions) for rule in ("dfa", "memdfa")]
    losses = [[rule.step(*batch(net, n)).item() for n in (6, 6, 3, 6)] for rule in rules]
    assert losses[0] == losses[1]
    assert_identical(*(copy.deepcopy(rule.state_dict()["blocks"]) for rule in rules))


@rotated("net rule storage", NETS, ["dfa", "memdfa"], STORAGES, turns=6)
def test_predicted_is_measured(net, rule, storage):
    x, y = batch(net, 16)
    measured = measure(made(net, rule, storage), x, y, warm_up=1)
    net_alone = nn.Sequential(*NETS[net][0]())
    predicted = predict(
        rule, net_alone, x.shape, SGD, STORAGES[storage](3), loss_fn=NETS[net][2], y_shape=tuple(y.shape)
    )
    assert predicted.peak_by_category == measured.peak_by_category
    assert (predicted.peak_bytes, predicted.resting_bytes) == (measured.peak_bytes, measured.resting_bytes)


@pytest.mark.parametrize("rule", ["bp", "dfa", "memdfa"])
def test_whole_number_labels_of_words_are_predicted(rule):
    net, loss = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, V)), ml.losses.token_cross_entropy
    x, y = torch.randn(6, 4, 3), torch.arange(24).view(6, 4) % V
    measured = measure(ml.RULES[rule](net, SGD, loss, STORAGES["stored"](3)), x, y, warm_up=1)
    how = {"loss_fn": loss, "y_shape": (6, 4), "y_dtype": torch.long}
    assert predict(rule, net, x.shape, SGD, STORAGES["stored"](3), **how).peak_bytes == measured.peak_bytes


def test_where_a_block_has_other_positions_its_matrix_is_dense():
    pooled = nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1), nn.MaxPool1d(3), nn.ConvTranspose1d(6, 7, 3, 3), nn.Conv1d(7, V, 1)
    )
    rule = ml.MemDFA(pooled, SGD, of_pixels)
    rule.step(*batch("signals"))
    assert [tuple(B.shape) for B in rule.feedback.matrices.values()] == [(6 * 3, V * 9), (7, V)]
    dense = made("signals", positions="dense")
    dense.step(*batch("signals"))
    assert [tuple(B.shape) for B in dense.feedback.matrices.values()] == [(6 * 9, V * 9), (7 * 9, V * 9)]


def ambiguous(outputs: int, **positions) -> ml.Rule:
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs), nn.Tanh(), nn.Linear(outputs, V))
    return ml.MemDFA(net, SGD, of_words, ml.feedback.Stored(**positions))


def test_a_block_as_wide_as_the_logits_asks_which_dimension_has_the_classes():
    x, y = batch("words")
    rule = ambiguous(V)
    with refuses_and_keeps(
        rule, ValueError, "outputs (6, 4, 6) and (6, 4, 5)", 'positions="classes first"', "no weight"
    ):
        rule.step(x, y)
    shapes = {"classes last": [(6, V), (V, V)], "classes first": [(24, 4 * V), (4, 4)]}
    for positions, expected in shapes.items():
        rule = ambiguous(V, positions=positions)
        rule.step(x, y)
        assert [tuple(B.shape) for B in rule.feedback.matrices.values()] == expected
    with refuses(ValueError, "unknown positions 'pixels'", "classes last"):
        ml.feedback.Stored(positions="pixels")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_state_carries_the_positions(storage):
    first, second = made("words", storage=storage, positions="dense"), made("words", storage=storage)
    assert "positions='dense'" in repr(first.feedback)
    assert "positions" not in repr(second.feedback)
    first.step(*batch("words"))
    second.load_state_dict(first.state_dict())
    assert second.feedback.positions == "dense"
    for rule in (first, second):
        rule.step(*batch("words"))
    assert_identical(first.state_dict(), second.state_dict())


def test_an_error_without_positions_has_none():
    e, out = torch.ones(4, V), torch.empty(4, 6, V)
    assert Signal(0, e, ml.feedback.Stored()).shaped_like(out).shape == (4, 6, V)
    assert ml.feedback.Stored().class_dim((4, V), (4, 6)) is None


def pooled(kind: type[nn.Module] = nn.Conv2d) -> nn.Module:
    """Return a network whose logits have no positions; every convolution but the first is taught by autograd."""
    first, pool, skip = {nn.Conv2d: (nn.Conv2d, nn.AvgPool2d, nn.ReLU), Patches: (Patches, nn.MaxPool2d, nn.GELU)}[kind]
    layers = [first(2, 6, 3, padding=1), skip(), first(6, 7, 3, padding=1), pool(2), nn.Tanh()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(7 * 6, 9), nn.ReLU(), nn.Linear(9, V))


def words() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 7), nn.GELU(), nn.Flatten(), nn.Linear(63, V))


# the network, the shape of x, and the columns of B_i on a grid of 2; where Flatten ends a block it has no positions
COARSE = {
    "images": (pooled, (2, 6, 4), [6 * 4, 7 * 6, 9]),
    "images by autograd": (partial(pooled, Patches), (2, 6, 4), [6 * 4, 7 * 6, 9]),
    "words": (words, (9, 3), [6 * 2, 7 * 9]),
}


def coarse(net: str, rule: str, storage: str = "stored", grid: int | None = 2, optimizer=SGD) -> ml.Rule:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return ml.RULES[rule](COARSE[net][0](), optimizer, feedback=STORAGES[storage](3, grid=grid))


def labelled(net: str, n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *COARSE[net][1], generator=torch.Generator().manual_seed(2)), torch.arange(n) % V


@rotated("net storage grid", COARSE, STORAGES, [1, 2, 3], turns=6)
def test_a_signal_on_a_grid_is_interpolated(net, storage, grid):
    rule, (x, y), units = coarse(net, "memdfa", storage, grid), labelled(net, 6), -1 if net == "words" else 1
    with torch.no_grad():
        out, logits = rule.blocks[0](x), rule.blocks(x)
    _, e = rule.error(logits, y)
    signal, places = rule.signal(0, e).shaped_like(out), [min(grid, size) for size in out.movedim(units, 1).shape[2:]]
    B = STORAGES[storage](3).dense(0, V, 6 * math.prod(places), e)
    few = (e @ B).view(6, 6, *places)
    mode = "linear" if net == "words" else "bilinear"
    torch.testing.assert_close(signal.movedim(units, 1), F.interpolate(few, out.movedim(units, 1).shape[2:], mode=mode))
    assert signal.stride() == out.stride()
    halves = [rule.signal(0, e).reusable(out).of(half).shaped_like(out[half]) for half in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat(halves), signal)


@rotated("net storage optimizer", COARSE, STORAGES, [SGD, partial(torch.optim.Adam, lr=0.01)], turns=6)
def test_on_a_grid_dfa_is_mem_dfa_and_a_state_goes_on(net, storage, optimizer):
    rules = [coarse(net, rule, storage, optimizer=optimizer) for rule in ("dfa", "memdfa")]
    losses = [[rule.step(*labelled(net, n)).item() for n in (6, 6, 3)] for rule in rules]
    assert losses[0] == losses[1]
    other = coarse(net, "memdfa", storage, grid=None, optimizer=optimizer)
    other.load_state_dict(rules[1].state_dict())
    assert other.feedback.grid == 2
    assert "grid=2" in repr(other.feedback)
    for rule in (*rules, other):
        rule.step(*labelled(net, 6))
    for rule in rules:
        assert_identical(rule.state_dict()["blocks"], other.state_dict()["blocks"])


@rotated("net rule storage", COARSE, ["dfa", "memdfa"], STORAGES, turns=6)
def test_on_a_grid_predicted_is_measured(net, rule, storage):
    x, y = labelled(net, 48)
    measured = measure(coarse(net, rule, storage), x, y, warm_up=1)
    feedback = STORAGES[storage](3, grid=2)
    predicted = predict(rule, COARSE[net][0](), x.shape, SGD, feedback)
    assert predicted.peak_by_category == measured.peak_by_category
    assert (predicted.peak_bytes, predicted.resting_bytes) == (measured.peak_bytes, measured.resting_bytes)


@pytest.mark.parametrize("net", COARSE)
def test_the_matrices_have_the_grids_columns(net):
    rule = coarse(net, "dfa")
    rule.step(*labelled(net, 6))
    assert [tuple(B.shape) for B in rule.feedback.matrices.values()] == [(n, V) for n in COARSE[net][2]]
    with refuses(ValueError, "grid must be a whole number from 1"):
        ml.feedback.Stored(grid=0)


def test_a_grid_is_not_advised_for_feedback_that_learns(monkeypatch):
    monkeypatch.setattr("memdfa_lab.core.matrices.LARGE_BYTES", 0)
    rule = ml.MemDFA(COARSE["images"][0](), SGD, feedback=ml.feedback.Learned(lr=0.1))
    with pytest.warns(UserWarning, match="B has") as caught:
        rule.step(*labelled("images", 6))
    assert not any("grid" in str(one.message) for one in caught)


@rotated("net storage grid", COARSE, ["stored", "regenerated", "shared"], [None, 2], turns=6)
def test_a_large_b_is_warned_of_before_it_is_drawn(net, storage, grid, monkeypatch):
    stored = coarse(net, "dfa", "shared" if storage == "shared" else "stored", grid)
    stored.step(*labelled(net, 6))
    numbers = sum(B.numel() for B in stored.feedback.matrices.values())
    verb = "draws in every step" if storage == "regenerated" else "draws once and keeps"
    said = [f"B has {numbers:,} numbers", f"which {type(STORAGES[storage]()).__name__} {verb}", "grid=4 has"]
    for large, warned in ((4 * numbers - 1, True), (4 * numbers, False)):
        monkeypatch.setattr("memdfa_lab.core.matrices.LARGE_BYTES", large)
        rule = coarse(net, "memdfa", storage, grid)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rule.step(*labelled(net, 6))
            rule.step(*labelled(net, 6))
        texts = [str(one.message) for one in caught if "B has" in str(one.message)]
        assert len(texts) == warned
        assert all(
            part in text for text in texts for part in said[: 2 if grid or (net, storage) == ("words", "shared") else 3]
        )
