"""The precision in which a rule computes: torch's autocast around each step, without its cache.

The cache keeps a cast of each weight until its context ends. With it, memory would grow with depth, and a cast could be
older than the weight's last update. Weights, gradients and the optimizer's state stay in float32.

In float16 small gradients vanish. Each block's signal is therefore multiplied by a scale of its own, and its gradient
divided by it (a torch.amp.GradScaler a block). A block whose gradient overflows skips its update and halves its scale.

Pass 1 of MEM-DFA serves only to find e. It may run in fewer bits than pass 2, which gives the updates.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memdfa_lab.core.block_float import BY_BITS, Products
from memdfa_lab.core.block_float import BlockFloat as BlockFloat
from memdfa_lab.core.checks import lookup
from memdfa_lab.core.compat import has_fast_product, has_int8_product
from memdfa_lab.core.recompute import generators_restored, state_restored
from memdfa_lab.core.watcher import has_data, unwatched

PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The formats of pass 1 by name; any other BlockFloat is allowed, too
PASS1: dict[str, torch.dtype | BlockFloat] = {"bfloat16": torch.bfloat16, "int8": torch.int8}
PASS1 |= BY_BITS
FAR = math.cos(math.radians(10))
Step = Callable[[Any, Tensor, Any], Tensor]


def autocast(precision: str | None, device: str) -> AbstractContextManager[Any]:
    """Return the context of a step on this kind of device, in float16 or bfloat16.

    Without `precision`, the step follows a torch.autocast around it, if there is one.
    """
    if precision is None and not torch.is_autocast_enabled(device):
        return nullcontext()
    torch.clear_autocast_cache()  # its casts would be older than the step's updates
    dtype = PRECISIONS[precision] if precision else torch.get_autocast_dtype(device)
    return torch.autocast(device, dtype, cache_enabled=False)


def check(precision: str | None, device: str, teaches_blocks: bool) -> None:
    """Raise ValueError for an unknown precision, or one that such a rule or device cannot use."""
    if precision is not None:
        lookup("precision", precision, PRECISIONS)
    if precision == "float16" and not teaches_blocks:
        raise ValueError("float16 needs a signal a block, to scale it: take DFA or MEM-DFA, or precision='bfloat16'")
    if precision == "float16" and device == "cpu":
        raise ValueError("float16 is for a GPU, and the model is on the cpu: take precision='bfloat16'")


def first_pass(pass1: Any, x: Tensor) -> Callable[[], AbstractContextManager[Any]] | None:
    """Return a function that makes the context of each block in pass 1 on x (N, ...); None if pass 1 runs as pass 2.

    bfloat16 is torch's autocast, in which linear layers narrow large weights in parts. With int8, linear layers
    multiply int8 numbers, and everything else runs in bfloat16; where torch multiplies no int8, all does.
    """
    if pass1 is None:
        return None
    kind = PASS1[pass1] if isinstance(pass1, str) else pass1
    if kind is torch.int8 and not _multiplies_int8(x.device.type):
        kind = torch.bfloat16
    if isinstance(kind, BlockFloat):
        key = hash(x.sum().item()) if kind.rounding == "stochastic" else 0  # as in DFA, and in a resumed run
        products = Products(kind, key)
        return lambda: products
    cast = partial(torch.autocast, x.device.type, torch.bfloat16, cache_enabled=False)
    return partial(_both, cast, Products(kind))


def _multiplies_int8(device: str) -> bool:
    with unwatched():
        return has_int8_product(device)


@contextmanager
def _both(cast: Callable[[], AbstractContextManager[Any]], products: Products) -> Iterator[None]:
    with cast(), products:
        yield


class InPrecision:
    """The part of a rule that sets its precision: each step of a subclass runs within `autocast`."""

    blocks: nn.Sequential
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    teaches_blocks: ClassVar[bool]
    precision: str | None
    pass1: str | BlockFloat | None
    scalers: list[torch.amp.GradScaler]
    _has_warned: bool = False  # whether a warning was given that pass 1 is too far from pass 2

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "step" in vars(cls):
            cls.step = _within(cls.step)  # type: ignore[attr-defined]

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return next(self.blocks.parameters()).device

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the rule computes."""
        return autocast(self.precision, self.device.type)

    def check_precision(self, first: bool = False) -> None:
        """Raise ValueError for an unknown precision, or one that this rule, network or device cannot use."""
        check(self.precision, self.device.type, self.teaches_blocks)
        if self.pass1 is not None:
            self._check_pass1(self.pass1, first)
        if first and self.precision == "float16":
            self.scalers = [torch.amp.GradScaler(self.device.type) for _ in self.blocks]

    def _check_pass1(self, pass1: Any, first: bool) -> None:
        if not self.teaches_blocks:
            raise ValueError("pass1 is for DFA and MEM-DFA, which need only e of the first pass: leave it out")
        if not isinstance(pass1, BlockFloat):
            lookup("pass1", pass1, PASS1)
        dtypes = {parameter.dtype for parameter in self.blocks.parameters()} - {torch.float32}
        if dtypes:
            raise ValueError(f"pass1 narrows weights of float32, and the network has {dtypes.pop()}: leave it out")
        kind = PASS1.get(pass1)
        if first and kind is torch.int8 and not _multiplies_int8(self.device.type):
            warnings.warn(
                f"torch {torch.__version__} multiplies no int8 on {self.device.type}: pass1='int8' runs in bfloat16",
                stacklevel=4,
            )
        elif first and isinstance(kind, torch.dtype) and not has_fast_product(kind, self.device.type):
            warnings.warn(
                f"this processor multiplies {pass1} no faster than float32: pass1={pass1!r} saves no time here",
                stacklevel=4,
            )

    def error_of(self, logits: Tensor, y: Any) -> Tensor:
        """Return e = dloss/dlogits, of the logits' shape (N, C); the loss's state and the generators are restored."""
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(generators_restored(logits.device))
            if isinstance(self.loss_fn, nn.Module):
                stack.enter_context(state_restored(self.loss_fn))
            logits = logits.detach().requires_grad_()
            (e,) = torch.autograd.grad(self.loss_fn(logits, y), logits)
            return e

    def warn_if_turned(self, e: Tensor, logits: Tensor, y: Any) -> None:
        """Warn, once, if e is more than 10 degrees from the e of an exact pass, whose logits these are."""
        exact = self.error_of(logits.float(), y)
        lengths = torch.linalg.vector_norm(e) * torch.linalg.vector_norm(exact)
        cosine = torch.dot(e.flatten(), exact.flatten()) / lengths
        if has_data(e) and cosine < FAR:
            self._has_warned = True
            degrees = torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).item()
            warnings.warn(
                f"with pass1={self.pass1!r} the error e is {degrees:.0f} degrees from that of an exact pass: take more "
                "bits, or leave pass1 out (ml.alignment.error_angle gives the angle)",
                stacklevel=4,
            )


def _within(step: Step) -> Step:
    @wraps(step)
    def in_precision(rule: Any, x: Tensor, y: Any) -> Tensor:
        with rule.autocast():
            return step(rule, x, y)

    return in_precision
