"""What a loss depends on besides the logits: the weights of blocks, as in a penalty, and parameters of its own.

A loss is a sum of terms, each of the logits (and the loss's own parameters) or of one block's weights. The gradient of
a term with respect to a block's weights is formed when the block is updated, so that one such gradient is in memory at
a time. This is correct because the term depends on no other block, whose weights may have changed by then.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_finite, scalar_loss
from memdfa_lab.core.compat import saved_by
from memdfa_lab.core.phases import label
from memdfa_lab.core.watcher import has_data

LOGITS, OWN = -1, -2  # what a term may depend on, besides the number of a block


def loss_and_error(
    loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any, owners: Callable[[], Mapping[int, int]]
) -> tuple[Tensor, Tensor, "Terms | None"]:
    """Return the loss, 0-d, e = dloss/dlogits of the logits' shape (N, C), and the loss's other terms if it has any.

    owners() returns the block of each parameter, by its id. Raises ValueError for a loss that does not depend on the
    logits.
    """
    logits = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = scalar_loss(loss_fn, logits, y)
    terms = Terms.of(loss, logits, owners)
    (e,) = torch.autograd.grad(loss, logits, retain_graph=terms is not None, allow_unused=True)
    if e is None:
        raise ValueError("the loss does not depend on the logits, so that the network would learn nothing from it")
    # contiguous: the gradient of a sum is one expanded number, which cannot be changed in place
    return loss.detach(), e.contiguous(), terms


def warn_if_linear(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any) -> None:
    """Warn if e = dloss/dlogits is the same for any logits (N, C), as in a negative log-likelihood of the outputs."""
    if has_data(logits) and _is_linear(loss_fn, logits, y):
        warnings.warn(
            "the gradient of the loss does not depend on what the network puts out, so that blocks below the last "
            "learn nothing from its errors: if it ends in LogSoftmax, for F.nll_loss, leave that out and use "
            "F.cross_entropy",
            stacklevel=8,  # the call of step
        )


def _is_linear(loss_fn: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Any) -> bool:
    """Tell whether e is the same here and at a great distance, where also the slope of an L1 loss turns."""
    far = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits) * (torch.finfo(logits.dtype).max / 4)
    found: list[Tensor] = []
    for at in (logits.detach(), far):
        at.requires_grad_()
        try:
            found += torch.autograd.grad(scalar_loss(loss_fn, at, y), at)
        except Exception:  # it takes no such logits: BCE takes probabilities alone, others assert that all is finite
            return False
    return torch.equal(*found)


class Terms:
    """What one loss, 0-d, depends on besides the logits. `owner`: the block of each parameter, by its id.

    Raises ValueError for a term that joins several blocks, or a block and the logits, and for a leaf that belongs to
    neither the network nor the loss: no optimizer would change it.
    """

    def __init__(self, loss: Tensor, logits: Tensor, owner: Mapping[int, int]):
        self.loss = loss
        self.leaves: dict[int, list[Tensor]] = {}  # by the block's number, or OWN
        needs: dict[Any, frozenset[int]] = {}  # what each node of the graph depends on
        for node in leaves_first(loss.grad_fn):
            leaf = leaf_of(node)
            if leaf is not None:
                whose = LOGITS if leaf is logits else owner.get(id(leaf))
                if whose is None:
                    raise ValueError(
                        f"the loss depends on a tensor of shape {tuple(leaf.shape)} that learns and is neither the "
                        "network's nor the loss's own: make the loss an nn.Module that has it as a parameter"
                    )
                needs[node] = frozenset([whose])
                if whose != LOGITS:
                    self.leaves.setdefault(whose, []).append(leaf)
                continue
            needs[node] = frozenset().union(*(needs[child] for child, _ in node.next_functions if child is not None))
            joins_blocks = len(needs[node]) > 1 and not needs[node] <= {LOGITS, OWN}
            if joins_blocks and any(tensor.requires_grad for tensor in saved_by(node)):
                names = " and ".join(map(_name, sorted(needs[node])))
                raise ValueError(
                    f"one term of the loss depends on {names} ({type(node).__name__}): each block is updated on its "
                    "own, so make the loss a sum of terms, each of the logits or of one block's weights"
                )

    @classmethod
    def of(cls, loss: Tensor, logits: Tensor, owners: Callable[[], Mapping[int, int]]) -> "Terms | None":
        """Return what the loss depends on besides the logits; None if nothing. `owners` is called only if needed."""
        todo, met = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is not None and node not in met:
                met.add(node)
                leaf = leaf_of(node)
                if leaf is not None and leaf is not logits:
                    return cls(loss, logits, owners())
                todo += [child for child, _ in node.next_functions]
        return None

    def gradients(self, whose: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the weights of a block (or the loss's own), each with the gradient of its term."""
        weights = self.leaves.get(whose, ())
        if weights:
            yield from zip(weights, torch.autograd.grad(self.loss, weights, retain_graph=True), strict=True)

    def add(self, whose: int, share: float, once: bool = True) -> None:
        """Add these gradients, times `share`, to those in the weights; with `once`, the term is dropped afterwards."""
        for weight, gradient in self.gradients(whose):
            gradient = label("gradients", gradient if share == 1 else gradient * share)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        if once:
            self.leaves.pop(whose, None)

    def check(self) -> None:
        """Raise FloatingPointError if a gradient of a term is not finite."""
        for whose in self.leaves:
            check_finite("a penalty's gradient is not finite", *(gradient for _, gradient in self.gradients(whose)))


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf tensor that a node of autograd's graph gives its gradient to, or None."""
    leaf: Tensor | None = getattr(node, "variable", None)
    return leaf


def leaves_first(root: Any) -> Iterator[Any]:
    """Yield the nodes of a graph, each after its children."""
    todo, met = [(root, False)], set()
    while todo:
        node, children_done = todo.pop()
        if children_done:
            yield node
        elif node not in met:
            met.add(node)
            todo.append((node, True))
            todo += [(child, False) for child, _ in node.next_functions if child is not None]


def _name(whose: int) -> str:
    return {LOGITS: "the logits", OWN: "the loss's own parameters"}.get(whose, f"the weights of block {whose}")
