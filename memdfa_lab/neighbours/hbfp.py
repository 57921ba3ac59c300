"""Training with every product in block floating point (HBFP, Drumond et al. 2018, arXiv 1804.01526).

Numbers t that share an exponent become q = step round(t / step), with step = 2^(xi - m), 2^(xi - 1) <= max|t| < 2^xi,
and a mantissa of m bits: `ml.precision.BlockFloat(m + 1)`, whose bits include the sign. All three products of a layer
multiply such numbers,

    a = q(h) q(W)^T,    dL/dh = q(s) q(W),    dW = q(s)^T q(h),    s = dL/da,

and everything else is in floating point. Inputs h and errors s have one exponent for each example, weights one for each
tile of 24 x 24. Weights are kept in 16 bits and rounded further for each product.

The values are those of the format, but they are stored and multiplied in float32: the module shows how training behaves
in few bits, and saves neither memory nor time.
"""

import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from memdfa_lab.core.block_float import BlockFloat
from memdfa_lab.core.checks import check_int, check_type
from memdfa_lab.core.compat import ANY_CONVOLUTION

TILE = 24


class StraightThrough(torch.autograd.Function):
    """Round in the forward pass, by a function of the tensor; the gradient passes unchanged (straight-through)."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        """Return rounded(t), in t's dtype."""
        return rounded(t).to(t.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient unchanged, and None for the function."""
        return gradient, None


class _Errors(torch.autograd.Function):
    """Pass t unchanged; round its gradient, with noise seeded by the generator's state in the forward pass.

    Noise drawn in the backward pass would change the next block's draws from those of a forward pass alone.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, numbers: BlockFloat) -> Tensor:
        ctx.numbers, ctx.generator = numbers, None
        if numbers.rounding == "stochastic":
            state = torch.get_rng_state()
            ctx.generator = torch.Generator().manual_seed(zlib.crc32(state.numpy().tobytes()))
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        def noise(t: Tensor) -> Tensor:
            return torch.empty(t.shape, dtype=t.dtype).uniform_(generator=ctx.generator).to(t.device)

        return ctx.numbers.rounded(gradient, noise).to(gradient.dtype), None


class Tiles:
    """Round a weight (out, ...), seen as a matrix (out, all else), to `numbers`, with one exponent a tile of it.

    It also keeps weights in 16 bits: `ml.projected(torch.optim.SGD, Tiles(BlockFloat(16)))`. Raises TypeError if
    `numbers` is no BlockFloat, ValueError for a tile below 1.
    """

    def __init__(self, numbers: BlockFloat, tile: int = TILE):
        check_type("numbers", numbers, BlockFloat, "a BlockFloat, such as ml.precision.BlockFloat(8)")
        self.numbers, self.tile = numbers, check_int("tile", tile)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, in its shape and dtype."""
        flat, n = weight.flatten(1), self.tile
        rows, columns = flat.shape
        padded = F.pad(flat, (0, -columns % n, 0, -rows % n)).unflatten(1, (-1, n)).unflatten(0, (-1, n)).movedim(1, 2)
        rounded = self.numbers.rounded(padded.flatten(0, 1)).view(padded.shape).movedim(2, 1)
        return rounded.flatten(2).flatten(0, 1)[:rows, :columns].reshape(weight.shape).to(weight.dtype)

    def __repr__(self) -> str:
        return f"Tiles({self.numbers}, tile={self.tile})"


class InBlockFloat(nn.Module):
    """A linear layer or convolution whose three products multiply BlockFloat numbers.

    `numbers`: the format. Its seed is not used: stochastic rounding draws from torch's generator, as dropout does, so
    that MEM-DFA's second pass draws the same. `tile`: the size of the weights' tiles. Raises TypeError for any other
    layer.
    """

    def __init__(self, layer: nn.Module, numbers: BlockFloat, tile: int = TILE):
        super().__init__()
        kinds = (nn.Linear, ANY_CONVOLUTION)
        check_type("layer", layer, kinds, "a linear layer or a convolution")
        self.layer, self.narrow = layer, Tiles(numbers, tile)

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output for h (N, ...)."""
        numbers = self.narrow.numbers
        weight = StraightThrough.apply(self.layer.weight, self.narrow)
        out = functional_call(self.layer, {"weight": weight}, (StraightThrough.apply(h, numbers.rounded),))
        return _Errors.apply(out, numbers)


def in_block_float(model: nn.Sequential, numbers: BlockFloat, tile: int = TILE) -> nn.Sequential:
    """Return the chain with each linear layer and convolution wrapped in `InBlockFloat`; it shares the model's weights.

    Raises TypeError for a model that is no nn.Sequential.
    """
    check_type("model", model, nn.Sequential, "an nn.Sequential")
    kinds = (nn.Linear, ANY_CONVOLUTION)
    parts = [in_block_float(part, numbers, tile) if isinstance(part, nn.Sequential) else part for part in model]
    return nn.Sequential(*(InBlockFloat(part, numbers, tile) if isinstance(part, kinds) else part for part in parts))
