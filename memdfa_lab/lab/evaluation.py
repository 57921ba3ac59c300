"""A network's output in evaluation mode, its accuracy, and other metrics."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab.datasets import as_input, as_target
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.examples import Pair
from memdfa_lab.lab.tasks import Task, described


def predict(model: Rule | nn.Module, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the network's output (N, C) for x (N, ...), in eval mode and in batches; the mode is restored.

    Raises TypeError if x is not a tensor, ValueError for a batch size below 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, ...), not a {type(x).__name__}: use torch.as_tensor")
    check_int("batch_size", batch_size)
    blocks = model.blocks if isinstance(model, Rule) else model
    like = next(blocks.parameters(), x)
    parts = -(-len(x) // batch_size) or 1  # of nearly equal length: BatchNorm may not take a single example
    modes = [(module, module.training) for module in blocks.modules()]
    blocks.eval()
    torch.clear_autocast_cache()  # inside torch.autocast, it may have casts of older weights
    try:
        precision = model.autocast() if isinstance(model, Rule) else nullcontext()
        with torch.no_grad(), precision:  # x is copied, since the first module may work in place
            return torch.cat([_output(model, as_input(batch.clone(), like)) for batch in x.tensor_split(parts)])
    finally:
        for module, training in modes:
            module.training = training


def _output(model: Rule | nn.Module, h: Tensor) -> Tensor:
    if not isinstance(model, Rule) or not model.store.offloads:
        output: Tensor = (model.blocks if isinstance(model, Rule) else model)(h)
        return output
    for i, block in enumerate(model.chain):
        with model.store.block(i):
            h = block(h)
    return h


def accuracy(model: Rule | nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the fraction of the examples x (N, ...) whose largest output, of (N, C), is the label y (N,).

    A label of -100 does not count. Raises ValueError if there is no example or not one label for each, if the outputs
    are not scores of two classes or more, or if labels are not from 0 to C - 1.
    """
    if not isinstance(y, Tensor) or y.shape != (len(x),) or not len(x):
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"y must be a tensor of {len(x)} labels, one or more, one for each example; got {given}")
    output, task = predict(model, x, batch_size), Task("classification")
    task.check(output, y)
    return task.right(output.cpu(), y.cpu()).float().mean().item()


class Average:
    """A metric that is a mean; `of` returns a value for each example or label, (M,), from outputs and y."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor], higher_is_better: bool | None):
        self.of, self.higher_is_better = of, higher_is_better
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)  # the sum of the values, and their number

    def update(self, output: Tensor, y: Tensor) -> None:
        values = self.of(output, y).double()
        self.sums += torch.stack([values.sum(), torch.ones_like(values).sum()])

    def compute(self) -> float:
        return (self.sums[0] / self.sums[1]).item()


def _of_each(function: Callable[[Tensor, Tensor], Any], output: Tensor, y: Tensor) -> Tensor:
    return torch.tensor(float(function(output, y)), dtype=torch.float64).expand(len(output))


def metrics_of(task: Task | None, given: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return accuracy, if the task has labels, and the metrics that are given to `fit`, on `size` ranks.

    Raises TypeError for anything but a metric, ValueError for a metric object on several ranks, which sees only a part.
    """
    found: dict[str, Any] = {"accuracy": Average(task.right, True)} if task is not None and task.has_labels else {}
    for name, metric in given.items():
        made = callable(metric) or hasattr(metric, "update")
        if not isinstance(name, str) or not made or isinstance(metric, type):
            raise TypeError(
                "metrics must be a dict of objects with update, compute and reset, such as torchmetrics.AUROC(...), "
                f"and functions of outputs and y, by name; got {name!r}: {metric!r}"
            )
        if hasattr(metric, "update") and size > 1:
            raise ValueError(
                f"metrics[{name!r}] would see one rank's part of the data: give a function of outputs and y, whose "
                "mean is over all ranks, or evaluate in on_epoch"
            )
        better = getattr(metric, "higher_is_better", False if name == "loss" else None)
        found[name] = metric if hasattr(metric, "update") else Average(partial(_of_each, metric), better)
    return found


def _update(metric: Any, task: Task | None, output: Tensor, y: Tensor) -> None:
    """Pass outputs (n, ...) and y to a metric: to a function as to the loss, to an object as in torchmetrics."""
    y = as_target(y, output)
    if task is not None and not isinstance(metric, Average):
        output = output.movedim(task.class_dim, 1) if task.of_classes else output
        y = y.long() if task.has_labels else y
    metric.update(output, y)


def try_out(metrics: Mapping[str, Any], task: Task | None, output: Tensor, y: Tensor) -> None:
    """Raise ValueError for a metric that does not take outputs (n, ...) and y (n, ...), or returns no number."""
    for name, metric in metrics.items():
        try:
            if task is not None and not task.has_labels and ".classification" in type(metric).__module__:
                raise TypeError("it is a metric of classification")  # torchmetrics takes floats for labels
            with warnings.catch_warnings(action="ignore"):  # so few examples may all be of one class
                metric.reset()
                _update(metric, task, output, y)
                float(metric.compute())
                metric.reset()
        except Exception as problem:
            why = " ".join(f"{type(problem).__name__}: {problem}".split())
            raise ValueError(
                f"metrics[{name!r}] does not fit outputs {tuple(output.shape)} and y {described(y)} ({why}): give one "
                f"that does{f' for {task.name}' if task else ''} and returns one number"
            ) from problem


def evaluate(
    rule: Rule, metrics: Mapping[str, Any], task: Task | None, group: Group, batches: Iterable[Pair]
) -> dict[str, float]:
    """Return each metric over these examples, rounded to float32; NaN without examples.

    Each rank evaluates a part of the examples.
    """
    seen = False
    for metric in metrics.values():
        metric.reset()
    for x, y in batches if metrics else ():
        seen = seen or len(x) > 0
        x, y = (tensor.tensor_split(group.size)[group.rank] for tensor in (x, y))
        output = predict(rule, x).cpu() if len(x) else x
        for metric in metrics.values() if len(x) else ():
            _update(metric, task, output, y)
    if group.size > 1:
        for metric in metrics.values():
            metric.sums = group.total(metric.sums, "a metric")
    values = [float(metric.compute()) if seen else math.nan for metric in metrics.values()]
    return dict(zip(metrics, torch.tensor(values, dtype=torch.float32).tolist(), strict=True))


def confusion(y: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Return how often each class (rows) was predicted as each class (columns), shape (classes, classes).

    Raises ValueError if y and predicted differ in shape, or are not whole numbers from 0 to classes - 1.
    """
    check_int("classes", classes)
    both = [z.cpu().long() for z in (y, predicted) if not z.is_floating_point()]  # a byte would not hold their pairs
    good = len(both) == 2 and y.shape == predicted.shape
    if not good or any(z.numel() and not 0 <= z.min() <= z.max() < classes for z in both):
        given = f"shapes {tuple(y.shape)} and {tuple(predicted.shape)}, {y.dtype} and {predicted.dtype}"
        raise ValueError(f"y and predicted must be equally many labels from 0 to {classes - 1}; got {given}")
    pairs = both[0] * classes + both[1]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
