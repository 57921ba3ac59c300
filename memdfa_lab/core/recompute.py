"""A forward pass that leaves no trace, so that a second pass has the same result.

Pass 1 of MEM-DFA (Chu et al. 2020) needs only the network's output. Everything else that a forward pass changes is
restored: the random number generators of torch, numpy and Python, buffers, and the attributes of modules. Pass 2 then
draws the same dropout masks, and BatchNorm's statistics are updated once.
"""

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import describe
from memdfa_lab.core.compat import buffers_of, version
from memdfa_lab.core.generators import generator_restored
from memdfa_lab.core.generators import generators_restored as generators_restored
from memdfa_lab.core.local import BlockGradient, ByAutograd, block_gradient
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.store import FORWARD, IN_MEMORY, Store

CONTAINERS = (list, dict, set, deque, bytearray)
OF_TORCH = frozenset(vars(nn.Module())) - {"training"}  # the attributes that every module has


def forward_without_trace(
    blocks: Iterable[nn.Module],
    x: Tensor,
    first: int = 0,
    see: Callable[[type, Tensor], object] = lambda way, h: None,
    learn: Callable[[int, BlockGradient], object] = lambda i, gradient: None,
    narrow: Callable[[], AbstractContextManager[Any]] | None = None,
    store: Store = IN_MEMORY,
    use: str = FORWARD,
) -> Tensor:
    """Return the output of `blocks` for x (N, ...), without a graph; everything else that they change is restored.

    `first` is the number of the first of these blocks in the network, for the profilers. `see` is called with the class
    of `BlockGradient` that ran each block, and the block's output. `learn` is called before each block's output is
    formed, and may form its gradient. Each block runs within narrow(), if given; a block that cannot runs outside it,
    with a warning that names it. `store` holds the blocks, and brings them in for `use`.
    """
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(generators_restored(x.device))
        h = x
        for i, block in enumerate(blocks, first):
            with phase("forward", i), store.block(i, use):  # the block's input is freed here
                way, h = without_trace(i, block, h, learn, narrow)
            see(way, h)
    return h


def _narrow_output(
    block: nn.Module, gradient: BlockGradient, h: Tensor, narrow: Callable[[], AbstractContextManager[Any]]
) -> Tensor:
    try:
        with narrow():
            return gradient.output()
    except RuntimeError as problem:
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        why = " ".join(str(problem).split())
        warnings.warn(f"{describe(block)} runs in float32 in pass 1: {why}", stacklevel=5)
    return block_gradient(block, h.float() if h.is_floating_point() else h).output()


def without_trace(
    i: int,
    block: nn.Module,
    h: Tensor,
    learn: Callable[[int, BlockGradient], object] = lambda i, gradient: None,
    narrow: Callable[[], AbstractContextManager[Any]] | None = None,
) -> tuple[type, Tensor]:
    """Run one block; return the class of `BlockGradient` that ran it, and its output.

    The state of generators is not restored here.
    """
    gradient = block_gradient(block, h)
    by_autograd = isinstance(gradient, ByAutograd)
    # Block by block: copies of all buffers would grow with depth.
    restored: AbstractContextManager[None] = nullcontext()
    if by_autograd:  # a block by hand gets no new buffers
        restored = state_restored(block)
    elif any(map(buffers_of, block.modules())):
        restored = buffers_restored(block)
    with restored:
        learn(i, gradient)
        out = gradient.output() if narrow is None else _narrow_output(block, gradient, h, narrow)
    return type(gradient), out


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers on leaving: the tensor objects, their shapes and their values."""
    held_in = [buffers_of(part) for part in module.modules()]
    owners = [(held, dict(held)) for held in held_in if isinstance(held, dict)]  # TorchScript's are not dictionaries
    # An expanded buffer (stride 0) cannot be written to, nor copied into. BatchNorm's writes do not raise a buffer's
    # version, so that all buffers are copied, not only those that have changed.
    saved = [(b, label("workspace", b.clone())) for b in module.buffers() if 0 not in b.stride()]
    try:
        yield
    finally:
        for held, before in owners:
            _put_back(held, before)
        with torch.no_grad():
            for buffer, value in saved:
                _write(buffer, value)


@contextmanager
def state_restored(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers, and the attributes of its parts, as `attributes_restored` does."""
    with buffers_restored(module), attributes_restored(module):
        yield


@contextmanager
def attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore the attributes of the module and its submodules on leaving: the objects, and their contents.

    Contents are restored for tensors, generators, lists, dictionaries and sets, but not for objects nested inside them.
    """
    attributes = [(vars(part), {k: v for k, v in vars(part).items() if k not in OF_TORCH}) for part in module.modules()]
    values = [value for _, before in attributes for value in before.values()]
    contents = [(value, copy.copy(value)) for value in values if isinstance(value, CONTAINERS)]
    tensors = [(value, version(value), value.detach().clone()) for value in values if isinstance(value, Tensor)]
    with ExitStack() as stack:
        for value in values:
            if not isinstance(value, (Tensor, *CONTAINERS)):
                stack.enter_context(generator_restored(value))
        try:
            yield
        finally:
            for held, before in attributes:
                _put_back(held, before, OF_TORCH)
            for value, content in contents:
                _refill(value, content)
            with torch.no_grad():
                for tensor, number, numbers in tensors:
                    if version(tensor) != number:
                        _write(tensor, numbers)


def _put_back(held: dict[str, Any], before: dict[str, Any], but: frozenset[str] = frozenset()) -> None:
    for name in [name for name in held if name not in before and name not in but]:
        del held[name]
    held.update(before)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(content)
    else:
        container.extend(content)


def _write(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:  # an observer's buffers grow when they are first used
        tensor.resize_(value.shape)
    tensor.copy_(value)
