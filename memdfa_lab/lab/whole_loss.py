"""The loss of a batch that several ranks share, and each rank's rows of e: the same as on one process, for any loss.

A loss that `losses.as_mean` knows follows from the parts. A rank whose examples weigh w of W together scales its e by
w / W, and the ranks exchange three numbers. Any other loss may not follow from the parts, even if it does so for
one batch: a later one may have an ignored label. Every rank then gathers the logits and y of all ranks, computes the
loss of the whole batch, and takes its own rows of e. Each rank thus sends its logits and y to every other rank, and
holds the whole batch's logits, y and e for a moment.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memdfa_lab.core.group import Compute
from memdfa_lab.lab.losses import as_mean

Group = Any  # lab.distributed.Group, which imports this module


def whole_error(
    group: Group, loss_fn: Callable[..., Tensor], compute: Compute, logits: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `Group.error` returns, for two ranks or more.

    Raises ValueError on every rank, before any weight changes, if ranks differ in a loss's settings or in what it gives
    for one batch, or if their logits or y cannot be concatenated.
    """
    mean, total, weight = as_mean(loss_fn), 0.0, math.nan
    if mean is not None and loss_fn is group.agreed:
        loss, e = compute(logits, y)
        weight = 0.0 if group.idle else mean.weight(y)
        if weight == 0:  # the mean over no label is NaN, and must not reach the sum over ranks
            loss, e = loss.new_zeros(()), (0 * logits).contiguous()
        total = weight * loss.item() + _bad(e)
    total, whole, asked = group.total([total, weight, group.asked], "the loss").tolist()
    group.stop = asked > 0
    if not math.isnan(whole):
        group.share = weight / whole if whole else math.nan
        return loss.new_tensor(total / whole if whole else math.nan), e.mul_(group.share)
    # At least one rank has a loss that is new, or not known as a mean: compare the losses of all ranks.
    settings = {"loss": "a function of the whole batch"} if mean is None else mean.settings
    exact = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in settings.items()}
    group.agree(**exact, logits=_form(logits, logits), y=_form(y, logits))
    group.agreed = loss_fn
    if mean is not None:
        return whole_error(group, loss_fn, compute, logits, y)
    return _gathered_error(group, compute, logits, y)


def _gathered_error(group: Group, compute: Compute, logits: Tensor, y: Any) -> tuple[Tensor, Tensor]:
    """Return the same from the logits and y of all ranks, whose forms agree."""
    if not _is_batch(y, logits):
        raise ValueError(
            f"several ranks gather y for this loss: it must be a tensor (n, ...) with a row per example, got "
            f"{_form(y, logits)} for logits {tuple(logits.shape)}; no weight was changed"
        )
    n = 0 if group.idle else len(logits)
    counts = [int(count) for count in _of_each(group, n, "the number of examples")]
    loss, e = compute(_rows(group, logits, counts), _rows(group, y, counts))
    losses = _of_each(group, loss.item() + _bad(e), "the loss")
    other = max(range(group.size), key=lambda rank: abs(losses[rank] - losses[0]))
    if math.isfinite(sum(losses)) and abs(losses[other] - losses[0]) > 1e-3 * abs(losses[0]) + 1e-6:
        raise ValueError(
            f"ranks differ in the loss of one batch: {losses[0]:g} on rank 0, {losses[other]:g} on rank {other}; no "
            "weight was changed: give all ranks one loss_fn, and let it draw no random numbers"
        )
    group.share = 1 / group.size
    mine = e.split(counts)[group.rank].clone() if n else torch.zeros_like(logits)
    return loss.new_tensor(sum(losses) / group.size), mine


def _bad(e: Tensor) -> float:
    """Return NaN if e is not finite, else 0: the sum over ranks then tells all ranks."""
    return 0 * e.sum().item()


def _is_batch(y: Any, logits: Tensor) -> bool:
    return isinstance(y, Tensor) and y.dim() > 0 and len(y) == len(logits)


def _form(y: Any, logits: Tensor) -> str:
    """Return what must be the same on all ranks, so that their rows can be concatenated."""
    if not isinstance(y, Tensor):
        return f"a {type(y).__name__}"
    rows = ("n",) if _is_batch(y, logits) else y.shape[:1]
    return f"{y.dtype} ({', '.join(map(str, (*rows, *y.shape[1:])))})"


def _of_each(group: Group, number: float, what: str) -> list[float]:
    """Return the numbers of all ranks."""
    found: list[float] = group.total([number * (rank == group.rank) for rank in range(group.size)], what).tolist()
    return found


def _rows(group: Group, mine: Tensor, counts: list[int]) -> Tensor:
    """Return the rows of all ranks, (N, ...), of which each has counts[rank]."""
    mine = mine.detach().contiguous()
    parts = [mine if rank == group.rank else mine.new_empty(n, *mine.shape[1:]) for rank, n in enumerate(counts) if n]
    senders = [rank for rank, n in enumerate(counts) if n]  # an idle rank has no rows to send
    for rank, part in zip(senders, parts, strict=True):
        group.call("the batch", dist.broadcast, part.view(-1).view(torch.uint8), rank)
    return torch.cat(parts)
