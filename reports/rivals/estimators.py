"""What torchinfo, torch's MemTracker, our ledger and torch's allocator say that a step takes: writes estimators.csv.

`pip install torchinfo`, then `python reports/rivals/estimators.py`; MemTracker comes with torch. One step with Adam at
the networks' own batch sizes. `torchinfo`: its "Estimated Total Size", which is the input, the outputs of all layers
twice, and the weights; it knows no rule. `tracker`, `ledger`: all that is held at the peak; MemTracker refuses what
runs a module twice. `rest`: what is there before
the step, of it. `allocator`: the ledger's rest, and what the allocator gave out above it.
"""

from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torchinfo
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

import memdfa_lab as ml
from memdfa_lab.lab.example import example_step

TABLE = Path(__file__).with_name("estimators.csv")
NETWORKS = {"784-[800]x32-10": 128, "mnist_conv": 100, "liao_cifar_bn": 100, "vgg_16": 32, "resnet_18": 32}


def main() -> None:
    """Write a row a network and a rule."""
    rows = []
    for network, batch in NETWORKS.items():
        shape = (batch, *ml.models.input_shape(network))
        said = torchinfo.summary(nn.Sequential(*ml.models.build(network)), shape, verbose=0)
        estimate = said.total_input + said.total_output_bytes + said.total_param_bytes
        for name in ("bp", "memdfa"):
            rule, x, y = example_step(name, network, batch, partial(torch.optim.Adam, lr=1e-4), "regenerated", 0)
            trace = ml.memory.measure(rule, x, y, warm_up=1)
            given_out = ml.memory.allocator_peak(rule, x, y)
            tracker = MemTracker()
            tracker.track_external(rule.blocks, *rule.optimizers, x, y)
            try:
                with tracker:
                    rule.step(x, y)
                peak = tracker.get_tracker_snapshot("peak")[x.device]["Total"]
            except NotImplementedError:  # it follows a module once an iteration; MEM-DFA runs each twice
                peak = pd.NA
            row = {"network": network, "batch_size": batch, "rule": name, "torchinfo": estimate}
            row["tracker"] = peak
            row["ledger"] = trace.peak_bytes + trace.resting_bytes
            row["allocator"] = given_out + trace.resting_bytes
            row["rest"] = trace.resting_bytes
            rows.append(row)
            pd.DataFrame(rows).to_csv(TABLE, index=False)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
