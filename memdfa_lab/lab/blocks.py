"""The blocks into which a model is cut, as a table: `ml.blocks.show(model, x)`."""

import pandas as pd
import torch
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, describe
from memdfa_lab.core.cut import WEIGHT_LAYERS
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.memory.predict import kept_bytes


def show(model: nn.Module, x: Tensor) -> pd.DataFrame:
    """Return a row per block: its modules, its output, its parameters, and the bytes that it keeps for its gradients.

    `x`: a batch (N, ...), which runs once; the model is left as it was. Between two blocks only the output is in
    memory, `output_bytes`. MEM-DFA holds the `kept_bytes` of one block at a time.
    `note`: a skip connection over several weight layers makes them one block; the note says how many layers, and
    which part of all kept bytes is in this block.
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
