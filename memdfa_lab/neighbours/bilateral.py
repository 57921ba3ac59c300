"""A bilateral filter whose cost does not depend on its window (Chaudhury, Sage and Unser 2011, arXiv 1105.4204).

A bilateral filter averages a pixel's neighbours; the weight of a neighbour falls with the difference of the values:

    out(x) = sum_y g(f(y) - f(x)) f(y) / sum_y g(f(y) - f(x)),    g(s) = exp(-s^2 / (2 sigma^2)),

with y in a window of (2 r + 1)^2 pixels. For values that differ by at most T, g is approximated by a power of a cosine,

    g(s) = cos(c s)^N = sum_k w_k cos((2 k - N) c s),    c = 1 / (sigma sqrt(N)),    w_k = binomial(N, k) / 2^N,

for N >= 0.405 (T / sigma)^2. For a smaller N, c s can pass the first zero of the cosine, where the approximation fails:
a power of an odd N is then negative, and one of an even N rises again.
Since cos(u - v) = cos u cos v + sin u sin v, each term needs four plain averages over the window. A plain average needs
a running sum, whose cost does not depend on the window. There are N + 1 terms, so the cost grows as sigma falls.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from memdfa_lab.core.checks import check_int, check_number


def box(t: Tensor, radius: int) -> Tensor:
    """Return, for each pixel of t (..., H, W), the sum over all pixels within `radius` in both directions; t's shape.

    It uses running sums along rows and columns, whose cost does not depend on the radius. Raises ValueError for fewer
    than two dimensions and a radius below 0.
    """
    check_int("radius", radius, 0)
    check_int("the number of dimensions of t (..., H, W)", t.dim(), 2)
    for dim in (-2, -1):
        size, reach = t.shape[dim], min(radius, t.shape[dim] - 1)
        ends = torch.arange(size, device=t.device)
        sums = F.pad(t.movedim(dim, -1).cumsum(-1), (1, 0))
        upper, lower = (ends + reach + 1).clamp_max(size), (ends - reach).clamp_min(0)
        t = (sums[..., upper] - sums[..., lower]).movedim(-1, dim)
    return t


def terms_for(sigma: float, spread: float = 1.0) -> int:
    """Return the least N for values that differ by up to `spread`: 0.405 (spread / sigma)^2, and at least 1.

    Raises ValueError for a sigma that is not a positive number, and a spread that is not a number from 0 on.
    """
    check_number("sigma", sigma, or_more=False)
    check_number("spread", spread)
    return max(1, math.ceil(0.405 * (spread / sigma) ** 2))


@dataclass(frozen=True)
class Bilateral:
    """Filter images (..., H, W), each channel by itself; a transform of inputs, on any device.

    `radius`: of the window, in pixels. `sigma`: the width of the Gaussian g, in units of the images' values. `terms`:
    N, by default the least even number from `terms_for(sigma, spread)` and 4 on. `spread`: T, the largest difference of
    values within a channel of an image.

    Raises ValueError for a radius or terms below 1, and a sigma or spread that is not a positive number.
    """

    radius: int = 3
    sigma: float = 0.2
    terms: int | None = None
    spread: float = 1.0

    def __post_init__(self) -> None:
        check_int("radius", self.radius)
        for name in ("sigma", "spread"):
            check_number(name, getattr(self, name), or_more=False)
        if self.terms is not None:
            check_int("terms", self.terms)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the filtered images, of the same shape and dtype.

        Raises TypeError for what is no tensor of floats; ValueError for fewer than two dimensions or an empty one, for
        NaN and inf, and for a channel whose values differ by more than N terms allow.
        """
        self._check(images)
        f = images.double()  # running sums of many pixels lose digits
        N = int(self.terms or max(4, 2 * math.ceil(terms_for(self.sigma, self.spread) / 2)))
        differ = (f.amax((-2, -1)) - f.amin((-2, -1))).max().item()
        if terms_for(self.sigma, differ) > N:
            raise ValueError(
                f"values of a channel differ by {differ:.4g}, which needs {terms_for(self.sigma, differ)} terms, and "
                f"there are {N}: give a larger spread or more terms, or scale the images"
            )
        c = 1 / (self.sigma * math.sqrt(N))
        above, below = torch.zeros_like(f), torch.zeros_like(f)
        for k in range(N // 2 + 1):  # the terms k and N - k are equal
            weight = math.comb(N, k) / 2**N * (1 if 2 * k == N else 2)
            angle = (2 * k - N) * c * f
            for wave in (angle.cos(), angle.sin()):
                above += weight * wave * box(wave * f, self.radius)
                below += weight * wave * box(wave, self.radius)
        return (above / below).to(images.dtype)  # the pixel itself weighs 1

    def direct(self, images: Tensor) -> Tensor:
        """Return the result of the exact Gaussian filter, by a sum over the (2 r + 1)^2 neighbours of each pixel.

        It takes values that differ by any amount. Otherwise it raises what a call of the filter raises.
        """
        self._check(images)
        f, r = images.double(), self.radius
        padded, inside = F.pad(f, (r, r, r, r)), F.pad(torch.ones_like(f), (r, r, r, r))
        above, below = torch.zeros_like(f), torch.zeros_like(f)
        H, W = f.shape[-2:]
        for i in range(2 * r + 1):
            for j in range(2 * r + 1):
                window = (..., slice(i, i + H), slice(j, j + W))
                weight = inside[window] * torch.exp(-((padded[window] - f) ** 2) / (2 * self.sigma**2))
                above += weight * padded[window]
                below += weight
        return (above / below).to(images.dtype)

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"images must be a tensor of floats (..., H, W), not {kind}: use torch.as_tensor or .float()"
            )
        if images.dim() < 2 or 0 in images.shape:
            raise ValueError(f"images must be (..., H, W), not of shape {tuple(images.shape)}")
        if not torch.isfinite(images).all():
            raise ValueError("images hold NaN or inf, which would spread: fill these pixels in, by torch.nan_to_num")
