"""Time and memory of rules side by side: in one process, in turns, as ratios to BP.

A machine's speed drifts, and others use it too. So each round gives every contender one step, in an order drawn anew,
and a ratio compares two steps of the same round. The median over rounds is reported, with the quartiles.
"""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch

from memdfa_lab.core import feedback
from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.rules import ALL_RULES, RULES, find_rule
from memdfa_lab.lab import models
from memdfa_lab.lab.example import example_step
from memdfa_lab.memory import measure
from memdfa_lab.memory.predict import kept_bytes

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
    """A rule and how it is set: `options` go to the rule; `setting` describes them in a table."""

    rule: str
    feedback: str = "none"
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)


def contenders(rules: Sequence[str], kinds: Sequence[str], options: Mapping[str, Any] | None = None) -> list[Contender]:
    """Return BP and the rules, those that use feedback once with each kind; each again with `options`, if given.

    `pass1` goes to DFA and MEM-DFA; BP with it is BP without. Raises ValueError for unknown names.
    """
    found = [Contender("bp")]
    for kind in kinds:
        lookup("feedback", kind, feedback.KINDS)
    for rule in dict.fromkeys(rules):
        find_rule(rule)
        uses_feedback = rule in RULES and rule != "bp"
        found += [Contender(rule, kind) for kind in (kinds if uses_feedback else ["none"])]
    found = list(dict.fromkeys(found))
    if options:
        for one in list(found):
            given = {k: v for k, v in options.items() if k != "pass1" or find_rule(one.rule).teaches_blocks}
            setting = ", ".join(f"{name}={value}" for name, value in given.items())
            found += [Contender(one.rule, one.feedback, setting, given)] if given else []
    return found


def frontier(network: str, batch_size: int, kind: str = "regenerated", points: int = 5) -> list[Contender]:
    """Return BP, MEM-DFA that keeps from nothing to everything, and checkpointing with more and more segments.

    `points` is how many values of keep_bytes there are, `kind` that of MEM-DFA's feedback. Raises ValueError for
    unknown names, a batch size below 1, and fewer than two points.
    """
    blocks = models.build(network)
    check_int("batch size", batch_size)
    check_int("points", points, 2)
    x = torch.empty(batch_size, *models.input_shape(network), device="meta")
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
    optimizer: Any = "sgd",
    rounds: int = 9,
    warm_up: int = 2,
    seed: int = 0,
    channels_last: bool = False,
) -> pd.DataFrame:
    """Return a row a contender: median step time and quartiles, its ratio to BP's round by round, the measured peak.

    The first row is BP's, always; then `against` (all rules and baselines, feedback regenerated, if not given). The
    loss is the network's own. `optimizer`: a name in `ml.experiments.OPTIMIZERS`, with a rate too small to matter, or
    as a rule takes it. `channels_last` lays out images and filters of all of them so. torch's number of threads is left
    as it is. Raises ValueError for unknown names and sizes below 1.
    """
    for name, value, least in (("batch size", batch_size, 1), ("rounds", rounds, 1), ("warm_up", warm_up, 0)):
        check_int(name, value, least)
    every = list(dict.fromkeys([Contender("bp"), *(against or contenders(list(ALL_RULES), ["regenerated"]))]))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    steps = [
        example_step(
            one.rule,
            network,
            batch_size,
            optimizer,
            "stored" if one.feedback == "none" else one.feedback,
            seed,
            layout,
            **one.options,
        )
        for one in every
    ]
    rules, (x, y) = [rule for rule, _, _ in steps], steps[0][1:]
    seconds: list[list[float]] = [[] for _ in every]
    order = np.random.default_rng(seed)
    gc.collect()
    gc.freeze()  # what exists stays: the collections between steps need not look at it again
    try:
        for turn in range(warm_up + rounds):
            for k in order.permutation(len(every)):
                gc.collect()  # not in the middle of somebody's step
                started = time.perf_counter()
                rules[k].step(x, y)
                if turn >= warm_up:
                    seconds[k].append(time.perf_counter() - started)
    finally:
        gc.unfreeze()

    rows = []
    for one, rule, taken in zip(every, rules, seconds, strict=True):
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
    table = pd.DataFrame(rows).assign(rounds=rounds, threads=torch.get_num_threads(), torch=torch.__version__)
    return table.assign(channels_last=channels_last)
