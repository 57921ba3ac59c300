"""A check that MEM-DFA's second forward pass repeats the first, block by block."""

import pandas as pd
import torch
from torch import Tensor

from memdfa_lab.core.checks import check_batch, check_type
from memdfa_lab.core.local import ByAutograd, block_gradient
from memdfa_lab.core.recompute import (
    forward_without_trace,
    generators_restored,
    state_restored,
)
from memdfa_lab.core.rule import Rule


def check(rule: Rule, x: Tensor, y: Tensor) -> pd.DataFrame:
    """Run both passes on a batch, x (N, ...) and y, as MEM-DFA does; return how much they differ after each block.

    Columns: block (from 0 on), module, by ("hand" or "autograd"), difference (the largest absolute one between the two
    outputs). The first row with a difference other than 0 names the block that does not repeat itself; later blocks
    differ because of it. The rule is left as it is. Raises TypeError if `rule` is no rule, and what `rule.step` raises
    before anything changes.
    """
    check_type("rule", rule, Rule, "a rule, such as ml.MemDFA(model, optimizer)")
    check_batch(x)
    rule.rehearse(x, y)
    first: list[Tensor] = []
    rows, h = [], x.detach()
    with generators_restored(x.device):
        forward_without_trace(rule.chain, h, see=lambda way, out: first.append(out), store=rule.store)
        for i, (block, before) in enumerate(zip(rule.chain, first, strict=True)):
            with rule.store.block(i), state_restored(block), torch.enable_grad():
                gradient = block_gradient(block, h)
                by_autograd = isinstance(gradient, ByAutograd)
                h = gradient.forward() if by_autograd else gradient.output()
            difference = (h.cpu().double() - before.cpu().double()).abs().max().item()
            rows.append((i, type(block).__name__, "autograd" if by_autograd else "hand", difference))
    return pd.DataFrame(rows, columns=["block", "module", "by", "difference"])
