"""Time and memory of rules side by side: in one process, in turns, as ratios to BP.

A machine's speed drifts, and others use it too; so each round gives every contender one step, in an order drawn anew,
and a ratio compares two steps of the same round. What is reported is the median over rounds, and the quartiles beside
it.
"""

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memdfa_lab.core import feedback
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import models
from memdfa_lab.memory import measure
from memdfa_lab.memory.predict import kept_bytes
from memdfa_lab.rivals import BASELINES

if TYPE_CHECKING:
    import pandas as pd

ALL = {**RULES, **BASELINES}
# network -> batch size; what `memdfa bench` runs if nothing else is asked for
NETWORKS = {
    "784-[800]x32-10": 128,
    "784-[256]x64-10": 2048,
    "784-[512]x32-10": 512,
    "mnist_conv": 100,
    "liao_cifar": 100,
    "vgg_16": 32,
}


@dataclass(frozen=True)
class Contender:
    """A rule with what it is set to: `options` go to the rule; `setting` says in a table what they mean."""

    rule: str
    feedback: str = "none"
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def contenders(rules: Sequence[str], kinds: Sequence[str]) -> list[Contender]:
    """Return BP and the rules, those that use feedback once with each kind. Raises ValueError for unknown names."""
    found = [Contender("bp")]
    for kind in kinds:
        lookup("feedback", kind, feedback.KINDS)
    for rule in dict.fromkeys(rules):
        lookup("rule", rule, ALL)
        uses_feedback = rule in RULES and rule != "bp"
        for kind in kinds if uses_feedback else ["none"]:
            found.append(Contender(rule, kind))
    return list(dict.fromkeys(found))


def frontier(network: str, batch_size: int, kind: str = "regenerated", points: int = 5) -> list[Contender]:
    """Return BP, MEM-DFA keeping from nothing to everything, and checkpointing with more and more segments."""
    blocks = models.build(network)
    check_int("batch size", batch_size)
    check_int("points", points, 2)
    x = torch.empty(batch_size, *models.get(network).input_shape, device="meta")
    everything = sum(kept_bytes(blocks, x))
    found = [Contender("bp")]
    for k in range(points):
        part = k / (points - 1)
        options = {"keep_bytes": math.inf if k == points - 1 else int(part * everything)}
        found.append(Contender("memdfa", kind, f"keeps {part:.0%}", options))
    root = round(math.sqrt(len(blocks)))
    for segments in sorted({min(2, len(blocks)), max(1, root // 2), root, min(2 * root, len(blocks)), len(blocks)}):
        for rule in ("checkpoint", "checkpoint_step_in_backward"):
            found.append(Contender(rule, "none", f"{segments} segments", {"segments": segments}))
    return found


def bench(
    network: str,
    batch_size: int,
    against: Sequence[Contender] = (),
    optimizer: Any = None,
    rounds: int = 9,
    warm_up: int = 2,
    seed: int = 0,
    channels_last: bool = False,
) -> "pd.DataFrame":
    """Return a row a contender: median step time and quartiles, its ratio to BP's round by round, the measured peak.

    The first row is BP's, always; then `against` (all rules and baselines, feedback regenerated, if not given).
    `optimizer` as a rule takes it, SGD with a rate too small to matter if not given. `channels_last` lays out images
    and filters of all of them so. torch's number of threads is left as it is. Raises ValueError for unknown names and
    sizes below 1.
    """
    import pandas as pd

    for name, value, least in (("batch size", batch_size, 1), ("rounds", rounds, 1), ("warm_up", warm_up, 0)):
        check_int(name, value, least)
    every = list(dict.fromkeys([Contender("bp"), *(against or contenders(list(ALL), ["regenerated"]))]))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (batch_size, *models.get(network).input_shape)
    make = optimizer or partial(torch.optim.SGD, lr=1e-6)

    order = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(memory_format=layout)
    y = torch.randint(10, (batch_size,), generator=generator)
    made = []
    for one in every:
        net = models.build(network).to(memory_format=layout)
        B = None if one.feedback == "none" else lookup("feedback", one.feedback, feedback.KINDS)(seed)
        made.append(lookup("rule", one.rule, ALL)(net, optimizer=make, feedback=B, **one.options))
    seconds: list[list[float]] = [[] for _ in every]
    gc.collect()
    gc.freeze()  # what is here stays: the collections between steps need not look at it again
    try:
        for turn in range(warm_up + rounds):
            for k in order.permutation(len(every)):
                gc.collect()  # not in the middle of somebody's step
                started = time.perf_counter()
                made[k].step(x, y)
                if turn >= warm_up:
                    seconds[k].append(time.perf_counter() - started)
    finally:
        gc.unfreeze()

    rows = []
    for one, rule, taken in zip(every, made, seconds, strict=True):
        low, median, high = np.quantile(taken, (0.25, 0.5, 0.75))
        ratio_low, ratio, ratio_high = np.quantile(np.divide(taken, seconds[0]), (0.25, 0.5, 0.75))
        rows.append(
            {
                "network": network,
                "batch_size": batch_size,
                "rule": one.rule,
                "feedback": one.feedback,
                "setting": one.setting,
                "median_s": median,
                "low_s": low,
                "high_s": high,
                "us_a_block": 1e6 * median / len(rule.blocks),
                "ratio": ratio,
                "ratio_low": ratio_low,
                "ratio_high": ratio_high,
                "peak_bytes": measure(rule, x, y).peak_bytes,
            }
        )
    run = {"rounds": rounds, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return pd.DataFrame([{**row, **run, "channels_last": channels_last} for row in rows])
