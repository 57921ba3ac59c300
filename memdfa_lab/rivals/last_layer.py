"""The smallest baseline: only the last block is trained, on random features."""

import torch
from torch import Tensor

from memdfa_lab.core.rule import Rule


class LastLayer(Rule):
    """Only the last block learns; BatchNorm's statistics are updated in all. Raises ValueError if it is frozen."""

    def check(self) -> None:
        if not self.parameters[-1]:
            raise ValueError("the last block is frozen, and no other would learn: unfreeze it, or take BP")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last = self.begin(x, y), len(self.blocks) - 1
        for i in range(last + 1):
            with torch.set_grad_enabled(i == last):
                h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        self.update_all([last])
        return loss
