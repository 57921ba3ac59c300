"""The memory tables of the comparison: predictions for every network and rule, and measurements to compare with."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memdfa_lab import memory
from memdfa_lab.core import feedback, signal
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import experiments, models
from memdfa_lab.lab.files import write_text

# the four rules, and baselines that people use; `memdfa bench` compares the other rivals
COMPARED = (*RULES, "checkpoint", "step_in_backward", "checkpoint_step_in_backward", "last_layer")
PROFILED = {"long_fc2": 10, "mnist_conv": 100, "liao_cifar": 100, "vgg_16": 100}  # network -> batch size
DEPTHS = (2, 3, 5, 10, 20, 50, 100, 200)
MEASURED_AT = (2, 20, 200)
DEEP_BATCH = 10  # as the authors use
WIDTH = 500
# networks of any depth, with the layers of the authors' network of this name
CHAINS = {
    "long_fc": f"[{WIDTH} bn sigmoid]x{{depth}} classes sigmoid",
    "long_fc2": f"[{WIDTH} sigmoid]x{{depth}} classes sigmoid",
    "long_conv": "[conv5x5(5) bn sigmoid]x{depth} classes sigmoid",
}
FROM_FORMULA = "long_fc2"  # the chain for which there is a closed form


def measure(out: str | Path) -> None:
    """Write OUT/peaks.csv, profiles.csv and depth.csv: predicted bytes above rest, for plain SGD and regenerated B.

    peaks: every network and rule at the network's own batch size, by category. profiles: the events of one step. depth:
    long_fc, long_fc2 and long_conv with other numbers of layers. There `formula_bytes` is the closed form, if there is
    one, and `measured_bytes` the measured peak.
    """
    peaks = []
    for network, rule in product(models.names(), COMPARED):
        batch = models.get(network).batch_size
        trace = experiments.profile(rule, network, batch)
        row = {"network": network, "batch_size": batch, "rule": rule, "peak_bytes": trace.peak_bytes}
        peaks.append(row | {"resting_bytes": trace.resting_bytes, **trace.peak_by_category})
    profiles = [
        experiments.profile(rule, network, batch)
        .timeline[["phase", "block", "category", "bytes", "total_bytes"]]
        .assign(network=network, batch_size=batch, rule=rule)
        for (network, batch), rule in product(PROFILED.items(), RULES)
    ]
    tables = {"peaks": pd.DataFrame(peaks).convert_dtypes(), "profiles": pd.concat(profiles)}
    tables["depth"] = pd.DataFrame(_against_depth()).convert_dtypes()
    for name, table in tables.items():
        write_text(Path(out) / f"{name}.csv", table.to_csv(index=False))


def _against_depth() -> Iterator[dict[str, Any]]:
    from memdfa_lab.memory import formula as f

    shape, classes = (DEEP_BATCH, 1, 28, 28), 10
    values = {f.N: DEEP_BATCH, f.n_0: 784, f.n: WIDTH, f.C: classes, f.s: 4, f.k: signal.SMALL_BYTES}
    how: Any = {"optimizer": partial(torch.optim.SGD, lr=1e-6), "feedback": feedback.Regenerated(0)}
    for (name, layers), rule in product(CHAINS.items(), COMPARED):
        theory = f.peak(rule, feedback="regenerated") if name == FROM_FORMULA and rule in RULES else None
        for depth in DEPTHS:
            build = partial(models.from_layers, layers.format(depth=depth), shape[1:], classes)
            trace = memory.predict(rule, build, shape, **how)
            row = {"network": name, "batch_size": DEEP_BATCH, "rule": rule, "depth": depth}
            row |= {"peak_bytes": trace.peak_bytes, "resting_bytes": trace.resting_bytes}
            row["formula_bytes"] = None if theory is None else int(theory.subs({**values, f.L: depth}))
            row["measured_bytes"] = None
            if rule in RULES and depth in MEASURED_AT:
                generator = torch.Generator().manual_seed(0)
                x, y = torch.randn(shape, generator=generator), torch.randint(classes, shape[:1], generator=generator)
                row["measured_bytes"] = memory.measure(RULES[rule](build(), **how), x, y, warm_up=1).peak_bytes
            yield row
