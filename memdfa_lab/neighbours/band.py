"""Random band matrices with exchangeable entries (Kirsch and Kriecherbauer, arXiv 1807.05159), and such a B.

Entries are exchangeable if their joint distribution does not depend on their order. By de Finetti's theorem there is
then a random tau, given which the entries are independent, with a mean m(tau) and a standard deviation s(tau). Here

    m = mean tau_1,    s = exp(spread tau_2),    tau_1 and tau_2 standard normal, drawn once for each matrix.

A symmetric matrix of size n has a periodic band of odd width w if its entries are 0 except where i and j are at most
(w - 1) / 2 apart on a circle of n places. If w grows with n, the eigenvalues divided by sqrt(w) follow a semicircle law
of radius 2 s(tau), whatever m is; its scale is random. The mean moves only single eigenvalues, the largest to about
m sqrt(w).

A banded B_i (C, n_i) connects each output to w classes instead of C: w n_i numbers are kept.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, check_number
from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.matrices import POSITIONS, Key
from memdfa_lab.core.phases import label
from memdfa_lab.core.seeds import LARGEST_SEED


def mixture(generator: torch.Generator, mean: float, spread: float) -> tuple[Tensor, Tensor]:
    """Return m and s of one matrix, each 0-d."""
    tau = torch.empty(2, device="cpu").normal_(generator=generator)
    return mean * tau[0], (spread * tau[1]).exp()


def symmetric(n: int, width: int, mean: float = 0.0, spread: float = 0.0, seed: int = 0) -> tuple[Tensor, float, float]:
    """Return a symmetric n x n matrix with a periodic band, divided by sqrt(width), in float64, and its m and s.

    Raises ValueError for n below 1, a width that is even or larger than n, a mean or spread below 0, and a seed outside
    0 to 2**64 - 1.
    """
    n, width = check_int("n", n), check_int("width", width, 1, n)
    if width % 2 == 0:
        raise ValueError(f"width must be odd, since a band has as many places on both sides, got {width}")
    check_number("mean", mean)
    check_number("spread", spread)
    generator = torch.Generator().manual_seed(check_int("seed", seed, 0, LARGEST_SEED))
    m, s = mixture(generator, mean, spread)
    entries = torch.empty(n, n, dtype=torch.float64).normal_(generator=generator).mul_(s).add_(m).tril_()
    entries += entries.tril(-1).t()
    places = torch.arange(n)
    apart = (places[:, None] - places).abs()
    inside = torch.minimum(apart, n - apart) <= width // 2
    return entries * inside / math.sqrt(width), m.item(), s.item()


def semicircle(x: Tensor, radius: float) -> Tensor:
    """Return the density of the semicircle law at x: 2 / (pi radius^2) sqrt(radius^2 - x^2), and 0 beyond the radius.

    Raises ValueError for a radius that is not a positive number.
    """
    check_number("radius", radius, or_more=False)
    return 2 / (math.pi * radius**2) * (radius**2 - x**2).clamp_min(0).sqrt()


class Banded(Stored):
    """Exchangeable matrices B_i with a periodic band, of which w n_i numbers are kept: for DFA and MEM-DFA.

    Output j of n_i receives the error of `width` consecutive classes, from class floor(j C / n_i) on; class 0 follows
    the last class. With a width of C or more B_i is full. `distribution`: that of the entries given tau, scaled as for
    a matrix of `width` classes; `mean` is in units of that scale. The zeros outside of the band are filled in for some
    outputs at a time, when these are taught. The other arguments are those of `ml.feedback.Stored`.

    Raises ValueError for a width below 1, a mean or spread below 0, the orthogonal distribution, and what `Stored`
    raises.
    """

    def __init__(
        self,
        width: int,
        seed: int = 0,
        distribution: str = "he_normal",
        scale: float = 1.0,
        positions: str = POSITIONS[0],
        grid: int | None = None,
        *,
        mean: float = 0.0,
        spread: float = 0.0,
    ):
        super().__init__(seed, distribution, scale, positions, grid)
        if distribution == "orthogonal":
            raise ValueError("a band of an orthogonal matrix is not orthogonal: take he_normal, normal or uniform")
        check_number("mean", mean)
        check_number("spread", spread)
        self.width, self.mean, self.spread = check_int("width", width), float(mean), float(spread)

    def matrix_shapes(self, logits: Sequence[int], *outputs: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shapes (classes, outputs) of the numbers that are kept, for blocks with these outputs."""
        return [(min(self.width, C), n) for C, n in super().matrix_shapes(logits, *outputs)]

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part], shape (error_size, outputs of the part), with the zeros outside of the band."""
        numbers = self._numbers(("block", i), output_size, error_size, like)
        for part in parts:
            yield self._with_zeros(numbers[part], part.start, output_size, error_size).t()

    def weight(self, j: int, weight: Tensor) -> Tensor:
        """Raise ValueError: FA's matrices have the shape of weights, and no classes."""
        raise ValueError("a band is one of classes, which FA's matrices do not have: give FA Stored or Regenerated")

    def settings(self) -> dict[str, Any]:
        """Return the settings that define this feedback, without its matrices."""
        return {**super().settings(), **{name: getattr(self, name) for name in ("width", "mean", "spread")}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the settings and copies of the matrices. Raises ValueError if the state is of another kind."""
        super().load_state_dict(state)
        self.width, self.mean, self.spread = state["width"], state["mean"], state["spread"]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, width={self.width}, mean={self.mean:g}, spread={self.spread:g})"

    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        outputs, classes = shape
        return self._with_zeros(self._numbers(key, outputs, classes, like), 0, outputs, classes)

    def _numbers(self, key: Key, outputs: int, classes: int, like: Tensor) -> Tensor:
        width = min(self.width, classes)
        return super()._matrix(key, (outputs, width), self._factor(width, outputs), like)

    def _draw(self, generator: torch.Generator, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        m, s = mixture(generator, self.mean, self.spread)
        B = super()._draw(generator, shape, factor, like)
        return B.mul_(s.to(B)).add_(m.to(B), alpha=factor)

    def _with_zeros(self, numbers: Tensor, first: int, outputs: int, classes: int) -> Tensor:
        """Return the rows (rows, classes) of B_i^T for outputs from `first` on."""
        if numbers.shape[1] == classes:
            return numbers
        place = torch.arange(first, first + len(numbers), device=numbers.device).mul_(classes)
        place.div_(outputs, rounding_mode="floor")
        of = (place[:, None] + torch.arange(numbers.shape[1], device=numbers.device)).remainder_(classes)
        return label("feedback", numbers.new_zeros(len(numbers), classes)).scatter_(1, of, numbers)
