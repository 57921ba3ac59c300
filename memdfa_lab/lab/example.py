"""A rule on a network with random data, to measure a step whose results do not matter."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.devices import CPU, check_device
from memdfa_lab.core.feedback import KINDS, Feedback, Learned
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import find_rule
from memdfa_lab.lab import models
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.settings import OPTIMIZERS

LEARNED_LR = 0.01  # of a B that learns; neither time nor memory depends on it
FEEDBACK: dict[str, Any] = {**KINDS, "learned": partial(Learned, lr=LEARNED_LR)}


def example_step(
    rule: str,
    network: str | Sequence[int],
    batch_size: int,
    optimizer: Any = "sgd",
    feedback: str | Feedback = "regenerated",
    seed: int = 0,
    layout: torch.memory_format = torch.contiguous_format,
    device: str = CPU,
    **options: Any,
) -> tuple[Rule, Tensor, Tensor]:
    """Return a rule on a network with its own loss, random x (N, C, H, W) or (N, n), and labels y (N,).

    `network`: a name of `ml.models`, or the widths of a ReLU MLP, [784, 800, 10]. `optimizer`: one of OPTIMIZERS, with
    a learning rate too small to matter, or as a rule takes it. `seed`: that of feedback and data. `layout`: the memory
    layout of images and filters. `options` go to the rule. Raises ValueError for unknown names, numbers below 1, and
    a device that is not there.
    """
    check_int("the batch size", batch_size)
    check_device(device)
    shape: Sequence[int]
    if isinstance(network, str):
        setting, shape = models.get(network), models.input_shape(network)
        net, loss, classes = models.build(network), setting.loss, 0 if setting.function else 10
    else:
        net, loss, classes = models.mlp(network[0], list(network[1:-1]), network[-1]), "cross_entropy", network[-1]
        shape = network[:1]
    named = isinstance(optimizer, str)
    factory = partial(lookup("optimizer", optimizer, OPTIMIZERS), lr=1e-6) if named else optimizer
    B = named_feedback(feedback, seed)
    learner = find_rule(rule)(net.to(device).to(memory_format=layout), factory, LOSSES[loss], B, **options)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, *shape, generator=generator).to(device, memory_format=layout)
    classes = classes or forward_without_trace(learner.chain, x[:2]).shape[1]
    return learner, x, torch.randint(classes, (batch_size,), generator=generator).to(device)


def named_feedback(feedback: str | Feedback, seed: int = 0) -> Feedback:
    """Return feedback with this seed, by the name of its kind; a Feedback object is returned as it is."""
    return feedback if isinstance(feedback, Feedback) else lookup("feedback", feedback, FEEDBACK)(seed)


def kind_for(rule: str, kind: str) -> str:
    """Return the kind of feedback for a rule: in place of a B that learns, a rule that cannot teach B has a stored one.

    A B that learns begins as a stored one.
    """
    return "stored" if kind == "learned" and not find_rule(rule).teaches_feedback else kind
