"""Training with every product in block floating point (HBFP, Drumond et al. 2018, arXiv 1804.01526).

Numbers t that share an exponent become q = step round(t / step), with step = 2^(xi - m), 2^(xi - 1) <= max|t| < 2^xi,
and a mantissa of m bits: `ml.precision.BlockFloat(m + 1)`, whose bits include the sign. All three products of a layer
multiply such numbers,

    a = q(h) q(W)^T,    dL/dh = q(s) q(W),    dW = q(s)^T q(h),    s = dL/da,

and everything else is in floating point. Inputs h and errors s have one exponent for each example, weights one for each
tile of 24 x 24. Weights are kept in 16 bits and rounded further for each product. The source's exponent is
ceil(log2 max|t|). It is xi, except where max|t| is a power of two: there xi is larger by 1, and max|t| is not clipped.

The values are those of the format, but they are stored and multiplied in float32: the module shows how training behaves
in few bits, and saves neither memory nor time.
"""

import copy
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from memdfa_lab.core.block_float import BlockFloat
from memdfa_lab.core.checks import check_int, check_type
from memdfa_lab.core.compat import ANY_CONVOLUTION
from memdfa_lab.core.generators import of_torch

TILE = 24
LAYERS = (nn.Linear, ANY_CONVOLUTION)


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
    """Pass t unchanged; round its gradient, with noise seeded by the generators' states in the forward pass.

    Noise drawn in the backward pass would change the next block's draws from those of a forward pass alone. The states
    are those of the CPU and of t's device: rounding t on a GPU advances the second alone.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, numbers: BlockFloat) -> Tensor:
        ctx.numbers, ctx.generator = numbers, None
        if numbers.rounding == "stochastic":
            seed = 0
            for get, _ in of_torch(t.device).values():
                seed = zlib.crc32(get().numpy().tobytes(), seed)
            ctx.generator = torch.Generator().manual_seed(seed)
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
        """Return the rounded weight, in its shape and dtype. Raises ValueError for a vector."""
        if weight.dim() < 2:
            raise ValueError(f"weight must be (out, in, ...), got shape {tuple(weight.shape)}: leave biases out")
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
    that MEM-DFA's second pass draws the same. `tile`: the size of the weights' tiles. BP, DFA and MEM-DFA can train it;
    FA refuses it, since it replaces the gradient of plain layers only.

    Raises TypeError for any other layer, ValueError for one whose weight a parametrisation computes.
    """

    def __init__(self, layer: nn.Module, numbers: BlockFloat, tile: int = TILE):
        super().__init__()
        check_type("layer", layer, LAYERS, "a linear layer or a convolution")
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError("a parametrisation computes the layer's weight: take ml.projected(optimizer, ...) for it")
        self.layer, self.narrow = layer, Tiles(numbers, tile)

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output for h (N, ...)."""
        numbers = self.narrow.numbers
        weight = StraightThrough.apply(self.layer.weight, self.narrow)
        out = functional_call(self.layer, {"weight": weight}, (StraightThrough.apply(h, numbers.rounded),))
        return _Errors.apply(out, numbers)


def in_block_float(model: nn.Sequential, numbers: BlockFloat, tile: int = TILE) -> nn.Sequential:
    """Return a copy of the model with each linear layer and convolution, at any depth, wrapped in `InBlockFloat`.

    The copy shares the model's parameters and buffers. Everything else of it stays, such as the forward methods of its
    parts. Raises TypeError for a model that is no nn.Sequential, and ValueError for an nn.MultiheadAttention, which
    multiplies by its weights itself, and for a layer that `InBlockFloat` refuses.
    """
    check_type("model", model, nn.Sequential, "an nn.Sequential")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    wrapped: dict[nn.Module, InBlockFloat] = {}
    for name, part in [*model.named_modules(remove_duplicate=False)]:
        parent, _, own = name.rpartition(".")
        if isinstance(part, nn.MultiheadAttention):
            raise ValueError(f"{name} is an nn.MultiheadAttention, which has products of its own: use nn.Linear layers")
        if isinstance(part, LAYERS) and not isinstance(model.get_submodule(parent), InBlockFloat):
            wrapped[part] = wrapped.get(part) or InBlockFloat(part, numbers, tile)
            setattr(model.get_submodule(parent), own, wrapped[part])
    return model
