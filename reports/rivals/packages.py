"""One step of memcnn's and revlib's reversible networks beside ml.Reversible, under one ledger: writes packages.csv.

`pip install memcnn revlib`, then `python reports/rivals/packages.py`. All have the couplings of
`ml.models.reversible(784, width, couplings, 10)` with the same weights, and plain SGD; the packages' own step is that of
every tutorial, loss.backward() and one optimizer over all parameters. Bytes are above rest: `peak_bytes` by the ledger,
with its parts, `allocator_bytes` by torch's allocator. memcnn empties the storages of inputs with a method that is no
operation, which the ledger does not see: its figure is the allocator's. `update` is the distance of what two steps made
of the weights to what BP made, over that; `ratio` the median over rounds of a step's time over BP's in the same round.
"""

import copy
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import memcnn
import pandas as pd
import revlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import memdfa_lab as ml

TABLE = Path(__file__).with_name("packages.csv")
SGD = partial(torch.optim.SGD, lr=0.01)
NETWORKS = {(800, 32): 128, (256, 64): 2048, (64, 1000): 128}  # width and couplings -> batch size
ROUNDS = 7


def of_memcnn(net: nn.Sequential) -> nn.Module:
    """Return the network with its couplings as memcnn's."""
    parts = [memcnn.AdditiveCoupling(Fm=block.F, Gm=block.G) for block in net[1:-1]]
    return nn.Sequential(net[0], *(memcnn.InvertibleModuleWrapper(part) for part in parts), net[-1])


def of_revlib(net: nn.Sequential) -> nn.Module:
    """Return the network with its couplings as revlib's."""
    parts = [part for block in net[1:-1] for part in (block.F, block.G)]
    return nn.Sequential(net[0], revlib.ReversibleSequential(*parts), net[-1])


class Plain:
    """A step of a plain loop."""

    def __init__(self, net: nn.Module):
        self.net, self.optimizer = net, SGD(net.parameters())

    def step(self, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(self.net(x), y).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Any]:
        return {"parameters": self.net.parameters()}


def main() -> None:
    """Write a row a network and a package or rule."""
    torch.set_num_threads(1)
    rows = []
    for (width, couplings), batch in NETWORKS.items():
        net = ml.models.reversible(784, width, couplings, 10)
        nets = [copy.deepcopy(net) for _ in range(5)]
        steps: dict[str, Any] = {
            "BP": ml.BP(nets[0], SGD),
            "ml.Reversible": ml.Reversible(nets[1], SGD),
            "ml.Binomial": ml.Binomial(nets[2], SGD),
            f"memcnn {memcnn.__version__}": Plain(of_memcnn(nets[3])),
            "revlib": Plain(of_revlib(nets[4])),
        }
        x = torch.randn(batch, 784, generator=torch.Generator().manual_seed(1))
        y = torch.arange(batch) % 10
        peaks = {name: ml.memory.measure(step, x, y, warm_up=1) for name, step in steps.items()}
        moved = [torch.cat([(p - q).flatten() for p, q in zip(one.parameters(), net.parameters())]) for one in nets]
        allocated = {name: ml.memory.allocator_peak(step, x, y) for name, step in steps.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                started = time.perf_counter()
                step.step(x, y)
                seconds[name].append(time.perf_counter() - started)
        for (name, trace), of_weights in zip(peaks.items(), moved, strict=True):
            row = {"width": width, "couplings": couplings, "batch": batch, "name": name, "peak_bytes": trace.peak_bytes}
            row["allocator_bytes"] = allocated[name]
            row |= {category: trace.peak_by_category.get(category, 0) for category in ("activations", "gradients")}
            row["update"] = ((of_weights - moved[0]).norm() / moved[0].norm()).item()
            row["ratio"] = statistics.median(a / b for a, b in zip(seconds[name], seconds["BP"], strict=True))
            rows.append(row)
        pd.DataFrame(rows).to_csv(TABLE, index=False, float_format="%.3g")
        print(pd.DataFrame(rows[-5:]).to_string(index=False, float_format="{:.2g}".format), flush=True)


if __name__ == "__main__":
    main()
