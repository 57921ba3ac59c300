"""Orthogonal weights, and an orthogonal B, by Newton's iteration (ONI, Huang et al. 2020, arXiv 2004.00917).

A weight W is a function of free parameters Z, (out, in). Z_c is Z minus the mean of each row, and

    S = Z_c Z_c^T + 1e-5 I,    f = |S|,    B_0 = I,    B_{t+1} = 3/2 B_t - 1/2 B_t^3 S / f,    W = B_T Z_c / sqrt(f).

B_t tends to the inverse square root of S / f, and the singular values of W tend to 1; the number of steps T sets how
close they come. With more rows than columns S is Z_c^T Z_c, and the columns of W become orthogonal.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int, check_number
from memdfa_lab.core.feedback import Regenerated, Stored
from memdfa_lab.core.matrices import POSITIONS, Feedback
from memdfa_lab.core.phases import label

MANY = 40  # steps after which the iteration has converged, whatever the matrix


def inverse_root(S: Tensor, steps: int = MANY) -> Tensor:
    """Return B_T / sqrt(f) of a symmetric matrix S, which tends to the inverse square root of S.

    It is computed by Y_0 = S / f, M = 3/2 I - 1/2 B_t Y_t, Y_{t+1} = Y_t M, B_{t+1} = M B_t. This gives the same B_t in
    exact arithmetic, and its rounding errors do not grow from step to step.
    """
    f = S.norm()
    Y, one = S / f, torch.eye(len(S), dtype=S.dtype, device=S.device)
    del S
    B = one
    for _ in range(steps):
        M = torch.addmm(one, B, Y, beta=1.5, alpha=-0.5)
        Y, B = Y @ M, M @ B
        del M
    return B / f.sqrt()


def polar(Z: Tensor, steps: int = MANY, least: float = 0.0) -> Tensor:
    """Return Z (rows, columns) with singular values near 1; `least` is added to the diagonal of S."""
    wide = Z if len(Z) <= Z.shape[1] else Z.t()
    least_of_all = least * torch.eye(len(wide), dtype=Z.dtype, device=Z.device)
    W = inverse_root(torch.addmm(least_of_all, wide, wide.t()), steps) @ wide
    return W if len(Z) <= Z.shape[1] else W.t()


def distance(W: Tensor, scale: float = 1.0) -> Tensor:
    """Return |W W^T / scale^2 - I| of a weight (out, ...), which is 0 if its rows are orthogonal.

    With fewer columns than rows W^T W takes the place of W W^T. The norm is Frobenius's: for n rows it is sqrt(n) if W
    is nearly 0. Raises ValueError for a vector.
    """
    if W.dim() < 2:
        raise ValueError(f"distance takes a weight (out, in, ...), got one of shape {tuple(W.shape)}: leave biases out")
    flat = W.flatten(1) / scale
    wide = flat if len(flat) <= flat.shape[1] else flat.t()
    return (wide @ wide.t() - torch.eye(len(wide), dtype=W.dtype, device=W.device)).norm()


class ONI(nn.Module):
    """Map Z (out, ...) to a weight of its shape with singular values near `scale`, by `steps` of Newton's iteration.

    As a parametrisation, the layer learns Z, with gradients through the iteration:
    `torch.nn.utils.parametrize.register_parametrization(layer, "weight", ONI())`. As a projection, the layer learns the
    weight itself, which is mapped after each step of its optimizer: `ml.projected(torch.optim.SGD, ONI())`. A
    projection keeps no graph, and does not change the blocks.

    `steps`: the source uses 5 for convolutions, 4 for linear layers. `scale`: the source uses sqrt(2) before a ReLU,
    and 1 for linear layers. Raises ValueError for steps below 0 and a scale that is not a positive number.
    """

    def __init__(self, steps: int = 5, scale: float = math.sqrt(2)):
        super().__init__()
        check_number("scale", scale, or_more=False)
        self.steps, self.scale = check_int("steps", steps, 0), float(scale)

    def forward(self, Z: Tensor) -> Tensor:
        """Return the weight. Raises ValueError for a vector."""
        if Z.dim() < 2:
            raise ValueError(f"ONI takes a weight (out, in, ...), got one of shape {tuple(Z.shape)}: leave biases out")
        flat = Z.flatten(1)
        return self.scale * polar(flat - flat.mean(1, keepdim=True), self.steps, 1e-5).reshape(Z.shape)

    def extra_repr(self) -> str:
        """Return the settings."""
        return f"steps={self.steps}, scale={self.scale:g}"


class _Orthogonal(Feedback):
    """B_i = scale (G G^T)^(-1/2) G, where G (C, n_i) has independent normal entries; with C > n_i, the same of G^T."""

    def __init__(self, seed: int = 0, scale: float = 1.0, positions: str = POSITIONS[0], grid: int | None = None):
        super().__init__(seed, "normal", scale, positions, grid)

    def __repr__(self) -> str:
        return super().__repr__().replace("distribution='normal', ", "")  # it is no argument

    def _factor(self, fan_in: int, fan_out: int) -> float:
        return self.scale

    def _draw(self, generator: torch.Generator, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        G = super()._draw(generator, shape, 1.0, like.new_empty(0, dtype=torch.float64))
        return label("feedback", polar(G.flatten(1)).mul_(factor).reshape(shape).to(like.dtype))


class StoredOrthogonal(_Orthogonal, Stored):
    """Stored orthogonal matrices, C n_i numbers each, distributed as "orthogonal", by Newton's iteration.

    The arguments, and the errors raised, are those of `ml.feedback.Stored`; there is no `distribution`.
    """


class RegeneratedOrthogonal(_Orthogonal, Regenerated):
    """The matrices of `StoredOrthogonal`, up to rounding; one with more columns than rows is never in memory whole.

    G is drawn twice, some columns at a time: once to sum up G G^T, C x C, and once to be multiplied by the inverse
    square root of that sum. Nothing is kept between steps.
    """

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part], shape (error_size, outputs of the part), for parts that follow one another."""
        if output_size < error_size:
            yield from Feedback.columns(self, i, parts, error_size, output_size, like)
            return
        S = like.new_zeros(error_size, error_size, dtype=torch.float64)
        for G in self._parts_of_G(i, parts, error_size, S):
            S.addmm_(G, G.t())
            del G
        root = inverse_root(S).mul_(self.scale).to(like.dtype)
        del S
        for G in self._parts_of_G(i, parts, error_size, root):
            yield label("feedback", root @ G)
            del G

    def reusable(self) -> Feedback:
        """Return `StoredOrthogonal` feedback of the same matrices, to rounding."""
        return StoredOrthogonal(self.seed, self.scale, self.positions, self.grid)

    def _parts_of_G(self, i: int, parts: Sequence[slice], rows: int, like: Tensor) -> Iterator[Tensor]:
        generator = self._generator(("block", i))
        for part in parts:
            yield Feedback._draw(self, generator, (part.stop - part.start, rows), 1.0, like).t()
