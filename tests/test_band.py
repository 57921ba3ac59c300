"""Band matrices: spectra against the semicircle and its moments, B_i against its definition, what a mean does."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from reference import assert_identical, refuses

import memdfa_lab as ml
from memdfa_lab.core.signal import Signal
from memdfa_lab.neighbours.band import Banded, mixture, semicircle, symmetric

SGD = partial(torch.optim.SGD, lr=0.05)
LIKE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(("n", "width"), [(9, 3), (10, 5), (7, 7), (4, 1)])
def test_the_band_is_periodic_and_symmetric_and_holds_draws_scaled_by_its_width(n, width):
    X, _, _ = symmetric(n, width, seed=2)
    assert_identical(X, X.t().contiguous())
    for i, j in np.ndindex(n, n):
        apart = min((i - j) % n, (j - i) % n)
        assert (X[i, j] != 0) == (apart <= (width - 1) / 2), (i, j)
    assert (X != 0).sum(1).tolist() == [width] * n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_the_spectrum_is_a_semicircle_of_random_radius(mean, seed):
    """Its moments are radius^2 / 4 and radius^4 / 8; a mean moves the largest eigenvalues alone."""
    X, m, s = symmetric(1000, 61, mean, spread=0.5, seed=seed)
    values = torch.linalg.eigvalsh(X)
    bulk = values[values.abs() < 2.2 * s]
    assert len(bulk) >= (1000 if mean == 0 else 900)
    assert bulk.square().mean().item() == pytest.approx(s**2, rel=0.1)
    assert bulk.pow(4).mean().item() == pytest.approx(2 * s**4, rel=0.2)
    edges = torch.linspace(-2 * s, 2 * s, 9, dtype=torch.float64)
    shares = torch.histogram(bulk, edges)[0] / len(bulk)
    fine = torch.linspace(-2 * s, 2 * s, 8001, dtype=torch.float64)
    density = semicircle((fine[:-1] + fine[1:]) / 2, 2 * s) * 4 * s / 8000
    np.testing.assert_allclose(shares, density.view(8, 1000).sum(1), atol=0.02)
    top = abs(m) * math.sqrt(61)  # alone it would be an eigenvalue; noise pushes it outwards
    expected = 2 * s if top < s else top + s**2 / top
    assert torch.linalg.matrix_norm(X, 2).item() == pytest.approx(expected, rel=0.1)
    assert mean or m == 0


def test_tau_differs_from_matrix_to_matrix_with_the_distribution_that_is_asked_for():
    draws = torch.tensor([mixture(torch.Generator().manual_seed(k), 2.0, 0.5) for k in range(2000)])
    m, log_s = draws[:, 0], draws[:, 1].log()
    for values, sd in ((m, 2.0), (log_s, 0.5)):
        assert abs(values.mean()) < 0.1 * sd
        assert values.std().item() == pytest.approx(sd, rel=0.1)
    assert abs(torch.corrcoef(torch.stack([m, log_s]))[0, 1]) < 0.1


# B


@pytest.mark.parametrize("width", [1, 3, 10, 50])
@pytest.mark.parametrize("outputs", [7, 10, 64])
def test_each_output_hears_of_neighbouring_classes_and_of_no_others(outputs, width):
    B = Banded(width, seed=4).dense(2, 10, outputs, LIKE)
    w = min(width, 10)
    for j in range(outputs):
        there = {(j * 10 // outputs + k) % 10 for k in range(w)}
        assert set(B[:, j].nonzero().flatten().tolist()) == there
    heard = (B != 0).sum(1)
    assert heard.max() - heard.min() <= w


@pytest.mark.parametrize("distribution", ["he_normal", "normal", "uniform"])
def test_entries_have_the_scale_of_a_matrix_of_so_many_classes(distribution):
    B = Banded(8, 1, distribution).dense(0, 100, 5000, LIKE)
    full = ml.feedback.Stored(1, distribution).dense(0, 8, 5000, LIKE)
    assert B[B != 0].std().item() == pytest.approx(full.std().item(), rel=0.02)
    m, s = mixture(Banded(8, 1)._generator(("block", 0)), 3.0, 0.7)
    other = Banded(8, 1, distribution, mean=3.0, spread=0.7).dense(0, 100, 5000, LIKE)
    factor = Banded(8, 1, distribution)._factor(8, 5000)
    torch.testing.assert_close(other[B != 0], B[B != 0] * s + m * factor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [3, 10])
def test_columns_are_the_dense_matrix_in_parts_and_what_is_kept_has_no_zeros(width):
    feedback, e = Banded(width, 3), torch.randn(6, 10)
    whole = e @ feedback.dense(1, 10, 5000, e)
    parts = torch.cat([s for _, s in Signal(1, e, feedback).slices(5000)], 1)
    torch.testing.assert_close(parts, whole)
    (kept,) = feedback.tensors()
    assert kept.shape == (5000, width)
    assert (kept != 0).all()


def error(N=30, C=10):
    logits = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    (e,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.arange(N) % C), logits)
    return e


def test_the_mean_of_a_full_b_is_invisible_under_softmax_cross_entropy_and_that_of_a_band_is_not():
    e = error()
    torch.testing.assert_close(e.sum(1), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-15)
    for width, visible in ((10, False), (3, True)):
        plain, moved = (e @ Banded(width, 5, mean=mean).dense(0, 10, 40, e) for mean in (0.0, 20.0))
        near = torch.allclose(plain, moved, rtol=0, atol=1e-5 * plain.abs().max().item())
        assert near != visible
    squared = torch.randn(30, 10, dtype=torch.float64)  # errors of another loss
    plain, moved = (squared @ Banded(10, 5, mean=mean).dense(0, 10, 40, squared) for mean in (0.0, 20.0))
    assert not torch.allclose(plain, moved, atol=1e-3)


def test_memdfa_is_dfa_bit_for_bit_and_bytes_are_predicted_and_fewer():
    def net():
        return ml.models.mlp(12, [64, 48], 100)

    x, y = torch.randn(20, 12), torch.arange(20)
    feedback = partial(Banded, 9, 3, mean=1.0, spread=0.5)
    rules = [kind(net(), SGD, feedback=feedback()) for kind in (ml.DFA, ml.MemDFA)]
    for _ in range(3):
        assert_identical(*(rule.step(x, y) for rule in rules))
    assert_identical(*(rule.blocks.state_dict() for rule in rules))
    measured = ml.memory.measure(rules[1], x, y, warm_up=1)
    predicted = ml.memory.predict("memdfa", net, (20, 12), feedback=feedback())
    assert (measured.peak_bytes, measured.resting_bytes) == (predicted.peak_bytes, predicted.resting_bytes)
    full = ml.memory.predict("memdfa", net, (20, 12), feedback=ml.feedback.Stored())
    assert full.resting_bytes - measured.resting_bytes == 4 * (100 - 9) * (64 + 48)

    other = ml.MemDFA(net(), SGD, feedback=Banded(2))
    other.load_state_dict(rules[1].state_dict())
    assert other.feedback.settings() == rules[1].feedback.settings()
    assert_identical(other.feedback.matrices, rules[1].feedback.matrices)


def test_it_rests_on_a_disk_with_the_network(tmp_path):
    x, y = torch.randn(20, 12), torch.arange(20) % 10
    plain = ml.MemDFA(ml.models.mlp(12, [16, 16], 10), SGD, feedback=Banded(3))
    with ml.offload.Disk(tmp_path) as disk:
        rule = ml.MemDFA(ml.models.mlp(12, [16, 16], 10), SGD, feedback=Banded(3), offload=disk)
        for _ in range(3):
            assert_identical(rule.step(x, y), plain.step(x, y))


def test_bad_input_is_refused_in_one_line():
    for arguments, hint in (((0, 1), "n must be"), ((4, 5), "width must be"), ((8, 4), "width must be odd")):
        with refuses(ValueError, hint):
            symmetric(*arguments)
    with refuses(ValueError, "mean must be"):
        symmetric(4, 3, -1)
    with refuses(ValueError, "radius must be"):
        semicircle(LIKE, 0)
    with refuses(ValueError, "width must be"):
        Banded(0)
    with refuses(ValueError, "spread must be"):
        Banded(3, spread=-1)
    with refuses(ValueError, "take he_normal, normal or uniform"):
        Banded(3, distribution="orthogonal")
    rule = ml.FA(ml.models.mlp(4, [5], 3), SGD, feedback=Banded(2))
    with refuses(ValueError, "give FA Stored or Regenerated"):
        rule.step(torch.randn(3, 4), torch.arange(3))
