"""Products in block floating point, against numpy: the rounding of each number, and a layer's three products."""

from functools import partial

import numpy as np
import pytest
import torch
from reference import assert_identical, refuses
from test_pass1 import by_numpy
from torch import nn
from torch.nn.utils import parametrize

import memdfa_lab as ml
from memdfa_lab.neighbours import hbfp, oni
from memdfa_lab.neighbours.hbfp import InBlockFloat, Tiles, in_block_float

SGD = partial(torch.optim.SGD, lr=0.1)
ROUNDINGS = ("nearest", "stochastic")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, shape[-1])


def tiles_by_numpy(W, bits, tile):
    out = np.zeros_like(W).reshape(len(W), -1)
    flat = W.reshape(len(W), -1)
    for r in range(0, len(flat), tile):
        for c in range(0, flat.shape[1], tile):
            part = flat[r : r + tile, c : c + tile]
            out[r : r + tile, c : c + tile] = by_numpy(part.reshape(1, -1), bits).reshape(part.shape)
    return out.reshape(W.shape)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(50, 31), (24, 24), (3, 100), (7, 5, 3, 3)], ids=str)
def test_a_tile_of_weights_shares_an_exponent(shape, bits):
    W = draw(*shape)
    np.testing.assert_array_equal(Tiles(ml.precision.BlockFloat(bits))(W), tiles_by_numpy(W.numpy(), bits, 24))
    np.testing.assert_array_equal(Tiles(ml.precision.BlockFloat(bits), 5)(W), tiles_by_numpy(W.numpy(), bits, 5))


def test_stochastic_rounding_takes_one_of_the_two_neighbours_each_as_often_as_it_is_near():
    """Value by value: floor(t / step + u) step, with the u that torch's generator gives."""
    t, numbers = draw(4, 30), ml.precision.BlockFloat(5, "stochastic")
    torch.manual_seed(3)
    drawn = numbers.rounded(t).numpy()
    torch.manual_seed(3)
    u = torch.rand(4, 30).numpy()
    for row, values, noise in zip(t.numpy(), drawn, u, strict=True):
        step = 2.0 ** (np.floor(np.log2(np.abs(row).max())) + 1 - 4)
        np.testing.assert_array_equal(values, np.clip(np.floor(row / step + noise), -15, 15) * step)


@pytest.mark.parametrize("bits", [3, 8])
def test_the_three_products_of_a_layer_are_of_rounded_numbers(bits):
    layer = nn.Linear(30, 40)
    wrapped = InBlockFloat(layer, ml.precision.BlockFloat(bits))
    h, s = draw(6, 30).requires_grad_(), draw(6, 40)
    out = wrapped(h)
    out.backward(s)
    H, S = (by_numpy(t.detach().numpy(), bits) for t in (h, s))
    W, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    W = tiles_by_numpy(W, bits, 24)
    pairs = [(out.detach(), H @ W.T + b), (h.grad, S @ W), (layer.weight.grad, S.T @ H), (layer.bias.grad, S.sum(0))]
    for ours, expected in pairs:
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 4, 3), nn.Conv1d(2, 4, 3, 2), nn.ConvTranspose2d(2, 3, 2)], ids=repr)
def test_with_many_bits_any_layer_is_itself_and_few_bits_differ(layer):
    h = torch.randn(3, 2, *[9] * (layer.weight.dim() - 2), requires_grad=True)
    found = []
    for bits in (24, 4, None):
        part = layer if bits is None else InBlockFloat(layer, ml.precision.BlockFloat(bits))
        out = part(h)
        found.append([out, *torch.autograd.grad(out.square().sum(), [h, layer.weight])])
    for fine, coarse, exact in zip(*found, strict=True):
        torch.testing.assert_close(fine, exact, rtol=1e-3, atol=1e-3)
        assert 1e-3 < (coarse - exact).norm() / exact.norm() < 0.5


def conv_net():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(first, nn.Linear(4 * 9, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_memdfa_is_dfa_bit_for_bit_weights_stay_in_sixteen_bits_and_bytes_are_predicted(rounding):
    numbers, kept = ml.precision.BlockFloat(6, rounding), Tiles(ml.precision.BlockFloat(16))
    x, y = torch.randn(6, 1, 5, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    rules = [rule(in_block_float(conv_net(), numbers), ml.projected(SGD, kept)) for rule in (ml.DFA, ml.MemDFA)]
    for rule in rules:
        torch.manual_seed(5)
        for _ in range(3):
            rule.step(x, y)
    assert_identical(*(rule.blocks.state_dict() for rule in rules))
    for weight in (p.detach() for p in rules[0].blocks.parameters() if p.dim() > 1):
        np.testing.assert_array_equal(weight, tiles_by_numpy(weight.numpy(), 16, 24))
    measured = ml.memory.measure(rules[1], x, y, warm_up=1)
    build = partial(in_block_float, conv_net(), numbers)
    predicted = ml.memory.predict("memdfa", build, tuple(x.shape), ml.projected(SGD, kept))
    assert (measured.peak_bytes, measured.resting_bytes) == (predicted.peak_bytes, predicted.resting_bytes)


class Residual(nn.Sequential):
    """A chain with a forward method of its own."""

    def forward(self, h):
        return h + super().forward(h)


def residual_net():
    torch.manual_seed(0)
    shared = nn.Linear(5, 5)
    return nn.Sequential(Residual(nn.Linear(5, 5), nn.ReLU(), shared), nn.BatchNorm1d(5), Residual(shared, shared))


@pytest.mark.parametrize(
    ("build", "shape", "count"),
    [(residual_net, (6, 5), 4), (partial(ml.models.build, "resnet_18"), (2, 3, 32, 32), 21)],
    ids=["residual", "resnet_18"],
)
def test_layers_at_any_depth_are_wrapped_and_everything_else_stays(build, shape, count):
    model, x = build(), draw(*shape)
    fine, coarse = (in_block_float(model, ml.precision.BlockFloat(bits)) for bits in (24, 4))
    for wrapped in (fine, in_block_float(fine, ml.precision.BlockFloat(4))):  # a wrapped layer stays as it is
        parts = [part for _, part in wrapped.named_modules(remove_duplicate=False)]
        assert sum(isinstance(part, InBlockFloat) for part in parts) == count
        kinds = (nn.Linear, nn.Conv2d)
        assert sum(isinstance(part, kinds) for part in parts) == count  # each within one that is wrapped
    assert not any(isinstance(part, InBlockFloat) for part in model.modules())
    for one, other in ((model.parameters(), fine.parameters()), (model.buffers(), fine.buffers())):
        assert [t.data_ptr() for t in one] == [t.data_ptr() for t in other]
    exact, near, far = (net.eval()(x).detach() for net in (model, fine, coarse))
    torch.testing.assert_close(near, exact, rtol=1e-3, atol=1e-3 * exact.abs().max().item())
    assert (far - exact).norm() > 1e-2 * exact.norm()


def test_noise_of_errors_follows_the_generator_of_their_device(monkeypatch):
    """On a GPU numbers are drawn by its generator, and that of the CPU stays as it is."""
    here = torch.Generator()
    states = {"cpu": (torch.get_rng_state, None), "cuda": (here.get_state, None)}
    monkeypatch.setattr(hbfp, "of_torch", lambda device: states)

    def rounded_errors():
        t = torch.zeros(40, 30, requires_grad=True)
        hbfp._Errors.apply(t, ml.precision.BlockFloat(4, "stochastic")).backward(draw(40, 30))
        return t.grad

    one, same = rounded_errors(), rounded_errors()
    torch.rand(1, generator=here)
    assert_identical(one, same)
    assert not torch.equal(one, rounded_errors())


def test_bad_input_is_refused_in_one_line():
    numbers = ml.precision.BlockFloat(8)
    with refuses(TypeError, "numbers must be a BlockFloat"):
        Tiles(8)
    with refuses(ValueError, "tile must be"):
        Tiles(numbers, 0)
    with refuses(TypeError, "layer must be"):
        InBlockFloat(nn.ReLU(), numbers)
    with refuses(TypeError, "model must be"):
        in_block_float(nn.Linear(2, 2), numbers)
    with refuses(ValueError, "0.1 is an nn.MultiheadAttention", "nn.Linear"):
        in_block_float(nn.Sequential(nn.Sequential(nn.ReLU(), nn.MultiheadAttention(4, 2))), numbers)
    with refuses(ValueError, "(3,)", "leave biases out"):
        Tiles(numbers)(torch.ones(3))
    by_oni = parametrize.register_parametrization(nn.Linear(4, 4), "weight", oni.ONI())
    with refuses(ValueError, "a parametrisation computes", "ml.projected"):
        InBlockFloat(by_oni, numbers)
    with refuses(ValueError, "FA"):
        ml.FA(in_block_float(conv_net(), numbers), SGD).step(torch.randn(6, 1, 5, 5), torch.arange(6) % 3)
