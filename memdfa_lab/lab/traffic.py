"""What a data-parallel step takes on each rank, measured: the peak of memory, and the bytes that a rank sends.

Bytes sent are those that the process hands to the system's write calls during the step (/proc/self/io, Linux only): the
gradients, what gloo writes around them, and nothing else, since a step writes no file.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from memdfa_lab import memory
from memdfa_lab.core import feedback
from memdfa_lab.core.checks import lookup
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import experiments, models
from memdfa_lab.lab.distributed import Group, ranks
from memdfa_lab.rivals import BASELINES

if TYPE_CHECKING:
    import pandas as pd

COUNTS = Path("/proc/self/io")


def measure(
    sizes: Sequence[int], cases: Sequence[tuple[str, str]], batch: int, optimizer: str = "sgd"
) -> "pd.DataFrame":
    """Return a row a number of ranks and a case (rule, network): a step on a batch that the ranks share.

    Columns: ranks, rule, network, batch; peak_bytes and sent_bytes, of the rank that has most (sent_bytes is -1 where
    it cannot be measured); resting_bytes; gradient_bytes, of all blocks together. Ranks are processes of this machine,
    one thread each. Raises ValueError for fewer examples than ranks, RuntimeError if a rank fails.
    """
    import pandas as pd

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
            command = [sys.executable, "-m", *torchrun, "-m", "memdfa_lab.lab.traffic", folder]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode != 0:
                raise RuntimeError(f"{size} ranks could not be measured: {done.stderr[:2000]}")
            of_ranks = [pd.read_json(Path(folder) / f"{rank}") for rank in range(size)]
        most = pd.concat(of_ranks).groupby(level=0)[["peak_bytes", "sent_bytes"]].max()
        tables.append(of_ranks[0].assign(**most))
    return pd.concat(tables, ignore_index=True)


def _rows(group: Group, cases: Sequence[Sequence[str]], batch: int, optimizer: str) -> list[dict[str, Any]]:
    rows = []
    for name, network in cases:
        x = torch.randn(batch, *models.get(network).input_shape, generator=torch.Generator().manual_seed(0))
        mine = group.part(torch.arange(batch))
        made = lookup("rule", name, {**RULES, **BASELINES})(
            models.build(network),
            lambda parameters: experiments.OPTIMIZERS[optimizer](parameters, lr=1e-6),
            feedback=feedback.Regenerated(),
        )
        made.group = group
        step = (x[mine], mine % 10)
        made.step(*step)  # makes what rests
        before = _sent_bytes()
        trace = memory.measure(made, *step)
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
                "gradient_bytes": sum(p.numel() * p.element_size() for block in made.parameters for p in block),
            }
        )
    return rows


def _sent_bytes() -> int:
    if not COUNTS.exists():
        return 0
    counts = dict(line.split(": ") for line in COUNTS.read_text().splitlines())
    return int(counts["wchar"])


def _main(folder: Path) -> None:
    settings = json.loads((folder / "settings").read_text(encoding="utf-8"))
    with ranks() as group:
        (folder / f"{group.rank}").write_text(json.dumps(_rows(group, **settings)), encoding="utf-8")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
