"""Checks before the first step of a training run: its task, sizes of batches, labels and metrics."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.datasets import as_input
from memdfa_lab.lab.distributed import Group, RankLost
from memdfa_lab.lab.evaluation import metrics_of, try_out
from memdfa_lab.lab.examples import Examples
from memdfa_lab.lab.tasks import Task, task_of

TRIED_ON = 100  # examples on which metrics are tried


def look_ahead(
    rule: Rule,
    train: Examples,
    test: Examples | None,
    group: Group,
    task_name: str | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> tuple[Task | None, dict[str, Any]]:
    """Return the task, found from the loss and labels or by name, and the metrics: accuracy and the given ones.

    The task is None if the loss is unknown.

    The network runs on the smallest part of a batch that a rank of the group gets; this changes nothing. Raises
    ValueError if the network takes the largest part but not the smallest (BatchNorm does not take a single example), if
    outputs and labels do not fit the task, if a metric does not take them, or if the test data differs in kind from the
    training data. A batch that the network refuses at any size is reported by the first step.
    """
    x, y = train.known()
    kind = (x.dtype, x.shape[1:])
    first, last = train.sizes
    least, most = max(1, last // group.size), -(-first // group.size)
    group.part(torch.arange(last))  # sets whether this rank is idle in the last batch
    output = output_of(rule, x[:least])
    if isinstance(output, Exception):
        group.part(torch.arange(first))
        if least < most and isinstance(output_of(rule, x[:most]), Tensor):
            raise ValueError(_too_short(len(train), first, last, group.size, output)) from output
        return None, metrics_of(None, metrics or {}, group.size)
    x_test, y_test = (x[:0], y[:0]) if test is None else test.known()
    task = task_of(rule.loss_fn, output, y, task_name)
    if task is not None:
        task.check(output, y)
        if len(y_test):
            task.check(output, y_test, "y_test")
    refused = output_of(rule, x_test[:2]) if len(x_test) and (x_test.dtype, x_test.shape[1:]) != kind else None
    if isinstance(refused, Exception):
        given = f"{tuple(x_test.shape)} {x_test.dtype}, where x_train is (N, {', '.join(map(str, kind[1]))}) {kind[0]}"
        raise ValueError(f"this network does not take x_test: it is {given}") from refused
    found = metrics_of(task, metrics or {}, group.size)
    outputs = output_of(rule, x[:TRIED_ON]) if metrics else None
    if isinstance(outputs, Tensor):
        try_out(found, task, outputs.cpu(), y[:TRIED_ON])  # as `evaluate` has them
    return task, found


def output_of(rule: Rule, x: Tensor) -> Tensor | Exception:
    """Return the network's output for x (n, ...), or what it raises."""
    like = next(rule.blocks.parameters())
    try:
        return forward_without_trace(rule.chain, as_input(x.clone(), like), store=rule.store)
    except RankLost:
        raise
    except (IndexError, RuntimeError, TypeError, ValueError) as problem:
        return problem


def _too_short(n: int, first: int, last: int, ranks: int, problem: Exception) -> str:
    """Return a message for a last batch, or a rank's part of it, that is too short, with batch sizes that work."""
    least = max(1, last // ranks)
    sizes = [k for k in range(2 * ranks, n + 1) if n % k == 0 or n % k // ranks > least]
    hints = [f"batch_size {min(sizes, key=lambda k: abs(k - first))}"] if sizes else []
    hints += ["drop_last=True"] if last < first and first // ranks > least else []
    part = "the last batch of an epoch" if ranks == 1 else "a rank's part of the last batch of an epoch"
    return (
        f"{part} would have {least} of the {n} training examples, a batch that this network refuses "
        f"({' '.join(str(problem).split())}): take {' or '.join(hints or ['more examples'])}"
    )
