"""Block floating point: numbers of a few bits, and one power of two that all numbers of a row share.

Drumond et al. 2018 (hybrid block floating point): a row t of a matrix is m 2^k with whole numbers m of `bits` bits, the
sign included, and k the same for the whole row. A product of two such matrices is one of whole numbers, times a power
of two for each row and column.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.compat import int8_product
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.core.signal import SMALL_BYTES, split

ROUNDING = {"nearest": torch.round, "stochastic": torch.floor}  # the second, of a number plus one between 0 and 1
LEAST_EXPONENT = -100  # a row of smaller numbers is zeros
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class BlockFloat:
    """A format with `bits` bits a number, the sign included, and one power of two a row: an example, or a filter.

    `rounding`: "nearest", or "stochastic", which is right on average; `seed` is that of the latter. As pass 1 of a
    rule, linear layers and convolutions multiply such numbers, and all else is in the weights' precision. The products
    are computed in float32: this is for experiments, and saves no time.

    Raises ValueError for less than 2 bits or more than 24, another rounding, and a seed that is none.
    """

    bits: int = 8
    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 2, 24)
        lookup("rounding", self.rounding, ROUNDING)
        check_int("seed", self.seed, 0, LARGEST_SEED)

    def parts(self, t: Tensor, dtype: torch.dtype, noise: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the whole numbers of t (rows, ...) as `dtype`, and the power of two of each row, (rows, 1, ...).

        `noise` returns the numbers between 0 and 1 that stochastic rounding adds. A row that is not finite has NaN
        as its power.
        """
        rows = t.flatten(1)
        largest = torch.maximum(rows.amax(1), rows.amin(1).neg_()).float()
        exponent = torch.frexp(largest).exponent.clamp_(min=LEAST_EXPONENT).sub_(self.bits - 1)
        power = torch.ldexp(torch.ones_like(largest), exponent) + (largest - largest)
        shrink, most = power.reciprocal().unsqueeze(1), 2 ** (self.bits - 1) - 1
        whole = torch.empty_like(rows, dtype=dtype)
        for part in split(len(rows), 16, SMALL_BYTES / (4 * rows.shape[1])):  # so that little is in memory besides
            scaled = rows[part] * shrink[part]
            if self.rounding == "stochastic":
                scaled += noise(scaled)
            whole[part] = ROUNDING[self.rounding](scaled).clamp_(-most, most)
            del scaled
        return whole.view(t.shape), power.view(-1, *[1] * (t.dim() - 1))

    def rounded(self, t: Tensor, noise: Callable[[Tensor], Tensor] = torch.rand_like) -> Tensor:
        """Return the nearest numbers of this format to t, in float32."""
        whole, power = self.parts(t, torch.float32, noise)
        return whole.mul_(power)


class Products(TorchFunctionMode):
    """Within it, linear layers and convolutions multiply numbers of a format.

    `integers`: linear layers multiply int8 as such, and convolutions are left as they are. `key` is a number from which
    stochastic rounding draws.
    """

    def __init__(self, numbers: BlockFloat, integers: bool, key: int):
        super().__init__()
        self.numbers, self.integers = numbers, integers
        self.generator: torch.Generator | None = None
        if numbers.rounding == "stochastic":
            self.generator = torch.Generator().manual_seed(hash((numbers.seed, key)) % LARGEST_SEED)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in CONVOLUTIONS and not self.integers:
            return self._convolution(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _noise(self, t: Tensor) -> Tensor:
        drawn = torch.empty(t.shape, dtype=t.dtype, device="cpu").uniform_(generator=self.generator)
        return drawn.to(t.device)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.integers:
            return F.linear(self.numbers.rounded(input, self._noise), self.numbers.rounded(weight, self._noise), bias)
        rows = input.reshape(-1, input.shape[-1])
        h, h_power = self.numbers.parts(rows, torch.int8, self._noise)
        W, W_power = self.numbers.parts(weight, torch.int8, self._noise)
        sums = int8_product(h, W.t())
        del h, W
        out = sums.view(torch.float32).copy_(sums).mul_(h_power).mul_(W_power.view(-1))  # in the memory of the sums
        return (out if bias is None else out.add_(bias)).view(*input.shape[:-1], -1)

    def _convolution(self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return func(
            self.numbers.rounded(input, self._noise), self.numbers.rounded(weight, self._noise), *args, **kwargs
        )
