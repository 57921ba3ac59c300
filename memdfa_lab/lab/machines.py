"""Several machines: `measure` gives memory and traffic of ranks, `simulate` the schedule of a pipeline of machines.

`measure`: bytes sent are those that the process passes to the system's write calls during the step (/proc/self/io,
Linux only). They are the gradients and gloo's headers, since a step writes no file.

`simulate`: each machine has equally many consecutive blocks. The unit of time is the forward pass of one micro-batch on
one machine. The gradient of its weights takes another unit; under BP and FA, the signal to the machine before takes one
more. DFA and MEM-DFA form e B_i instead, which takes `signal`. A machine updates its weights after the gradients of all
micro-batches, and then begins the next batch, so that each rule makes the same updates as on one machine. `wire` is the
time that activations, signals and e travel, during which machines compute. BP's schedule is GPipe's (Huang et al.
2019): all forward passes, then all backward passes.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from memdfa_lab import memory
from memdfa_lab.core.checks import check_int, check_number, lookup
from memdfa_lab.lab.distributed import Group, ranks
from memdfa_lab.lab.example import example_step

COUNTS = Path("/proc/self/io")
# The tasks of a machine in a batch: parts in this order, in each part the same tasks for every micro-batch
ORDERS = {
    "bp": [["forward"], ["backward"]],
    "fa": [["forward"], ["backward"]],
    "dfa": [["forward"], ["local gradient"]],
    "memdfa": [["forward"], ["recompute", "local gradient"]],
}


def measure(sizes: Sequence[int], cases: Sequence[tuple[str, str]], batch: int, optimizer: str = "sgd") -> pd.DataFrame:
    """Return a row for each number of ranks and each case (rule, network): a step on a batch that the ranks share.

    Columns: ranks, rule, network, batch; peak_bytes and sent_bytes, the largest of all ranks (sent_bytes is -1 where
    it cannot be measured); resting_bytes; gradient_bytes, of all blocks together. Ranks are processes of this machine,
    one thread each. Raises ValueError for fewer examples than ranks, RuntimeError if a rank fails.
    """
    if batch < max(sizes):
        raise ValueError(f"a batch of {batch} has no example for each of {max(sizes)} ranks")
    settings: dict[str, Any] = {"cases": list(cases), "batch": batch, "optimizer": optimizer}
    tables = []
    for size in sizes:
        if size == 1:
            tables.append(pd.DataFrame(_rows(Group(), **settings)))
            continue
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "settings").write_text(json.dumps(settings), encoding="utf-8")
            torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            environment |= {"USE_LIBUV": "0"} if os.name == "nt" else {}  # some releases for Windows lack it
            command = [sys.executable, "-m", *torchrun, "-m", "memdfa_lab.lab.machines", folder]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                raise RuntimeError(f"{size} ranks could not be measured: {done.stderr[:2000]}")
            of_ranks = [pd.read_json(Path(folder) / f"{rank}") for rank in range(size)]
        most = pd.concat(of_ranks).groupby(level=0)[["peak_bytes", "sent_bytes"]].max()
        tables.append(of_ranks[0].assign(**most))
    return pd.concat(tables, ignore_index=True)


def _rows(group: Group, cases: Sequence[Sequence[str]], batch: int, optimizer: str) -> list[dict[str, Any]]:
    """Return this rank's rows of the table."""
    rows = []
    for name, network in cases:
        rule, x, y = example_step(name, network, batch, optimizer)
        rule.group = group
        mine = group.part(torch.arange(batch))
        step = (x[mine], y[mine])
        rule.step(*step)  # makes the optimizer's state and the buffers to send from
        before = _sent_bytes()
        trace = memory.measure(rule, *step)
        sent = _sent_bytes() - before if group.size > 1 else 0
        rows.append(
            {
                "ranks": group.size,
                "rule": name,
                "network": network,
                "batch": batch,
                "peak_bytes": trace.peak_bytes,
                "sent_bytes": sent if COUNTS.exists() else -1,
                "resting_bytes": trace.resting_bytes,
                "gradient_bytes": sum(p.numel() * p.element_size() for block in rule.parameters for p in block),
            }
        )
    return rows


def _sent_bytes() -> int:
    if not COUNTS.exists():
        return 0
    counts = dict(line.split(": ") for line in COUNTS.read_text("ascii").splitlines())
    return int(counts["wchar"])


def simulate(
    rule: str, machines: int, micro_batches: int, batches: int = 3, *, wire: float = 0.0, signal: float = 0.0
) -> pd.DataFrame:
    """Return a row per task: machine, task, batch, micro_batch, start and end, in units of a machine's forward pass.

    Raises ValueError for an unknown rule, numbers below 1, and times below 0.
    """
    order = lookup("rule", rule, ORDERS)
    for name, number in (("machines", machines), ("micro_batches", micro_batches), ("batches", batches)):
        check_int(name, number)
    for name, time in (("wire", wire), ("signal", signal)):
        check_number(name, time)
    takes = {"forward": 1.0, "recompute": 1.0, "backward": 2.0, "local gradient": 1.0 + signal}
    one_batch = [(task, micro) for part in order for micro in range(micro_batches) for task in part]
    rows = []
    free_at = [0.0] * machines
    of_error: dict[int, tuple[int, float]] = {}  # micro-batch -> the machine that computes e, and when
    for batch in range(batches):
        for task, micro in one_batch:
            sender, sent = (0, 0.0) if task == "forward" else of_error[micro]  # of what the task needs
            for machine in range(machines)[:: -1 if task == "backward" else 1]:
                start = max(free_at[machine], sent + (wire if sender != machine else 0.0))
                free_at[machine] = end = start + takes[task]
                rows.append((machine, task, batch, micro, start, end))
                if task != "local gradient":  # a local gradient needs e alone
                    sender, sent = machine, end
            if task == "forward":
                of_error[micro] = sender, sent
    return pd.DataFrame(rows, columns=["machine", "task", "batch", "micro_batch", "start", "end"])


def steady(table: pd.DataFrame) -> dict[str, float]:
    """Return the steady state of a simulation of two batches or more: `busy`, `rate` and `held`.

    `busy`: the fraction of the time in which machines compute. `rate`: micro-batches per unit of time. `held`: the
    largest number of micro-batches whose activations a machine holds for their gradients. Raises ValueError for
    fewer than two batches.
    """
    first = table[table["machine"] == 0].groupby("batch")["start"].min()
    if len(first) < 2:
        raise ValueError("the steady state of a pipeline needs two batches or more: simulate with batches=2 or more")
    period = first.iloc[-1] - first.iloc[-2]
    last = table[table["batch"] == table["batch"].max()]
    work = (last["end"] - last["start"]).sum() / (table["machine"].max() + 1)
    born = "recompute" if (last["task"] == "recompute").any() else "forward"
    taught = last["task"].isin(["backward", "local gradient"])
    changes = [(time, 1) for time in last[(last["task"] == born) & (last["machine"] == 0)]["start"]]
    changes += [(time, -1) for time in last[taught & (last["machine"] == 0)]["end"]]
    held = max(accumulate(change for _, change in sorted(changes)))
    return {"busy": work / period, "rate": (table["micro_batch"].max() + 1) / period, "held": held}


if __name__ == "__main__":
    results = Path(sys.argv[1])
    with ranks() as this_rank:
        rows_here = _rows(this_rank, **json.loads((results / "settings").read_text(encoding="utf-8")))
        (results / f"{this_rank.rank}").write_text(json.dumps(rows_here), encoding="utf-8")
