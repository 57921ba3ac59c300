"""The signal s_i = e B_i that DFA and MEM-DFA send to block i, formed in parts to save memory."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memdfa_lab.core.feedback import Feedback

SMALL_BYTES = 2**16  # below this size, calling torch takes about as long as the work itself
MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Signal:
    """The error at a block's output: e B_i, or e itself for the last block, which has no feedback.

    The receiver may overwrite the signal: each tensor is formed, or handed out, only once.
    """

    def __init__(self, i: int, e: Tensor, feedback: Feedback | None):
        self.i, self.e, self.feedback = i, e, feedback

    def slices(self, outputs: int, multiple: int = 16) -> Iterator[tuple[slice, Tensor]]:
        """Yield (part, signal), the signal of a quarter of the outputs at a time, of shape (N, outputs of the part).

        The size of each part but the last is a multiple of `multiple`; 16 numbers fill a processor's vector.
        """
        parts = split(outputs, 4, SMALL_BYTES / (len(self.e) * self.e.element_size()), multiple)
        if self.feedback is None:
            yield from ((part, self.e[:, part]) for part in parts)
            return
        e = self.e.reshape(len(self.e), -1)
        matrices = self.feedback.columns(self.i, parts, e.shape[1], outputs, like=e)
        for part, B in zip(parts, matrices, strict=True):
            yield part, e @ B

    def shaped_like(self, out: Tensor) -> Tensor:
        """Return the whole signal in the shape (N, ...) and the memory layout of the block's output."""
        if self.feedback is None:
            return self.e.view(out.shape)
        return self._write_into(torch.empty_like(out, dtype=self.e.dtype), self.feedback)

    def cast(self, dtype: torch.dtype) -> "Signal":
        """Return the signal in the dtype of the block's output."""
        return self if self.e.dtype == dtype else type(self)(self.i, self.e.to(dtype), self.feedback)

    def of(self, examples: slice) -> "Signal":
        """Return the signal of some examples of the batch."""
        return type(self)(self.i, self.e[examples], self.feedback)

    def reusable(self, out: Tensor) -> "Signal":
        """Return the same signal for use on several parts of the batch: B_i or e B_i, the smaller, is then formed once.

        With a grid, or with one B_i for all positions, B_i is the smaller.
        """
        if self.feedback is None:
            return self
        compact = self.feedback.class_dim(self.e.shape, out.shape) is not None or self.feedback.grid is not None
        if compact or self.e[0].numel() <= len(self.e):
            return type(self)(self.i, self.e, self.feedback.reusable())
        whole = self._write_into(self.e.new_empty(len(self.e), out[0].numel()), self.feedback)
        return type(self)(self.i, whole, None)

    def _write_into(self, signal: Tensor, feedback: Feedback) -> Tensor:
        dim = feedback.class_dim(self.e.shape, signal.shape)
        if dim is not None:  # each position counts as an example, with the same B_i
            e, at = self.e.movedim(dim, -1), signal.movedim(dim, -1)  # (N, ..., C) and (N, ..., units)
            rows = Signal(self.i, e.reshape(-1, e.shape[-1]), feedback)
            for part, s in rows.slices(at.shape[-1]):
                at[..., part] = s.view(*at.shape[:-1], -1)
                del s
            return signal
        units, grid = feedback.on_grid(signal.shape)
        at = signal.movedim(units, 1) if signal.dim() > 1 else signal[:, None]
        pixels = math.prod(grid)
        for part, s in self.slices(at.shape[1] * pixels, pixels if pixels > 1 else 16):
            channels = slice(part.start // pixels, part.stop // pixels)
            s = s.view(len(s), -1, *grid)
            at[:, channels] = s if grid == at.shape[2:] else F.interpolate(s, at.shape[2:], mode=MODES[len(grid)])
            del s  # before the next one is made
        return signal


def split(size: int, parts: int, least: float, multiple: int = 1) -> list[slice]:
    """Return `parts` slices that cover `size`, or fewer where a slice would be narrower than `least`.

    The width of each slice but the last is a multiple of `multiple`.
    """
    width = math.ceil(max(size / parts, least) / multiple) * multiple
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]
