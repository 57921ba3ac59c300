"""What a kept block saves where pass 1 is cheap, and what packing it saves more: writes kept.csv.

`python reports/bench/kept.py`, about two minutes. MEM-DFA keeps nothing, a quarter, a half or all of what DFA keeps,
with an exact pass 1 and with cheap ones, as it is and ("packed") with pack="int8"; B is stored. One thread, in turns,
each in its faster layout of images. `kept_bytes` is what the blocks that are kept hold when pass 1 is done.
"""

import math
from functools import partial
from itertools import accumulate
from pathlib import Path

import pandas as pd
import torch

import memdfa_lab as ml
from memdfa_lab.core.packing import Packing
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab.bench import Contender, bench
from memdfa_lab.lab.files import write_text
from memdfa_lab.memory.predict import kept_bytes

TABLE = Path(__file__).with_name("kept.csv")
NETWORKS = {"784-[800]x32-10": 128, "784-[512]x32-10": 512, "mnist_conv": 100}
PARTS = {"nothing": 0.0, "a quarter": 0.25, "a half": 0.5, "all": 1.0}
COLUMNS = ["network", "batch_size", "rule", "keeps", "pass1", "kept_bytes", "layout", "median_s", "ratio", "ratio_low"]
COLUMNS += ["ratio_high", "peak_bytes", "rounds", "threads", "noisy", "torch"]
ROUNDS = 7


def main() -> None:
    """Write the rows of a network after the network."""
    ALL_RULES["packed"] = partial(ml.MemDFA, pack="int8")
    tables = []
    for network, batch in NETWORKS.items():
        x = torch.empty(batch, *ml.models.input_shape(network), device="meta")
        net, kept, found = ml.models.build(network), {}, []
        for rule, packing in (("memdfa", None), ("packed", Packing("int8"))):
            totals = list(accumulate(kept_bytes(net, x, packing)))
            for part, share in PARTS.items():
                most = math.inf if share == 1 else share * max(totals)
                fitting = [total for total in totals if total <= most]
                if fitting or not share and rule == "memdfa":
                    kept[rule, part] = fitting[-1] if fitting else 0
                    for pass1 in (None, "bfloat16", "int8"):
                        options = {"keep_bytes": most, **({"pass1": pass1} if pass1 else {})}
                        found.append(Contender(rule, "stored", f"{part}, {pass1 or 'exact'}", options))
        table = bench(network, batch, found, rounds=ROUNDS, threads=1)
        table[["keeps", "pass1"]] = table.pop("setting").str.split(", ", expand=True)
        table["kept_bytes"] = [kept.get(key, 0) for key in zip(table["rule"], table["keeps"], strict=True)]
        tables.append(table[COLUMNS])
        write_text(TABLE, pd.concat(tables).to_csv(index=False))
        print(tables[-1].to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
