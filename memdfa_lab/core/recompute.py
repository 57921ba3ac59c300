"""A forward pass that leaves nothing behind, so that a second one has the same result.

Pass 1 of MEM-DFA (Chu et al. 2020) needs only the network's output. Whatever else a forward pass changes is restored:
the random number generators of torch, numpy and Python, buffers, and the attributes of modules. Pass 2 then draws the
same dropout masks, and BatchNorm's statistics are updated once.
"""

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import describe
from memdfa_lab.core.compat import buffers_of, version
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
    """Return the output of `blocks` for x (N, ...), without a graph; what they change besides is restored.

    `first` is the number of the first of these blocks in the network, for the profilers. `see` is given the class
    of `BlockGradient` by which each block ran, and its output. `learn` may form the gradient of a block before. Each
    block runs within narrow(), if given; one that cannot runs without, and a warning names it. `store` has the blocks,
    and brings them in for `use`.
    """
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(generators_restored(x.device))
        h, others = x, [other_generators_restored()]

        def draws() -> None:
            if others:
                stack.enter_context(others.pop())

        for i, block in enumerate(blocks, first):
            with phase("forward", i), store.block(i, use):  # the input is freed within
                way, h = without_trace(i, block, h, learn, draws, narrow)
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
    draws: Callable[[], object] = lambda: None,
    narrow: Callable[[], AbstractContextManager[Any]] | None = None,
) -> tuple[type, Tensor]:
    """Run one block, and return the class of `BlockGradient` by which it ran, and its output.

    `draws` is called before it may draw from generators of other libraries, whose state is not restored here.
    """
    gradient = block_gradient(block, h)
    by_autograd = isinstance(gradient, ByAutograd)
    # By block: copies of all buffers would grow with depth.
    restored: AbstractContextManager[None] = nullcontext()
    if by_autograd:  # by hand, nothing draws from other libraries, and no buffer is made
        draws()
        restored = state_restored(block)
    elif any(map(buffers_of, block.modules())):
        restored = buffers_restored(block)
    with restored:
        learn(i, gradient)
        out = gradient.output() if narrow is None else _narrow_output(block, gradient, h, narrow)
    return type(gradient), out


def generators_restored(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's global generators, the CPU's and that of `device`, on leaving."""
    on_accelerator = [device] if device.type not in ("cpu", "meta") else []
    return torch.random.fork_rng(on_accelerator, device_type=device.type if on_accelerator else "cuda")


@contextmanager
def other_generators_restored() -> Iterator[None]:
    """Restore the global generators of Python and, if it is there, of numpy on leaving."""
    numpy: Any = sys.modules.get("numpy")
    with generator_restored(random), generator_restored(getattr(numpy, "random", None)):
        yield


@contextmanager
def generator_restored(generator: Any) -> Iterator[None]:
    """Restore a generator of torch, numpy or Python on leaving."""
    get, put = state_of(generator)
    before = get()
    try:
        yield
    finally:
        put(before)


def state_of(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """Return how to take and to set the state of a generator; of anything else there is none."""
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):  # of torch and numpy, of Python
        if hasattr(generator, get) and hasattr(generator, put):
            return getattr(generator, get), getattr(generator, put)
    if hasattr(generator, "bit_generator"):  # numpy's newer ones
        bits = generator.bit_generator
        return lambda: copy.deepcopy(bits.state), lambda state: setattr(bits, "state", state)
    return lambda: None, lambda state: None


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers on leaving: which tensors they are, their shapes, and what they hold."""
    held_in = [buffers_of(part) for part in module.modules()]
    owners = [(held, dict(held)) for held in held_in if isinstance(held, dict)]  # TorchScript's are none
    # An expanded buffer (stride 0) cannot be written to, nor copied into. BatchNorm's writes do not count as versions
    # of the buffer, so what has changed cannot be asked.
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
    """Restore the attributes of the module's parts: what they are, and what they hold.

    What they hold is restored in tensors, generators, and lists, dictionaries and sets, but not in what lies in these.
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
