"""Projections of the weights after each step of their optimizer."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from memdfa_lab.core.checks import check_int, check_number


def standardised(
    optimizer: Callable[..., Optimizer], classes: int | None = None, length: float = math.sqrt(2)
) -> Callable[..., Optimizer]:
    """Return a factory of optimizers that, after each step, subtract the mean of each filter and set its length.

    A filter gives one output: it is a row of a dense layer's weight (out, in), or one slice of a convolution's
    (out, ...). The length is the norm of its weights; the default is that of He's initialisation, with which ReLU
    layers keep the size of their inputs. Four kinds of parameters do not change: vectors, such as biases; filters of
    one input; frozen weights; and layers with `classes` outputs, which are the last layer and the classifier of a
    readout. A readout's second layer, which gives the similarities, does change. An optimizer sees no layers: the
    weight of a transposed convolution, (in, out / groups, ...), is taken for one of `in` filters, which is wrong.

    ReLUs without BatchNorm have positive outputs only. Under DFA filters turn towards the mean of these outputs, which
    then grow from block to block and from step to step. A filter of mean zero does not see that mean. This is the
    weight standardisation of Qiao et al. 2019 as a projection: the layers do not change, and nothing is kept.

    Raises TypeError for an optimizer object in place of a factory, ValueError for classes below 1 and for a length that
    is not a positive number.
    """
    check_number("length", length, or_more=False)
    last = None if classes is None else check_int("classes", classes)
    return _after_steps(optimizer, partial(_standardise, length), last, f"standardised({classes=}, length={length:g})")


def projected(
    optimizer: Callable[..., Optimizer], project: Callable[[Tensor], Tensor], classes: int | None = None
) -> Callable[..., Optimizer]:
    """Return a factory of optimizers that, after each step, replace each weight by project(weight).

    The same parameters as in `standardised` do not change. `project`: a function of a weight (out, ...) that
    returns one of the same shape, such as `ml.neighbours.oni.ONI()`; a resumed run compares its repr. Raises TypeError
    if `project` is not a function, and what `standardised` raises.
    """
    if not callable(project):
        raise TypeError(f"project must be a function of a weight, such as ml.neighbours.oni.ONI(), not {project!r}")
    last = None if classes is None else check_int("classes", classes)
    return _after_steps(optimizer, project, last, f"projected({project!r}, {classes=})")


def _after_steps(
    optimizer: Callable[..., Optimizer], project: Callable[[Tensor], Tensor], last: int | None, name: str
) -> Callable[..., Optimizer]:
    if isinstance(optimizer, Optimizer) or not callable(optimizer):
        kind = type(optimizer).__name__
        raise TypeError(f"optimizer must make optimizers: pass partial(torch.optim.Adam, lr=0.001), not a {kind}")
    return partial(_make, optimizer, project, last, name)


def _make(
    optimizer: Callable[..., Optimizer],
    project: Callable[[Tensor], Tensor],
    last: int | None,
    name: str,
    /,
    *parameters: Any,
    **settings: Any,
) -> Optimizer:
    return _constrained(optimizer(*parameters, **settings), project, last, name)


def _constrained(optimizer: Optimizer, project: Callable[[Tensor], Tensor], last: int | None, name: str) -> Optimizer:
    made: Any = optimizer
    made.constraint = name  # by which a resumed run recognises it
    made.register_step_post_hook(lambda *_: _project(made, project, last))
    # Copies and pickles of torch's optimizers have no hooks: one that is restored gets it again.
    made.__reduce_ex__ = lambda _: (_restored, (type(made), made.__getstate__(), project, last, name))
    return optimizer


def _restored(kind: type[Optimizer], state: dict[str, Any], *constraint: Any) -> Optimizer:
    optimizer = kind.__new__(kind)
    optimizer.__setstate__(state)
    return _constrained(optimizer, *constraint)


@torch.no_grad()
def _project(optimizer: Optimizer, project: Callable[[Tensor], Tensor], last: int | None) -> None:
    weights: list[Tensor] = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        if weight.requires_grad and weight.dim() > 1 and weight[0].numel() > 1 and len(weight) != last:
            new = project(weight)
            if new is not weight:
                weight.copy_(new)


def _standardise(length: float, weight: Tensor) -> Tensor:
    inputs = tuple(range(1, weight.dim()))
    weight -= weight.mean(inputs, keepdim=True)
    weight *= length / torch.linalg.vector_norm(weight, dim=inputs, keepdim=True).clamp_min(1e-12)
    return weight
