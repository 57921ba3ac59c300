"""The memory tables of the comparison: predictions for every network and rule, and measurements to hold them to."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from memdfa_lab import memory
from memdfa_lab.core import feedback, signal
from memdfa_lab.core.rules import ALL_RULES, RULES
from memdfa_lab.lab import architectures, experiments, models
from memdfa_lab.lab.files import write_text

PROFILED = {"long_fc2": 10, "mnist_conv": 100, "liao_cifar": 100, "vgg_16": 100}  # network -> batch size
DEPTHS = (2, 3, 5, 10, 20, 50, 100, 200)
MEASURED_AT = (2, 20, 200)
DEEP_BATCH = 10  # the authors'
WIDTH = 500
FROM_FORMULA = "long_fc2"  # the chain for which there is a closed form


def measure(out: str | Path) -> None:
    """Write the memory tables OUT/peaks.csv, profiles.csv and depth.csv: predicted for plain SGD, B drawn anew.

    Bytes above rest. peaks: every network and rule at the network's own batch, by category. profiles: the events of one
    step. depth: networks as long_fc, long_fc2 and long_conv with other numbers of layers; beside the prediction the
    closed form where there is one (formula_bytes), and what a step was measured to hold (measured_bytes).
    """
    rules = list(ALL_RULES)
    traces = {}
    for network, rule in product(models.names(), rules):
        batch = models.get(network).batch_size
        traces[network, batch, rule] = experiments.profile(rule, network, batch)
    peaks = [
        {"network": network, "batch_size": batch, "rule": rule, "peak_bytes": trace.peak_bytes}
        | {"resting_bytes": trace.resting_bytes, **trace.peak_by_category}
        for (network, batch, rule), trace in traces.items()
    ]
    profiles = [
        experiments.profile(rule, network, batch)
        .timeline[["phase", "block", "category", "bytes", "total_bytes"]]
        .assign(network=network, batch_size=batch, rule=rule)
        for (network, batch), rule in product(PROFILED.items(), RULES)
    ]
    tables = {"peaks": pd.DataFrame(peaks).convert_dtypes(), "profiles": pd.concat(profiles)}
    tables["depth"] = pd.DataFrame(_against_depth(rules)).convert_dtypes()
    for name, table in tables.items():
        write_text(Path(out) / f"{name}.csv", table.to_csv(index=False))


def _against_depth(rules: list[str]) -> Iterator[dict[str, Any]]:
    from memdfa_lab.memory import formula as f

    for (name, make), rule in product(_chains().items(), rules):
        theory = f.peak(rule, feedback="regenerated") if name == FROM_FORMULA and rule in RULES else None
        equal = {f.N: DEEP_BATCH, f.n_0: 784, f.n: WIDTH, f.C: 10, f.s: 4, f.k: signal.SMALL_BYTES}
        for depth in DEPTHS:
            shape = (DEEP_BATCH, 1, 28, 28)
            row: dict[str, Any] = {"network": name, "batch_size": DEEP_BATCH, "rule": rule, "depth": depth}
            how: Any = {"optimizer": partial(torch.optim.SGD, lr=1e-6), "feedback": feedback.Regenerated(0)}
            trace = memory.predict(rule, partial(make, depth), shape, **how)
            row |= {"peak_bytes": trace.peak_bytes, "resting_bytes": trace.resting_bytes}
            row["formula_bytes"] = None if theory is None else int(theory.subs({**equal, f.L: depth}))
            row["measured_bytes"] = None
            if rule in RULES and depth in MEASURED_AT:
                made = RULES[rule](make(depth), **how)
                generator = torch.Generator().manual_seed(0)
                x, y = torch.randn(shape, generator=generator), torch.randint(10, shape[:1], generator=generator)
                row["measured_bytes"] = memory.measure(made, x, y, warm_up=1).peak_bytes
            yield row


def _chains() -> dict[str, Any]:
    """Return what makes a network of any depth, by the name of the authors' network that it is like."""

    def dense(depth: int, batch_norm: bool) -> nn.Sequential:
        return models.mlp(784, [WIDTH] * depth, 10, "sigmoid", batch_norm, output="sigmoid")

    def convolutional(depth: int) -> nn.Sequential:
        return models._initialised(lambda: architectures.long_conv(depth)((1, 28, 28), 10), seed=0)

    return {
        "long_fc": partial(dense, batch_norm=True),
        "long_fc2": partial(dense, batch_norm=False),
        "long_conv": convolutional,
    }
