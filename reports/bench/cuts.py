"""Time and peak of MEM-DFA with a block's batch, and the outputs of a dense block, in fewer parts: writes cuts.csv.

`python reports/bench/cuts.py`. The package takes eighths of the batch in convolutional blocks (quarters in small ones,
of which there are none here) and quarters of the outputs in dense ones; here both are in at most 8, 4, 2 or 1 parts. One
thread, in turns; the time is the processor's, so that other processes disturb less. Images lie with their channels last,
B is stored.
"""

import gc
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

import memdfa_lab as ml
from memdfa_lab.core import by_hand, signal
from memdfa_lab.lab.bench import NETWORKS
from memdfa_lab.lab.example import example_step

TABLE = Path(__file__).with_name("cuts.csv")
PARTS, ROUNDS, WARM_UP = (8, 4, 2, 1), 9, 2
split = signal.split


def cut(most: int) -> None:
    """Let the package cut into so many parts at most."""
    for module in (by_hand, signal):
        module.split = lambda size, parts, *more: split(size, min(parts, most), *more)


def main() -> None:
    """Write a row a network and number of parts, after each network."""
    torch.set_num_threads(1)
    rows = []
    for network, batch in {**NETWORKS, "784-[2048]x8-10": 512}.items():
        steps = [
            example_step(rule, network, batch, feedback="stored", layout=torch.channels_last)
            for rule in ("bp", "memdfa")
        ]
        (bp, x, y), (rule, _, _) = steps
        seconds = {most: [] for most in (0, *PARTS)}  # 0: BP
        for turn in range(WARM_UP + ROUNDS):
            for most, taken in seconds.items():
                cut(most or 8)
                gc.collect()
                started = time.process_time()
                (rule if most else bp).step(x, y)
                if turn >= WARM_UP:
                    taken.append(time.process_time() - started)
        for most in PARTS:
            cut(most)
            over = {
                name: statistics.median(a / b for a, b in zip(seconds[most], seconds[of], strict=True))
                for name, of in (("bp", 0), ("eighths", 8))
            }
            peak = ml.memory.measure(rule, x, y).peak_bytes
            median = statistics.median(seconds[most])
            rows.append(
                [
                    network,
                    batch,
                    most,
                    median,
                    over["bp"],
                    over["eighths"],
                    peak,
                    peak / (rows[-PARTS.index(most)][6] if most < 8 else peak),
                ]
            )
        names = [
            "network",
            "batch_size",
            "parts_at_most",
            "median_s",
            "ratio_to_bp",
            "ratio_to_eighths",
            "peak_bytes",
            "peak_to_eighths",
        ]
        pd.DataFrame(rows, columns=names).to_csv(TABLE, index=False)
        print(pd.DataFrame(rows[-len(PARTS) :], columns=names).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
