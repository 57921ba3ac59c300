"""The precision in which a rule computes: torch's autocast around each step, without its cache.

The cache keeps a cast of each weight until its context ends. Memory would grow with depth, and casts would be older
than the updates. Weights, gradients and the optimizer's state stay in float32.

In float16 small gradients vanish. So each block's signal is multiplied by a scale of its own, and its gradient divided
by it. A block whose gradient overflows skips its update and halves its scale (torch.amp.GradScaler, one a block).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import lookup

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Step = Callable[[Any, Tensor, Any], Tensor]


def autocast(precision: str | None, device: str) -> AbstractContextManager[Any]:
    """Return the context of a step on this kind of device, in float16 or bfloat16.

    With no precision it is that of a torch.autocast around the step, if there is one.
    """
    if precision is None and not torch.is_autocast_enabled(device):
        return nullcontext()
    torch.clear_autocast_cache()  # of casts that the step will make stale
    dtype = PRECISIONS[precision] if precision else torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, cache_enabled=False)


def check(precision: str | None, device: str, teaches_blocks: bool) -> None:
    """Raise ValueError for a precision that there is not, or not for such a rule or device."""
    if precision is not None:
        lookup("precision", precision, PRECISIONS)
    if precision == "float16" and not teaches_blocks:
        raise ValueError("float16 needs a signal a block, to scale it: take DFA or MEM-DFA, or precision='bfloat16'")
    if precision == "float16" and device != "cuda":
        raise ValueError(f"float16 is for a GPU, and the model is on the {device}: take precision='bfloat16'")


class InPrecision:
    """What computes in a precision of its own: each step of a subclass enters `autocast`."""

    blocks: nn.Sequential
    precision: str | None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "step" in vars(cls):
            cls.step = _within(cls.step)  # type: ignore[attr-defined]

    @property
    def device(self) -> str:
        """The kind of device that the model is on."""
        return next(self.blocks.parameters()).device.type

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the rule computes."""
        return autocast(self.precision, self.device)


def _within(step: Step) -> Step:
    @wraps(step)
    def in_precision(rule: Any, x: Tensor, y: Any) -> Tensor:
        with rule.autocast():
            return step(rule, x, y)

    return in_precision
