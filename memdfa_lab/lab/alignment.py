"""Angles between a rule's updates and BP's gradient: below 90 degrees, a small enough step lowers the loss.

For a block, let g be BP's gradient and d the rule's own gradient, each one vector of all its weights. Then

    cos(angle) = <d, g> / (|d| |g|),        loss(W - lr d) = loss(W) - lr <d, g> + O(lr^2).

FA and DFA start near 90 degrees, as any two random directions in many dimensions. The angle falls as the network
learns, since the weights above come to agree with B (Lillicrap et al. 2016; Nøkland 2016).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import pandas as pd
import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import run_block
from memdfa_lab.core.checks import check_batch, check_int, check_type, lookup
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.one_pass import OnePass
from memdfa_lab.core.precision import first_pass
from memdfa_lab.core.recompute import buffers_restored, forward_without_trace, generators_restored
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.lab.ahead import look_ahead
from memdfa_lab.lab.datasets import Data, as_input, check_data
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.examples import examples_of

T = TypeVar("T")
RULE = "a rule, such as ml.MemDFA(model, optimizer)"
Step = Callable[..., Tensor]  # a rule's step as a function of rule, x and y
Directions = list[list[Tensor]]  # per block: tensors that form one vector; empty if it is not trained


def angles(rule: Rule, x: Tensor, y: Tensor, of: str = "gradient") -> list[float]:
    """Return the angle between the rule and BP on one batch, x (N, ...) and y, in degrees (0 to 180), one per block.

    `of`: "gradient" compares gradients of all parameters that a block trains, before clipping and the optimizer;
    "signal" compares signals at the block's output, over all examples (the angle of Lillicrap et al. 2016). NaN where
    there is no direction: for a block that trains nothing, or a gradient of zeros. The network runs in its present mode
    (training or evaluation). The rule does not change, with its weights, buffers, gradients, optimizer state and
    feedback; nor do torch's generators.

    Raises TypeError if `rule` is no rule, ValueError for another `of`, and what `rule.step` raises.
    """
    check_type("rule", rule, Rule, RULE)
    check_batch(x)
    directions = lookup("angle of", of, {"gradient": _gradients, "signal": _signals})
    ours, exact = (directions(step, rule, x, y) for step in (type(rule).step, BP.step))
    return [_angle(one, other) for one, other in zip(ours, exact, strict=True)]


def error_angle(rule: Rule, x: Tensor, y: Tensor) -> float:
    """Return the angle between the e of a rule's `pass1` and that of an exact pass, in degrees (0 to 180).

    The batch is x (N, ...) and y; e of all examples is one vector. The network runs in its present mode, and the rule
    is left as it is. Without `pass1` the angle is 0. Raises TypeError if `rule` is no rule, and what `rule.step` raises
    for a batch.
    """
    check_type("rule", rule, Rule, RULE)
    check_batch(x)
    with rule.autocast():
        ways = first_pass(rule.pass1, x), None
        passes = [forward_without_trace(rule.chain, x, narrow=narrow, store=rule.store) for narrow in ways]
    return _angle(*([rule.error_of(logits.float(), y)] for logits in passes))


def feedback_angles(rule: Rule, x: Tensor) -> list[float]:
    """Return the angle between B_i and the matrix that it replaces, in degrees (0 to 180), one per block.

    That matrix is dlogits/dh_i, the Jacobian of the logits with respect to the block's output, averaged over x
    (N, ...). A B_i that learns comes to agree with it. NaN for the last block, and where B_i is not dense. The rule is
    left as it is. Raises TypeError if `rule` is no rule, RuntimeError if its network rests in a store.
    """
    check_type("rule", rule, Rule, RULE)
    check_batch(x)
    outputs = [x]
    feedback = _fixed(rule.feedback).reusable()
    with torch.enable_grad(), generators_restored(x.device), buffers_restored(rule.blocks):
        for block in rule.blocks:
            outputs.append(run_block(block, outputs[-1]))
            if outputs[-1].is_floating_point() and not outputs[-1].requires_grad:
                outputs[-1].requires_grad_()
        *hidden, logits = outputs[1:]
        rows = [torch.autograd.grad(each.sum(), hidden, retain_graph=True) for each in logits.flatten(1).unbind(1)]
    found = []
    for i, (h, slopes) in enumerate(zip(hidden, zip(*rows, strict=True), strict=True)):
        exact = torch.stack([slope.mean(0).flatten() for slope in slopes])
        (shape,) = feedback.matrix_shapes(logits.shape, h.shape)
        dense = shape == tuple(exact.shape)
        found.append(_angle([feedback.dense(i, *shape, exact)], [exact]) if dense else float("nan"))
    return [*found, float("nan")]


def follow(
    rule: Rule,
    data: Data,
    at: Iterable[int],
    batch_size: int = 100,
    *,
    probe: int = 500,
    seed: int = 0,
    drop_last: bool = False,
    before_step: Callable[[Rule, int], object] | None = None,
) -> pd.DataFrame:
    """Train as `ml.fit` does, and return the angles after each number of steps in `at`, 0 being the start.

    The angles are those on the first `probe` training images. `before_step(rule, step)` may change something, such as
    B, before each step, from 0 on. Columns: step, block (from 1 on), gradient_deg, signal_deg. Before the first step,
    raises TypeError for a rule, data or function of another type, and ValueError for numbers below 1 (`at`, `seed`:
    below 0) and an empty `at`; later what `rule.step` raises.
    """
    check_type("rule", rule, Rule, RULE)
    check_data("follow", data)
    check_type("at", at, Iterable, "a list of numbers of steps, such as [0, 100]")
    at = {check_int("a number of steps in at", step, 0) for step in at}
    if not at:
        raise ValueError("at is empty: give the numbers of steps after which to measure angles, such as [0, 100]")
    batch_size, probe = check_int("batch_size", batch_size), check_int("probe", probe)
    seed = check_int("seed", seed, 0, LARGEST_SEED)
    if before_step is not None:
        check_type("before_step", before_step, Callable, "a function of the rule and the step")
    rule.blocks.train()
    whole = len(data.x_train) // batch_size  # full batches
    look_ahead(
        rule,
        examples_of(data, batch_size, seed, drop_last or max(at) <= whole),
        examples_of(data, part="test"),
        Group(),
    )
    like = next(rule.blocks.parameters())
    x, y = as_input(data.x_train[:probe], like), data.y_train[:probe].to(like.device)
    rows: list[tuple[int, int, float, float]] = []
    for step, batch in zip(range(max(at) + 1), data.batches(batch_size, seed, like, drop_last), strict=False):
        if step in at:
            pairs = zip(angles(rule, x, y), angles(rule, x, y, "signal"), strict=True)
            rows += [(step, block, *pair) for block, pair in enumerate(pairs, 1)]
        if step < max(at):
            if before_step is not None:
                before_step(rule, step)
            rule.step(*batch)
    return pd.DataFrame(rows, columns=["step", "block", "gradient_deg", "signal_deg"])


def _gradients(step: Step, rule: Rule, x: Tensor, y: Tensor) -> Directions:
    with _untouched(rule, x) as twin:
        step(twin, x, y)
        return [_gradient_of(block) for block in rule.parameters]


def _gradient_of(block: list[nn.Parameter]) -> list[Tensor]:
    if all(parameter.grad is None for parameter in block):
        return []
    # A gradient is None if the parameter was not used, and sparse for nn.Embedding(sparse=True).
    return [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in block]


def _signals(step: Step, rule: Rule, x: Tensor, y: Tensor) -> Directions:
    signals: dict[int, Tensor] = {}

    def note(i: int, block: nn.Module, inputs: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(partial(signals.__setitem__, i))

    with _untouched(rule, x) as twin:
        hooks = [block.register_forward_hook(partial(note, i)) for i, block in enumerate(rule.chain)]
        try:
            step(twin, x, y)
        finally:
            for hook in hooks:
                hook.remove()
    return [[signals[i]] if i in signals and block else [] for i, block in enumerate(rule.parameters)]


@contextmanager
def _untouched(rule: Rule, x: Tensor) -> Iterator[Rule]:
    """Yield a copy of the rule whose step computes gradients and changes no weight; restore all else at the end."""
    rule.follow_model()
    twin = _apart(rule)  # the same network
    twin.optimizers, twin.loss_optimizer = [None for _ in rule.optimizers], None
    twin.feedback = _fixed(rule.feedback)
    gradients = [(p, p.grad) for p in rule.blocks.parameters()]
    with torch.enable_grad(), generators_restored(x.device), buffers_restored(rule.blocks):
        try:
            yield twin
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient


def _fixed(feedback: Feedback) -> Any:
    """Return a copy with the same matrices, which do not learn."""
    twin: Any = _apart(feedback)
    twin.learns = False
    return twin


def _apart(thing: T) -> T:
    """Return a shallow copy with dictionaries of its own (drawn matrices, counted sizes)."""
    twin = copy.copy(thing)
    vars(twin).update({name: dict(value) for name, value in vars(twin).items() if isinstance(value, dict)})
    return twin


def _angle(one: list[Tensor], other: list[Tensor]) -> float:
    # 2 atan2(|u - v|, |u + v|) for unit vectors u and v is Kahan's formula: an arc cosine would lose small angles.
    if not one or not other:
        return float("nan")
    u, v = (torch.cat([part.flatten().double() for part in parts]) for parts in (one, other))
    u, v = u / u.norm(), v / v.norm()
    return torch.rad2deg(2 * torch.atan2((u - v).norm(), (u + v).norm())).item()


def responses(rule: Rule, x: Tensor, y: Tensor) -> list[float]:
    """Return the angle between a block's desired and actual change of output, in degrees (0 to 90), one per block.

    The desired change is -s, with s the block's signal under DFA and MEM-DFA (e for the last block). A small step of
    plain SGD changes the output, over all examples of the batch x (N, ...), by -lr J J^T s, where J is the Jacobian of
    the output with respect to the weights. Few weights with many outputs cannot make every desired change. NaN for a
    block that trains nothing. The rule is left as it is. Raises TypeError if `rule` is no rule, ValueError for
    LocalReadout and DRTP, whose blocks have other signals, and what `rule.step` raises for a batch.
    """
    check_type("rule", rule, Rule, RULE)
    if isinstance(rule, OnePass):
        raise ValueError(f"responses are to DFA's signals, and {type(rule).__name__} has others: give a MemDFA rule")
    check_batch(x)
    found, h = [], x
    with torch.enable_grad(), generators_restored(x.device), buffers_restored(rule.blocks):
        twin = _apart(rule)
        twin.feedback, twin.loss_optimizer = _fixed(rule.feedback), None
        _, e = twin.error(forward_without_trace(rule.chain, x), y)
        for i, (block, weights) in enumerate(zip(rule.blocks, rule.parameters, strict=True)):
            out = run_block(block, h)
            signal, u = twin.signal(i, e).shaped_like(out.detach()), torch.zeros_like(out, requires_grad=True)
            if weights:
                step = torch.autograd.grad(out, weights, signal, retain_graph=True)
                pulled = torch.autograd.grad(out, weights, u, create_graph=True)  # J^T u, a linear function of u
                (moved,) = torch.autograd.grad(pulled, u, step)
                found.append(_angle([signal], [moved]))
            else:
                found.append(float("nan"))
            h = out.detach()
    return found
