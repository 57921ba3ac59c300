"""Block floating point: numbers of a few bits, and one power of two that all numbers of a row share.

Drumond et al. 2018 (hybrid block floating point): a row t of a matrix is m 2^k with whole numbers m of `bits` bits, the
sign included, and k the same for the whole row. A product of two such matrices is one of whole numbers, times a power
of two for each row and column.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.compat import int8_product
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.core.signal import SMALL_BYTES, split

ROUNDING = {"nearest": Tensor.round_, "stochastic": Tensor.floor_}  # stochastic: floor(number + uniform noise)
LARGE_BYTES = {torch.bfloat16: 2**20, torch.int8: 2**21}  # weights up to this size are faster narrowed in one piece
LONGEST = (2**31 - 1) // 127**2  # the inputs of which a sum of int8 products surely fits into int32
LEAST_EXPONENT = -100  # a row of smaller numbers keeps fewer bits, and none where all are below 2**(-100 - bits)
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@dataclass(frozen=True)
class BlockFloat:
    """A number format: `bits` bits a number, the sign included, and one power of two a row (an example, or a filter).

    `rounding`: "nearest", or "stochastic", which is unbiased; `seed` seeds the stochastic rounding. As `pass1` of a
    rule, linear layers and convolutions multiply numbers of this format, and everything else runs in the weights'
    precision. The products are computed in float32: the format is for experiments, and saves no time.

    Raises ValueError for fewer than 2 bits or more than 24, an unknown rounding, and a seed outside 0 to 2**64 - 1.
    """

    bits: int = 8
    rounding: str = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 2, 24)
        lookup("rounding", self.rounding, ROUNDING)
        check_int("seed", self.seed, 0, LARGEST_SEED)

    def power(self, t: Tensor) -> Tensor:
        """Return the power of two of each row of t (rows, ...): (rows, 1, ...). It is NaN if the row is not finite."""
        rows = tuple(range(1, t.dim()))
        largest = torch.maximum(t.amax(rows, keepdim=True), t.amin(rows, keepdim=True).neg_()).float()
        exponent = torch.frexp(largest).exponent.clamp_(min=LEAST_EXPONENT).sub_(self.bits - 1)
        return torch.ldexp(torch.ones_like(largest), exponent) + (largest - largest)

    def parts(
        self, t: Tensor, dtype: torch.dtype, noise: Callable[[Tensor], Tensor] = torch.rand_like, pieces: int = 16
    ) -> tuple[Tensor, Tensor]:
        """Return the whole numbers of t (rows, ...) as `dtype`, in t's layout, and the power of two of each row.

        `noise` returns the numbers between 0 and 1 that stochastic rounding adds. The rows are converted in `pieces`,
        so that little memory is needed besides the result.
        """
        power = self.power(t)
        shrink, most = power.reciprocal(), 2 ** (self.bits - 1) - 1
        whole = torch.empty_like(t, dtype=dtype)
        for part in split(len(t), pieces, SMALL_BYTES / (4 * math.prod(t.shape[1:]))):
            scaled = t[part] * shrink[part]
            if self.rounding == "stochastic":
                scaled += noise(scaled)
            whole[part] = ROUNDING[self.rounding](scaled).clamp_(-most, most)
            del scaled
        return whole, power

    def rounded(self, t: Tensor, noise: Callable[[Tensor], Tensor] = torch.rand_like) -> Tensor:
        """Return the nearest numbers of this format to t, in float32."""
        whole, power = self.parts(t, torch.float32, noise)
        return whole.mul_(power)


BY_BITS = {f"{bits}bit": BlockFloat(bits) for bits in range(2, 9)}


class Products(TorchFunctionMode):
    """A mode within which linear layers multiply numbers of `kind`: bfloat16, int8, or a BlockFloat.

    With a BlockFloat, convolutions do so too. bfloat16 and int8 are used within an autocast to bfloat16. A large
    weight, of more numbers than the input, is narrowed a quarter at a time: little of the copy is in memory at once.
    `key` seeds stochastic rounding, together with the seed of the BlockFloat.
    """

    def __init__(self, kind: torch.dtype | BlockFloat, key: int = 0):
        super().__init__()
        self.kind = kind
        self.generator: torch.Generator | None = None
        if isinstance(kind, BlockFloat) and kind.rounding == "stochastic":
            self.generator = torch.Generator().manual_seed(hash((kind.seed, key)) % LARGEST_SEED)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(self.kind, BlockFloat) and func in (F.linear, *CONVOLUTIONS):
            return self._emulated(self.kind, func, *args, **kwargs)
        return _linear(self.kind, *args, **kwargs) if func is F.linear else func(*args, **kwargs)

    def _noise(self, t: Tensor) -> Tensor:
        drawn = torch.empty(t.shape, dtype=t.dtype, device="cpu").uniform_(generator=self.generator)
        return drawn.to(t.device)

    def _emulated(
        self, numbers: BlockFloat, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        out: Tensor = func(numbers.rounded(input, self._noise), numbers.rounded(weight, self._noise), *args, **kwargs)
        return out


def _linear(kind: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    if kind is torch.int8 and rows.shape[1] > LONGEST:
        kind = torch.bfloat16
    narrow, product, dtype = KERNELS[kind]
    N, M = len(rows), len(weight)
    if weight.numel() > max(rows.numel(), LARGE_BYTES[kind] / kind.itemsize):
        narrowed, out = narrow(rows), rows.new_empty(N, M, dtype=dtype)
        for part in split(M, 4, 1, 16):
            out[:, part] = product(narrowed, narrow(weight[part]), None if bias is None else bias[part])
    elif rows.numel() > max(weight.numel(), N * M) and rows.dtype != kind:  # in parts no larger than the output
        narrowed, out = narrow(weight), rows.new_empty(N, M, dtype=dtype)
        for part in split(N, math.ceil(rows.shape[1] / M), SMALL_BYTES / (kind.itemsize * rows.shape[1])):
            out[part] = product(narrow(rows[part]), narrowed, bias)
    else:
        out = product(narrow(rows), narrow(weight), bias)
    return out.view(*input.shape[:-1], -1)


def _int8(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
    (h, h_power), (W, W_power) = one, other
    sums = int8_product(h, W.t())
    out = sums.view(torch.float32).copy_(sums).mul_(h_power).mul_(W_power.view(-1))  # in the memory of the sums
    return out if bias is None else out.add_(bias)


# how numbers of a type are made, how matrices of them are multiplied, and the type of the product
KERNELS: dict[Any, tuple[Any, Any, torch.dtype]] = {
    torch.bfloat16: (Tensor.bfloat16, F.linear, torch.bfloat16),
    torch.int8: (partial(BlockFloat(8).parts, dtype=torch.int8), _int8, torch.float32),
}
