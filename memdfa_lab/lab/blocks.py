"""What a model is cut into, as a table: `ml.blocks.show(model, x)`."""

import pandas as pd
import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, parts_of
from memdfa_lab.core.cut import WEIGHT_LAYERS
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.memory.predict import kept_bytes


def show(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Return a row a block: what it runs, its output, its parameters, and what it keeps while it is taught.

    `x`: a batch (N, ...), which runs once; the model is left as it was. `weight_layers`: where there are many, a skip
    spans them, and made them one block. `kept_bytes`: what that costs, since MEM-DFA holds one block's at a time. What
    is alive at the cut is the output alone, `output_bytes`.
    """
    blocks, rows, h = as_blocks(model), [], x
    with torch.no_grad():
        for i, (block, kept) in enumerate(zip(blocks, kept_bytes(blocks, x), strict=True)):
            h = forward_without_trace([block], h, i)
            rows.append(
                {
                    "modules": ", ".join(_kinds(block)),
                    "output": tuple(h.shape),
                    "output_bytes": h.nbytes,
                    "parameters": sum(parameter.numel() for parameter in block.parameters()),
                    "weight_layers": sum(isinstance(part, WEIGHT_LAYERS) for part in block.modules()),
                    "kept_bytes": kept,
                }
            )
    return pd.DataFrame(rows).rename_axis("block")


def _kinds(block: nn.Module) -> list[str]:
    parts = list(block.children()) if type(block).__name__ == "Traced" else parts_of(block)
    return [type(part).__name__ for part in parts]
