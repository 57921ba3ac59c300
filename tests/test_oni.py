"""Orthogonal weights and orthogonal B by Newton's iteration, against the equations in numpy and singular values."""

from functools import partial

import numpy as np
import pytest
import torch
from problems import OPTIMIZERS, make_rule, params, rotated, train
from reference import assert_identical, assert_same_training, refuses, surrogate_gradients
from torch import nn
from torch.nn.utils import parametrize

import memdfa_lab as ml
from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.signal import Signal
from memdfa_lab.neighbours.oni import ONI, RegeneratedOrthogonal, StoredOrthogonal, distance, inverse_root, polar

SHAPES = [(4, 9), (9, 4), (6, 2, 3, 3), (5, 5), (12, 1, 2, 2)]
LIKE = torch.zeros((), dtype=torch.float64)


def by_numpy(Z, steps, scale):
    """Return W by the equations, as they stand."""
    flat = Z.reshape(len(Z), -1)
    flat = flat - flat.mean(1, keepdims=True)
    wide = flat if len(flat) <= flat.shape[1] else flat.T
    S = wide @ wide.T + 1e-5 * np.eye(len(wide))
    f = np.sqrt((S**2).sum())
    B = np.eye(len(S))
    for _ in range(steps):
        B = 1.5 * B - 0.5 * B @ B @ B @ S / f
    W = scale * B @ wide / np.sqrt(f)
    return (W if len(flat) <= flat.shape[1] else W.T).reshape(Z.shape)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_are_those_of_the_equations(shape, steps):
    W = ONI(steps, scale=1.3)(normal(*shape))
    np.testing.assert_allclose(W, by_numpy(normal(*shape).numpy(), steps, 1.3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_singular_value_goes_its_own_way_to_one(shape):
    """Newton's iteration acts on each singular value s of Z / sqrt(f) alone: s -> 3/2 s - 1/2 s^3."""
    Z = normal(*shape).flatten(1)
    s = torch.linalg.svdvals(Z)
    expected = s / (s**4).sum() ** 0.25
    for steps in range(15):
        torch.testing.assert_close(torch.linalg.svdvals(polar(Z, steps)), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(distance(polar(Z, steps)), (expected**2 - 1).norm(), rtol=1e-9, atol=1e-9)
        expected = 1.5 * expected - 0.5 * expected**3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_its_end_is_the_orthogonal_factor_of_the_polar_decomposition(shape):
    U, _, V = np.linalg.svd(normal(*shape).flatten(1).numpy(), full_matrices=False)
    np.testing.assert_allclose(polar(normal(*shape).flatten(1)), U @ V, rtol=0, atol=1e-9)


def test_rounding_errors_do_not_grow_on_an_ill_conditioned_matrix():
    eigenvalues, (Q, _) = torch.logspace(-8, 0, 6, dtype=torch.float64), torch.linalg.qr(normal(6, 6))
    root = inverse_root(Q * eigenvalues @ Q.t(), 80)
    torch.testing.assert_close(root, Q * eigenvalues.rsqrt() @ Q.t(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_gradient_is_that_of_small_steps(shape, steps):
    assert torch.autograd.gradcheck(ONI(steps), normal(*shape).requires_grad_())


def conv_net(parametrised=True):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5))
    for layer in (net[0], net[2]) if parametrised else ():
        parametrize.register_parametrization(layer, "weight", ONI())
    return net.double()


def test_a_parametrised_layer_learns_z_through_the_iteration():
    """Z moves by the gradient of the surrogate that DFA descends, taken by plain autograd, and MEM-DFA does as DFA."""
    x, y = normal(6, 2, 5, 5), torch.tensor([0, 3, 4, 1, 2, 3])
    rules = [kind(conv_net(), partial(torch.optim.SGD, lr=0.1)) for kind in (ml.DFA, ml.MemDFA)]
    _, expected = surrogate_gradients(rules[0], x, y)
    starts = [[p.detach().clone() for p in block.parameters()] for block in rules[0].blocks]
    for _ in range(3):
        assert_identical(*(rule.step(x, y) for rule in rules))
        if starts:
            for block, start, gradients in zip(rules[0].blocks, starts, expected, strict=True):
                for p, before, gradient in zip(block.parameters(), start, gradients, strict=True):
                    torch.testing.assert_close(p, before - 0.1 * gradient, rtol=1e-9, atol=1e-12)
            starts = []
    assert_identical(*(rule.blocks.state_dict() for rule in rules))
    learned, plain = rules[0].chain[1][0].weight.detach(), conv_net(False)[2].weight.detach()
    assert distance(learned, 2**0.5) < distance(plain, 2**0.5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_projected_step_is_the_optimizers_and_then_the_equations(optimizer):
    starts = [normal(4, 9), normal(6, 2, 3, 3), normal(5, 7), normal(3)]  # the third has as many outputs as classes
    plain, ours = ([nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    made = OPTIMIZERS[optimizer](plain), ml.projected(OPTIMIZERS[optimizer], ONI(5, 1.0), 5)(ours)
    for parameters, stepper in zip((plain, ours), made, strict=True):
        for p in parameters:
            p.grad = torch.linspace(-1, 1, p.numel(), dtype=p.dtype).view(p.shape)
        stepper.step()
    for k, (one, other) in enumerate(zip(plain, ours, strict=True)):
        expected = by_numpy(one.detach().numpy(), 5, 1.0) if k < 2 else one.detach().numpy()
        np.testing.assert_allclose(other.detach(), expected, rtol=1e-9, atol=1e-12)


@rotated("problem optimizer", params(lambda problem: not problem.random), OPTIMIZERS)
def test_memdfa_with_projected_weights_is_dfa_and_is_predicted_to_the_byte(problem, optimizer):
    optimizer = ml.projected(OPTIMIZERS[optimizer], ONI(3))
    assert_same_training(*(train(make_rule(name, problem, optimizer), problem) for name in ("dfa", "memdfa")))
    rule = make_rule("memdfa", problem, optimizer, Stored(3))
    measured = ml.memory.measure(rule, problem.x, problem.y, warm_up=1)
    shape, how = tuple(problem.x.shape), {"loss_fn": problem.loss, "feedback": Stored(3)}
    predicted = ml.memory.predict("memdfa", problem.build, shape, optimizer, **how)
    assert (measured.peak_bytes, measured.resting_bytes) == (predicted.peak_bytes, predicted.resting_bytes)


def test_projection_holds_less_than_the_parametrisation():
    """Both hold matrices of n x n for one block, but the parametrisation those of all T steps."""

    def net(parametrised=False):
        model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 10))
        for layer in model[:-1:2] if parametrised else ():
            parametrize.register_parametrization(layer, "weight", ONI())
        return model

    sgd = partial(torch.optim.SGD, lr=0.1)
    cases = [(net, ml.projected(sgd, ONI(), 10)), (partial(net, True), sgd)]
    projected, parametrised = (ml.memory.predict("memdfa", n, (8, 64), o).peak_bytes for n, o in cases)
    assert projected < parametrised / 2


# B


@pytest.mark.parametrize("sizes", [(10, 37), (10, 10), (37, 10), (3, 500)], ids=str)
def test_b_is_the_orthogonal_factor_of_the_normal_matrix_that_is_drawn(sizes):
    kept = StoredOrthogonal(5, scale=2.0)
    B = kept.dense(1, *sizes, LIKE).numpy()
    G = kept._generator(("block", 1))
    G = ml.feedback.DISTRIBUTIONS["normal"][0](torch.empty(sizes[::-1]), G).double().numpy().T
    U, _, V = np.linalg.svd(G, full_matrices=False)
    np.testing.assert_allclose(B, 2 * U @ V, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(10, 4000), (10, 50), (10, 10), (37, 10)], ids=str)
def test_the_regenerated_one_is_the_stored_one_to_rounding_in_parts_and_whole(sizes, dtype):
    e = normal(20, sizes[0]).to(dtype)
    kept, drawn = (kind(7, 0.5) for kind in (StoredOrthogonal, RegeneratedOrthogonal))
    signals = [torch.cat([s for _, s in Signal(2, e, f).slices(sizes[1])], 1) for f in (kept, drawn)]
    torch.testing.assert_close(*signals, rtol=1e-5, atol=1e-5)
    for same in (drawn, drawn.reusable()):
        assert_identical(same.dense(2, *sizes, e), kept.dense(2, *sizes, e))
    assert not drawn.tensors()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fas_matrices_are_orthogonal_too(shape):
    for kind in (StoredOrthogonal, RegeneratedOrthogonal):
        assert distance(kind(1, scale=2.0).weight(3, torch.zeros(shape, dtype=torch.float64)), 2.0) < 1e-9


def test_what_a_step_with_it_holds_is_predicted_and_regenerated_is_never_whole():
    def net():
        return ml.models.mlp(16, [40_000, 16], 10)

    B = 4 * 10 * (40_000 + 16)
    found = {}
    for kind in (StoredOrthogonal, RegeneratedOrthogonal):
        rule = ml.MemDFA(net(), partial(torch.optim.SGD, lr=0.1), feedback=kind(3))
        measured = ml.memory.measure(rule, torch.randn(8, 16), torch.arange(8), warm_up=1)
        predicted = ml.memory.predict("memdfa", net, (8, 16), feedback=kind(3))
        assert (measured.peak_bytes, measured.resting_bytes) == (predicted.peak_bytes, predicted.resting_bytes)
        found[kind] = measured
    stored, regenerated = found.values()
    assert stored.resting_bytes == regenerated.resting_bytes + B
    assert regenerated.peak_bytes < stored.peak_bytes + B


@pytest.mark.parametrize("kind", [StoredOrthogonal, RegeneratedOrthogonal])
def test_its_repr_makes_it_again(kind):
    feedback = kind(3, 0.5, "dense", 2)
    again = eval(repr(feedback), {kind.__name__: kind})
    assert again.settings() == feedback.settings()


def test_bad_input_is_refused_in_one_line():
    with refuses(ValueError, "steps must be"):
        ONI(-1)
    with refuses(ValueError, "scale must be"):
        ONI(scale=0)
    with refuses(ValueError, "(3,)", "leave biases out"):
        ONI()(torch.ones(3))
    with refuses(ValueError, "(3,)", "leave biases out"):
        distance(torch.ones(3))
    with refuses(TypeError, "project must be a function"):
        ml.projected(torch.optim.SGD, 3)
    with refuses(ValueError, "seed must be"):
        RegeneratedOrthogonal(-1)
