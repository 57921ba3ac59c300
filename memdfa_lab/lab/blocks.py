"""The blocks into which a model is cut, as a table: `ml.blocks.show(model, x)`."""

import pandas as pd
import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, describe
from memdfa_lab.core.cut import WEIGHT_LAYERS
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.memory.predict import kept_bytes


def show(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Return a row a block: the modules it runs, its output, its parameters, and what it keeps while it is taught.

    `x`: a batch (N, ...), which runs once; the model is left as it was. Between two blocks only the output is alive,
    `output_bytes`. `kept_bytes`: what the block keeps for its gradients; MEM-DFA holds this for one block at a time.
    `note` says where a skip connection spans several weight layers, which are then one block, and what part of all kept
    bytes that block has.
    """
    blocks, rows, h = as_blocks(model), [], x
    sizes = kept_bytes(blocks, x)
    with torch.no_grad():
        for i, (block, kept) in enumerate(zip(blocks, sizes, strict=True)):
            h = forward_without_trace([block], h, i)
            layers = sum(isinstance(part, WEIGHT_LAYERS) for part in block.modules())
            spans = f"a skip spans {layers} weight layers, {kept / max(sum(sizes), 1):.0%} of what is kept"
            rows.append(
                {
                    "modules": describe(block),
                    "output": tuple(h.shape),
                    "output_bytes": h.nbytes,
                    "parameters": sum(parameter.numel() for parameter in block.parameters()),
                    "kept_bytes": kept,
                    "note": spans if layers > 1 else "",
                }
            )
    return pd.DataFrame(rows).rename_axis("block")
