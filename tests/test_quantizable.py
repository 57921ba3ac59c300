"""Networks of many bit modes, against the formulas in numpy, and modes learned in turn against plain autograd."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_identical, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml
from memdfa_lab.neighbours import quantizable
from memdfa_lab.neighbours.quantizable import FULL, ConsistentLoss, learn, network, rounded, use, weights

SGD = partial(torch.optim.SGD, lr=0.1)
SIZES = (6, 12, 8, 3)
X = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(10) % 3


def by_numpy(w, bits):
    t = np.tanh(w)
    u = t / (2 * np.abs(t).max()) + 0.5
    u = u if bits == FULL else np.round(u * (2**bits - 1)) / (2**bits - 1)
    return np.abs(w).mean() * (2 * u - 1)


@pytest.mark.parametrize("bits", [2, 3, 8, FULL])
def test_weights_and_activations_are_those_of_the_formulas(bits):
    w = torch.randn(20, 30, dtype=torch.float64)
    np.testing.assert_allclose(weights(w, bits), by_numpy(w.numpy(), bits), rtol=1e-12, atol=1e-12)
    assert bits == FULL or len(weights(w, bits).unique()) <= 2**bits
    u = torch.rand(50, dtype=torch.float64)
    levels = 2**bits - 1
    np.testing.assert_allclose(rounded(u, bits), np.round(u.numpy() * levels) / levels, atol=0 if bits < 9 else 1e-9)


@pytest.mark.parametrize("bits", [2, 5, FULL])
def test_the_gradient_passes_the_rounding_as_it_is(bits):
    """d w_k / d w with the rounding left out of the slopes but not of the values, by hand."""
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 5, dtype=torch.float64)
    weights(w, bits).backward(g)
    v, d = w.detach().numpy(), g.numpy()
    t, mean = np.tanh(v), np.abs(v).mean()
    top = np.unravel_index(np.abs(t).argmax(), t.shape)
    slope = mean * d * (1 - t**2) / np.abs(t[top])  # of w_k by w, through tanh
    slope[top] -= (mean * d * t).sum() / t[top] ** 2 * np.sign(t[top]) * (1 - t[top] ** 2)  # through the largest
    slope += (d * by_numpy(v, bits)).sum() / mean * np.sign(v) / v.size  # through E|w|
    np.testing.assert_allclose(w.grad, slope, rtol=1e-9, atol=1e-12)


def test_each_mode_has_its_batchnorm_and_runs_by_the_formulas():
    model = network(SIZES, (2, FULL)).eval()
    first = model[0]
    for scale, bits in enumerate((2, FULL), 1):
        norm = first.norms[str(bits)]
        nn.init.constant_(norm.weight, scale)
        use(model, bits)
        a = X.numpy() @ by_numpy(first.weight.detach().numpy(), bits).T * scale / np.sqrt(1 + norm.eps)
        a = np.clip(a, 0, 1)
        expected = a if bits == FULL else np.round(a * 3) / 3
        np.testing.assert_allclose(first(X).detach(), expected, atol=1e-5)


def trained(kind, modes, steps=3):
    rule = kind(network(SIZES, (2, 4, FULL)), SGD, ConsistentLoss(0.5))
    return rule, [learn(rule, X, Y, modes) for _ in range(steps)]


def test_modes_in_turn_are_steps_of_autograd_one_after_another():
    rule, losses = trained(ml.BP, (FULL, 4, 2))
    model = network(SIZES, (2, 4, FULL))
    optimizer = SGD(model.parameters())
    for found in losses:
        use(model, FULL)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        full = model(X).softmax(1).detach()
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        for bits, loss_found in zip((FULL, 4, 2), found, strict=True):
            use(model, bits)
            logits = model(X)
            loss = F.cross_entropy(logits, Y)
            if bits != FULL:
                log_p = logits.log_softmax(1)
                loss = loss + 0.5 * (full * (full.log() - log_p)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(loss_found, loss.detach())
    for ours, expected in zip(rule.blocks.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("modes", [(2,), (4, 2)], ids=str)
def test_without_32_bits_no_mode_learns_from_that_prediction(modes):
    """A network of one mode is the baseline of a network of many: its steps are those of the cross-entropy alone."""
    rule, losses = trained(ml.BP, modes)
    plain = ml.BP(network(SIZES, (2, 4, FULL)), SGD)
    for found in losses:
        for bits, loss in zip(modes, found, strict=True):
            use(plain.blocks, bits)
            assert_identical(loss, plain.step(X, Y))
    assert_identical(rule.blocks.state_dict(), plain.blocks.state_dict())


def test_weights_that_are_all_zero_stay_so():
    for bits, dtype in product((2, 8, FULL), (torch.float32, torch.float64)):
        w = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
        out = weights(w, bits)
        assert_identical(out.detach(), torch.zeros(3, 4, dtype=dtype))
        out.sum().backward()
        assert torch.isfinite(w.grad).all()


def test_it_learns_with_weights_on_a_disk(tmp_path):
    _, losses = trained(ml.MemDFA, (FULL, 4, 2))
    with ml.offload.Disk(tmp_path) as disk:
        rule = ml.MemDFA(network(SIZES, (2, 4, FULL)), SGD, ConsistentLoss(0.5), offload=disk)
        for expected in losses:
            assert_identical(learn(rule, X, Y, (FULL, 4, 2)), expected)


def test_memdfa_is_dfa_and_more_modes_hold_no_more():
    assert_identical(*(trained(kind, (FULL, 4, 2))[0].blocks.state_dict() for kind in (ml.DFA, ml.MemDFA)))
    peaks = {}
    for name, depth, modes in product(("bp", "memdfa"), (4, 16), ((8, FULL), (2, 4, 8, FULL))):
        rule = ml.RULES[name](network((32, *[32] * depth, 3), modes), SGD, ConsistentLoss())
        batch = torch.randn(64, 32), torch.arange(64) % 3
        learn(rule, *batch, modes)
        with ml.memory.Ledger(rule.tensors) as ledger:
            learn(rule, *batch, modes)
        peaks[name, depth, len(modes)] = ledger.trace().peak_bytes
    for name in ("bp", "memdfa"):
        assert peaks[name, 4, 2] + 2 * 4 == peaks[name, 4, 4]  # the losses of two more modes
    assert peaks["memdfa", 4, 4] == peaks["memdfa", 16, 4] < peaks["bp", 4, 4] < peaks["bp", 16, 4] / 3


def test_bad_input_is_refused_in_one_line():
    for sizes in ((3,), (4, 2), 5):  # without a hidden layer there is nothing to round
        with refuses(ValueError, "sizes are", repr(sizes)):
            network(sizes)
    with refuses(ValueError, "a size must be", "0"):
        network((3, 0, 2))
    for modes in ((2, 4), (1, FULL), (24, FULL), 32, (2.0, FULL), "2", (None, FULL)):
        for build in (partial(network, SIZES), partial(quantizable.QuantizableLayer, 3, 2)):
            with refuses(ValueError, "modes are", repr(modes)):
                build(modes)
    with refuses(ValueError, "no mode of 3 bits", "2, 32"):
        use(network(SIZES, (2, FULL)), 3)
    for bits in ("2", 2.0, None):
        with refuses(ValueError, "bits must be a whole number from 2 to 32", repr(bits)):
            use(network(SIZES, (2, FULL)), bits)
    rule = ml.BP(network(SIZES, (2, FULL)), SGD, ConsistentLoss())
    for modes, hint in ((FULL, "modes are"), ((FULL, 2, 4), "no mode of 4 bits"), ((2, "4"), "modes are")):
        with refuses_and_keeps(rule, ValueError, hint):
            learn(rule, X, Y, modes)
    with refuses(ValueError, "FA"):
        learn(ml.FA(network(SIZES, (2, FULL)), SGD, ConsistentLoss()), X, Y, (FULL, 2))
    with refuses(ValueError, "there are: none"):
        use(nn.Linear(2, 2), 3)
    with refuses(ValueError, "weight must be"):
        ConsistentLoss(-1)
    assert quantizable.MODES[-1] == FULL
