"""What notebook 03 says of linear networks under DFA: what small steps conserve, which layer comes nearest to BP."""

from itertools import pairwise

import pytest
import torch

N, N_0, WIDTH, C = 100, 30, 50, 10
DOUBLE = torch.float64


def problem():
    """Return inputs (N, N_0) and the outputs (N, C) of another linear network."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, N_0, generator=generator, dtype=DOUBLE)
    return x, x @ torch.randn(N_0, C, generator=generator, dtype=DOUBLE) / N_0**0.5


def network(hidden, start, seed, orthogonal=False):
    """Return weights (outputs, inputs) with entries of size `start`, and a B (C, WIDTH) for each hidden layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [N_0, *[WIDTH] * hidden, C]
    Bs = [torch.randn(C, WIDTH, generator=generator, dtype=DOUBLE) / C**0.5 for _ in range(hidden)]
    if orthogonal:
        Bs = [torch.linalg.svd(B, full_matrices=False)[2] for B in Bs]
    Ws = [start * torch.randn(n, m, generator=generator, dtype=DOUBLE) for m, n in pairwise(sizes)]
    return Ws, Bs


def outputs(Ws, x):
    h = [x]
    for W in Ws:
        h.append(h[-1] @ W.T)
    return h


def cosine(u, v):
    """Return the cosine of the angle between two matrices, however small they are."""
    return ((u / u.norm()) * (v / v.norm())).sum()


def train(Ws, Bs, lr, steps):
    """Take steps of DFA on the mean over examples of half the squared error: the flow in the limit of small steps."""
    x, y = problem()
    for _ in range(steps):
        h = outputs(Ws, x)
        e = (h[-1] - y) / N
        for W, B, below in zip(Ws, [*Bs, torch.eye(C, dtype=DOUBLE)], h, strict=False):
            W -= lr * (e @ B).T @ below


def signal_angles(Ws, Bs):
    """Return the angle between e B_i and BP's signal e W_L ... W_(i+1), in degrees, one a hidden layer."""
    x, y = problem()
    exact, found = outputs(Ws, x)[-1] - y, []
    e = exact
    for W, B in zip(reversed(Ws[1:]), reversed(Bs), strict=True):
        exact = exact @ W
        found.insert(0, torch.rad2deg(torch.arccos(cosine(e @ B, exact))).item())
    return found


def conserved(Ws, Bs):
    """Return W W^T - B^T V - V^T B, with V the output layer, W the layer below it and B that layer's feedback."""
    W, V, B = Ws[-2], Ws[-1], Bs[-1]
    return W @ W.T - B.T @ V - V.T @ B


@pytest.mark.parametrize("hidden", [1, 2, 3])
@pytest.mark.parametrize("start", [0.0001, 0.1])
def test_a_matrix_is_conserved_up_to_an_error_in_proportion_to_the_step(hidden, start):
    drifts = []
    for lr in (0.002, 0.001, 0.0005):
        Ws, Bs = network(hidden, start, seed=1)
        before, first = conserved(Ws, Bs), Ws[-2].clone()
        train(Ws, Bs, lr, steps=round(1 / lr))
        drifts.append((conserved(Ws, Bs) - before).norm().item())
        moved = (Ws[-2] @ Ws[-2].T - first @ first.T).norm().item()
    assert drifts[-1] < 0.02 * moved
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.15)
    assert drifts[1] / drifts[2] == pytest.approx(2, rel=0.1)


def test_the_balance_of_the_notebook_is_the_trace_of_the_matrix():
    (W_1, W_2), (B,) = network(1, 0.1, seed=1)
    balance = W_1.square().sum() - 2 * (W_2 * B).sum()
    torch.testing.assert_close(conserved([W_1, W_2], [B]).trace(), balance)


def test_from_zero_the_output_layer_is_a_semidefinite_matrix_times_B_and_no_angle_is_above_90():
    """W_1 = B^T A, W_2 = S B, S + S^T = A A^T, in the limit of small steps."""
    Ws, Bs = network(1, 0.0, seed=1, orthogonal=True)
    B = Bs[0]
    for _ in range(10):
        train(Ws, Bs, 0.002, steps=100)
        A, S = B @ Ws[0], Ws[1] @ B.T  # B B^T = I
        torch.testing.assert_close(B.T @ A, Ws[0])
        torch.testing.assert_close(S @ B, Ws[1])
        assert (S + S.T - A @ A.T).norm() < 0.02 * (A @ A.T).norm()
        assert signal_angles(Ws, Bs)[0] < 90


@pytest.mark.parametrize(("start", "nearest", "farthest"), [(0.0001, 2, None), (0.1, 0, 2)])
def test_which_hidden_layer_is_nearest_to_BP_depends_on_the_size_of_the_start(start, nearest, farthest):
    """From nearly zero the top one, as the leading order in time has it; from larger weights the lowest."""
    runs = []
    for seed in range(5):
        Ws, Bs = network(3, start, seed)
        train(Ws, Bs, 0.005, steps=500)
        runs.append(signal_angles(Ws, Bs))
    mean = torch.tensor(runs).mean(0)
    assert mean.argmin() == nearest
    assert farthest is None or mean.argmax() == farthest


def test_from_nearly_zero_the_early_weights_are_the_powers_that_the_argument_gives():
    """W_1 ~ B_1^T M, W_2 ~ B_2^T M M^T B_1, W_3 ~ B_3^T (M M^T)^2 B_2, W_4 ~ (M M^T)^4 B_3 for B B^T ~ I."""
    Ws, Bs = network(3, 0.0, seed=1, orthogonal=True)
    x, y = problem()
    M = y.T @ x / N  # at the start, where the output is zero
    train(Ws, Bs, 0.0001, steps=100)
    P = M @ M.T
    B_1, B_2, B_3 = Bs
    powers = [B_1.T @ M, B_2.T @ P @ B_1, B_3.T @ P @ P @ B_2, P @ P @ P @ P @ B_3]
    for W, power in zip(Ws, powers, strict=True):
        assert cosine(W, power) > 0.99
