"""Time and memory of rules side by side: in one process, in turns, as ratios to BP.

A machine's speed drifts, and others use it too; so each round gives every rule one step, in an order drawn anew, and a
ratio compares two steps of the same round. What is reported is the median over rounds, and the quartiles beside it.
"""

import gc
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from memdfa_lab import feedback, models
from memdfa_lab.baselines import BASELINES
from memdfa_lab.memory.predict import predict
from memdfa_lab.names import known
from memdfa_lab.rules import RULES

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


def bench(
    network: str,
    batch_size: int,
    rules: Sequence[str] = tuple(ALL),
    optimizer: Any = None,
    feedback_kind: str = "regenerated",
    rounds: int = 9,
    warm_up: int = 2,
    seed: int = 0,
) -> "pd.DataFrame":
    """Return a row a rule: median step time and quartiles, its ratio to BP's round by round, and the predicted peak.

    BP is always among the rules, the first row. `optimizer` as a rule takes it, SGD with a rate too small to matter
    if not given. torch's number of threads is left as it is. Raises ValueError for unknown names and sizes below 1.
    """
    import pandas as pd

    for name, value in (("batch size", batch_size), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    names = list(dict.fromkeys(("bp", *rules)))
    kind = known("feedback", feedback_kind, feedback.KINDS)
    shape = (batch_size, *models.get(network).input_shape)
    make = optimizer or partial(torch.optim.SGD, lr=1e-6)
    classes = {name: known("rule", name, ALL) for name in names}

    order = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    y = torch.randint(10, (batch_size,), generator=generator)
    made = {name: rule(models.build(network), optimizer=make, feedback=kind(seed)) for name, rule in classes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + rounds):
        for name in order.permutation(names):
            gc.collect()  # not in the middle of somebody's step
            started = time.perf_counter()
            made[name].step(x, y)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - started)

    rows = []
    for name in names:
        ratios = np.divide(seconds[name], seconds["bp"])
        low, median, high = np.quantile(seconds[name], (0.25, 0.5, 0.75))
        ratio_low, ratio, ratio_high = np.quantile(ratios, (0.25, 0.5, 0.75))
        trace = predict(name, partial(models.build, network), shape, make, kind(seed))
        rows.append(
            {
                "network": network,
                "batch_size": batch_size,
                "rule": name,
                "median_s": median,
                "low_s": low,
                "high_s": high,
                "ratio": ratio,
                "ratio_low": ratio_low,
                "ratio_high": ratio_high,
                "peak_bytes": trace.peak_bytes,
            }
        )
    return pd.DataFrame(rows).assign(rounds=rounds, threads=torch.get_num_threads(), torch=torch.__version__)
