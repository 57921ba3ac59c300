"""How far Reversible is from BP, against depth and precision: writes drift.csv.

`python reports/rivals/drift.py`. Chains of couplings of width 64 on 32 random examples, ReLU, weights as
`ml.models.reversible` draws them (branches of F and G scaled by the square root of the depth), and as He has them,
unscaled, where activations grow with depth. Columns: `input`, the distance of the first coupling's input that came back
to the one that went in, over its norm; `gradient`, the same for the gradient of all weights against BP's; `first`, for
that of the first coupling, where all of the way back has gone wrong. Precisions: weights of float64, float32, bfloat16,
and float32 in an autocast of bfloat16, in which couplings add in float32.
"""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import memdfa_lab as ml

TABLE = Path(__file__).with_name("drift.csv")
WIDTH, BATCH, FIRST = 64, 32, 1  # FIRST: the number of the first coupling among the blocks
DEPTHS = (1, 4, 16, 64, 256, 1000)
PRECISIONS = ("float64", "float32", "bfloat16 autocast", "bfloat16")


class Noting:
    """A rule that notes its gradients in place of updates, and the input of the first coupling that comes back."""

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)
        self.found: dict[int, Tensor] = {}

    def update(self, i: int) -> None:
        self.found[i] = torch.cat([p.grad.double().flatten() for p in self.parameters[i]])

    def _learn_coupling(self, i: int, *given: Any) -> Tensor:
        h = super()._learn_coupling(i, *given)
        if i == FIRST:
            self.came_back = h
        return h


class NotingBP(Noting, ml.BP):
    pass


class NotingReversible(Noting, ml.Reversible):
    pass


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two tensors over the norm of the second."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def row(depth: int, precision: str, branches: str) -> dict[str, Any]:
    """Return a row of the table."""
    net = ml.models.reversible(WIDTH, WIDTH, depth, 10)
    if branches == "He":
        with torch.no_grad():
            for block in net[1:-1]:
                for p in block.parameters():
                    p.mul_(depth**0.5)
    net.to(torch.float32 if "autocast" in precision else getattr(torch, precision))
    own = {"precision": "bfloat16"} if "autocast" in precision else {}
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1)).to(next(net.parameters()).dtype)
    ends = []
    for kind in (NotingBP, NotingReversible):
        rule: Any = kind(net, partial(torch.optim.SGD, lr=0.1), **own)
        rule.step(x, torch.arange(BATCH) % 10)
        ends.append(rule)
    bp, rule = ends
    with rule.autocast():
        went_in = net[0](x)
    whole = [torch.cat([one.found[i] for i in range(len(net))]) for one in (rule, bp)]
    found = {"input": distance(rule.came_back, went_in), "gradient": distance(*whole)}
    found["first"] = distance(rule.found[FIRST], bp.found[FIRST])
    return {"couplings": depth, "precision": precision, "branches": branches, **found}


def main() -> None:
    """Write the table."""
    torch.set_num_threads(1)
    rows = []
    for branches, precision, depth in product(("scaled", "He"), PRECISIONS, DEPTHS):
        if branches == "scaled" or depth <= 64:
            rows.append(row(depth, precision, branches))
    table = pd.DataFrame(rows)
    table.to_csv(TABLE, index=False, float_format="%.2e")
    print(table.to_string(index=False, float_format="{:.1e}".format))


if __name__ == "__main__":
    main()
