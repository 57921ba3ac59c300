"""What a step requires of the network and the loss, checked before any weight changes.

The first step with a batch of a new shape is rehearsed: all blocks and the loss run on a copy of the batch, and what
they change is restored. A network or loss that cannot be trained is therefore refused before anything has changed:
weights, buffers, the optimizer's state, random generators and the caller's batch.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import describe, run_block
from memdfa_lab.core.compat import storage_id
from memdfa_lab.core.cut import Traced
from memdfa_lab.core.local import ByAutograd, block_gradient
from memdfa_lab.core.recompute import (
    attributes_restored,
    buffers_restored,
    generators_restored,
    state_restored,
)
from memdfa_lab.core.store import IN_MEMORY, Store
from memdfa_lab.core.watcher import Watcher, has_data, unwatched


def check_traced(chain: Sequence[nn.Module], x: Tensor) -> None:
    """Raise ValueError if the output of a traced model's blocks on x (N, ...) differs from the model's own.

    torch.fx does not record every condition in the code, such as `x.dtype is torch.long`, and may have taken the other
    branch.
    """
    model = next((block.model for block in chain if isinstance(block, Traced)), None)
    weights = {id(p) for block in chain for p in block.parameters()}
    if model is None or {id(p) for p in model.parameters()} != weights or not all(map(has_data, model.parameters())):
        return  # blocks of several models, or a prediction
    found = []
    for modules in ([model], chain):
        with unwatched(), torch.no_grad(), generators_restored(x.device):
            h = x.detach().clone()
            with state_restored(model):
                for module in modules:
                    h = module(h)
            found.append(h.cpu().double())
    wanted, out = found
    if wanted.shape != out.shape or (out - wanted).norm() > 0.01 * wanted.norm():
        raise ValueError(
            f"the blocks of {type(model).__name__} put out something else than the model does: its code asks something "
            "of x that tracing has not seen (such as `x.dtype is ...`); pass a list of modules"
        )


def rehearse(
    chain: Sequence[nn.Module],
    x: Tensor,
    loss: Callable[[Tensor], object],
    loss_fn: object,
    teaches_blocks: bool,
    check_graph: Callable[[Tensor], object] | None,
    store: Store = IN_MEMORY,
) -> list[tuple[int, ...]]:
    """Run the blocks on a copy of x (N, ...), and the loss on their output; restore what that changes.

    Return the shapes of the blocks' outputs.

    `loss` is called with the logits, and calls `loss_fn`. `teaches_blocks`: whether the rule teaches each block on its
    own. `check_graph` is called with each block's output; without it the gradients of a block are formed and dropped.
    Raises TypeError, ValueError or RuntimeError that names the block, its input, and what is wrong.
    """
    made = _Made()
    with unwatched(), made, ExitStack() as stack:
        stack.enter_context(generators_restored(x.device))
        h, shapes = x.detach().clone(), []
        for i, block in enumerate(chain):
            with store.block(i), ExitStack() as here:
                made.used.clear()  # of what brought the block in
                (here if store.offloads else stack).enter_context(buffers_restored(block))
                stack.enter_context(attributes_restored(block))  # which the loss may read
                h = _run(i, block, h, teaches_blocks, check_graph, made.used)
            shapes.append(tuple(h.shape))
        if teaches_blocks:
            check_lengths(chain, [shape[0] if shape else 0 for shape in shapes])
        made.watch_reads(h)
        if isinstance(loss_fn, nn.Module):
            stack.enter_context(state_restored(loss_fn))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Using a target size")  # torch would spread y over the logits
                loss(h)
        except (ValueError, RuntimeError):
            if not made.read:
                raise
        made.watching = False  # what follows restores state
    if made.read:
        raise ValueError(
            f"the loss reads a tensor of shape {made.read[0]} that the forward pass made: a gradient comes from the "
            "logits alone; make it part of them"
        )
    return shapes


def _run(i: int, block: nn.Module, h: Tensor, teaches_blocks: bool, check_graph: Any, used: Set[int]) -> Tensor:
    """Return block i's output on h, checked. `used` gets the storages that it reads."""
    try:
        gradient = block_gradient(block, h) if teaches_blocks else None
        if gradient is not None and not isinstance(gradient, ByAutograd):
            return gradient.output()
        before = []
        if gradient is None and i > 0 and h.is_floating_point():  # the block before it has a graph
            before.append(h.requires_grad_())
            h = h.clone()
        graph = run_block(block, h) if gradient is None else gradient.forward_with_graph()
        weights = [p for p in block.parameters() if p.requires_grad and storage_id(p) in used]
        if teaches_blocks:
            _check_taught(graph, weights)
        if check_graph is not None:
            check_graph(graph)
        elif graph.requires_grad and (weights or before):
            try:
                torch.autograd.grad(graph, [*weights, *before], torch.zeros_like(graph), allow_unused=True)
            except RuntimeError as problem:
                if teaches_blocks or "use_reentrant" not in str(problem):  # which takes no part in autograd.grad
                    raise
        return graph.detach()
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        if isinstance(problem, torch.OutOfMemoryError) or type(problem).__module__.startswith("memdfa_lab"):
            raise  # not this block's fault: memory ran out, or another rank failed
        kind = next(kind for kind in (TypeError, ValueError, IndexError, RuntimeError) if isinstance(problem, kind))
        dtype = next((parameter.dtype for parameter in block.parameters()), h.dtype)
        about_types = i == 0 and dtype != h.dtype and "type" in str(problem)
        hint = f" (its weights are {dtype}: x must be so too)" if about_types else ""
        raise kind(
            f"block {i}, {describe(block)}, does not take a batch of shape {tuple(h.shape)} and {h.dtype}{hint}; "
            f"no weight was changed: {' '.join(str(problem).split())}"
        ) from problem


def _check_taught(graph: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise TypeError or RuntimeError if no signal can teach these weights at this output of their block."""
    if not graph.is_floating_point() or not graph.dim():
        raise TypeError(f"it puts out {tuple(graph.shape)} {graph.dtype}, which takes no signal: use (N, ...) floats")
    if weights and not graph.requires_grad:  # a block that does not use its weights is not taught in this step
        raise RuntimeError(
            "it puts out a tensor without a graph, so that it would never learn: set use_reentrant=False in its "
            "checkpoint, or leave torch.no_grad out"
        )


def rows(h: Tensor) -> int:
    """Return the length of dimension 0; 0 if there is none."""
    return len(h) if h.dim() else 0


def check_lengths(chain: Sequence[nn.Module], lengths: Sequence[int]) -> None:
    """Raise ValueError if the outputs of the blocks, which have these lengths, are not all as long as e."""
    if len(set(lengths)) > 1:
        i = next(i for i in range(1, len(chain)) if lengths[i] != lengths[i - 1])
        raise ValueError(
            f"block {i}, {describe(chain[i])}, makes {lengths[i]} rows of {lengths[i - 1]}: a block's signal has e's "
            f"rows, {lengths[-1]}, so join or split examples in the first block or in the loss; no weight was changed"
        )


def two_sums(logits: Tensor) -> tuple[float, float]:
    """Return the sum and the norm of the logits: enough to notice a difference later, without keeping the logits."""
    return logits.sum().item(), torch.linalg.vector_norm(logits).item()


def warn_if_other(sums: tuple[float, float], logits: Tensor) -> bool:
    """Warn, and return True, if the sums of the second pass's logits differ from the first's by more than rounding."""
    total, norm = two_sums(logits)
    near = max(1e-5, 8 * torch.finfo(logits.dtype).eps) * max(norm, sums[1])
    other = abs(norm - sums[1]) > near or abs(total - sums[0]) > near * logits.numel() ** 0.5
    if other:
        warnings.warn(
            f"the second forward pass gave other logits than the first (norm {norm:.6g}, before {sums[1]:.6g}), so the "
            "updates are not DFA's: ml.check(rule, x, y) says which block differs; DFA, and MemDFA with "
            "keep_bytes=math.inf, run each block once",
            stacklevel=3,
        )
    return other


class _Made(Watcher):
    """Note which tensors operations make and, from `watch_reads` on, which of these except the logits are read."""

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}  # weak references to storages, by storage_id
        self.used: set[int] = set()  # what operations have been given, by storage_id
        self.read: list[tuple[int, ...]] = []  # shapes
        self.watching = False

    def watch_reads(self, logits: Tensor) -> None:
        self.alive = {key: made for key, made in self.alive.items() if made() is not None}
        self.alive.pop(storage_id(logits), None)
        self.watching = True

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        given = tensors_in((args, kwargs))
        self.used.update(map(storage_id, given))
        if self.watching:
            self.read += [tuple(tensor.shape) for tensor in given if storage_id(tensor) in self.alive]
        out = operation(*args, **kwargs)
        if not self.watching:
            for tensor in tensors_in(out):
                if storage_id(tensor) not in map(storage_id, given):
                    self.alive[storage_id(tensor)] = weakref.ref(tensor.untyped_storage())
        return out


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an operation's arguments, or in what it returns."""
    if isinstance(value, Tensor):  # with another layout it has several storages, each a tensor of its own
        return [value] if value.layout is torch.strided else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
