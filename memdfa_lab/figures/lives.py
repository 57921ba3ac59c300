"""The lifetimes of a step's tensors, with time counted in multiply-adds."""

from typing import NamedTuple

from memdfa_lab.memory.trace import Trace

# The multiply-adds of each phase of a block, relative to its forward pass. Small ones are drawn as SMALL.
WORK = {"forward": 1.0, "recompute": 1.0, "backward": 2.0, "local gradient": 1.0, "update": 0.05}
SMALL = 0.3


class Bar(NamedTuple):
    """A tensor's life: its layer (for tensors of the loss, one more than the last), kind, bytes, birth and end."""

    row: int
    category: str
    size_bytes: int
    born: float
    end: float


def lives(trace: Trace, blocks: int) -> list[Bar]:
    """Return the lifetime of each tensor of a step except single numbers; a phase of a block takes its WORK."""
    table = trace.timeline
    table = table[table.groupby("storage")["bytes"].transform("first") > 8].reset_index(drop=True)
    within = table["phase"] != ""  # what is freed between two phases counts to the first
    phases = table["phase"].where(within).ffill()
    of_block = table["block"].astype(float).where(within).ffill().where(phases != "error", blocks)
    visits = ((phases != phases.shift()) | (of_block != of_block.shift())).cumsum()
    times: dict[int, float] = {}
    now = 0.0
    for _, events in table.groupby(visits):
        phase, block = phases[events.index[0]], of_block[events.index[0]]
        work = WORK.get(phase, SMALL) / (2 if (phase, block) == ("backward", 0) else 1)  # no signal is computed for x
        work = min(work, SMALL) if block == blocks - 1 else work
        times |= {event: now + work * place / len(events) for place, event in enumerate(events.index)}
        now += work
    bars, over = [], within[::-1].idxmax()  # the last event of a phase
    for _, tensor in table.groupby("storage"):
        first, last = tensor.iloc[0], tensor.index[-1]
        row = blocks if first["phase"] == "error" else int(first["block"])
        end = times[last] if len(tensor) > 1 and last <= over else now
        bars.append(Bar(row, first["category"], int(first["bytes"]), times[tensor.index[0]], end))
    return bars
