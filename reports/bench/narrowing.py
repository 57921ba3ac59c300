"""What part of a step MEM-DFA spends on narrowing weights for a cheap pass 1, and what that pass saves: narrowing.csv.

`python reports/bench/narrowing.py`, about a minute. The narrowing of all weights is timed alone, in turns with steps
whose pass 1 is exact and cheap. One thread, the processor's time, the median of seven; images with their channels last,
B stored.
"""

import gc
import statistics
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.block_float import LARGE_BYTES
from memdfa_lab.core.signal import split
from memdfa_lab.lab.bench import NETWORKS
from memdfa_lab.lab.example import example_step
from memdfa_lab.lab.files import write_text

TABLE = Path(__file__).with_name("narrowing.csv")
ROUNDS, WARM_UP = 7, 2


def narrow(weight: torch.Tensor, kind: torch.dtype) -> None:
    """Narrow a weight as pass 1 does, and drop it."""
    for part in split(len(weight), 4 if weight.numel() * kind.itemsize > LARGE_BYTES[kind] else 1, 1, 16):
        if kind is torch.int8 and weight.dim() == 2:
            ml.precision.BlockFloat(8).parts(weight[part], torch.int8)
        else:  # filters are in bfloat16 at least
            weight[part].bfloat16()


def main() -> None:
    """Write a row a network and kind of pass 1, after each network."""
    torch.set_num_threads(1)
    rows = []
    for network, batch in {**NETWORKS, "784-[2048]x8-10": 512}.items():
        rules = {}
        for pass1 in (None, "bfloat16", "int8"):
            rules[pass1], x, y = example_step(
                "memdfa", network, batch, feedback="stored", layout=torch.channels_last, pass1=pass1
            )
        layers = [m for m in rules[None].blocks.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        weights = [layer.weight.detach() for layer in layers]
        seconds = {name: [] for name in (*rules, "narrowing bfloat16", "narrowing int8")}
        for turn in range(WARM_UP + ROUNDS):
            for name, taken in seconds.items():
                gc.collect()
                started = time.process_time()
                if name in rules:
                    rules[name].step(x, y)
                else:
                    for weight in weights:
                        narrow(weight, getattr(torch, name.split()[1]))
                if turn >= WARM_UP:
                    taken.append(time.process_time() - started)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        for pass1 in ("bfloat16", "int8"):
            share, saved = medians[f"narrowing {pass1}"] / medians[None], 1 - medians[pass1] / medians[None]
            rows.append([network, batch, pass1, medians[None], medians[pass1], share, saved])
        names = ["network", "batch_size", "pass1", "exact_s", "cheap_s", "narrowing_share", "saved_share"]
        write_text(TABLE, pd.DataFrame(rows, columns=names).to_csv(index=False))
        print(pd.DataFrame(rows[-2:], columns=names).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
