"""A pipeline of machines, simulated: who computes what and when, if each holds as many consecutive blocks.

The unit of time is what one machine takes for the forward pass of one micro-batch. The gradient of its weights takes
one more, and so does the signal to the machine before (BP and FA); DFA and MEM-DFA take e B_i, `signal`, in place of
that. A batch has `micro_batches` of them, and a machine updates its weights when it has its gradients of all: each rule
makes the updates that it makes on one machine, none with weights that are out of date. A machine then begins the next
batch and waits for nobody. `wire` is how long activations, signals and e travel, while machines go on computing.

BP's schedule is GPipe's (Huang et al. 2019): all forward, then all backward.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from memdfa_lab.core.checks import lookup

if TYPE_CHECKING:
    import pandas as pd

# What a machine does in a batch: one part after the other, in each the same tasks for every micro-batch
ORDERS = {
    "bp": [["forward"], ["backward"]],
    "fa": [["forward"], ["backward"]],
    "dfa": [["forward"], ["local gradient"]],
    "memdfa": [["forward"], ["recompute", "local gradient"]],
}
Task = tuple[int, str, int, int]  # machine, what, batch, micro-batch


def simulate(
    rule: str, machines: int, micro_batches: int, batches: int = 3, *, wire: float = 0.0, signal: float = 0.0
) -> "pd.DataFrame":
    """Return a row a task: machine, task, batch, micro_batch, start and end, in units of a machine's forward pass.

    Raises ValueError for an unknown rule, numbers below 1, and times below 0.
    """
    import pandas as pd

    order = lookup("rule", rule, ORDERS)
    for name, number in (("machines", machines), ("micro_batches", micro_batches), ("batches", batches)):
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number!r}")
    if wire < 0 or signal < 0:
        raise ValueError(f"wire and signal are times from 0 on, got {wire!r} and {signal!r}")
    takes = {"forward": 1.0, "recompute": 1.0, "backward": 2.0, "local gradient": 1.0 + signal}
    todo = [
        [
            (machine, task, batch, micro)
            for batch in range(batches)
            for part in order
            for micro in range(micro_batches)
            for task in part
        ]
        for machine in range(machines)
    ]
    ends: dict[Task, float] = {}
    rows = []
    at = [0] * machines  # how many tasks each machine has done
    free = [0.0] * machines
    while len(ends) < sum(map(len, todo)):
        for machine, tasks in enumerate(todo):
            while at[machine] < len(tasks):
                task = tasks[at[machine]]
                needs = list(_needs(task, machines))
                if not all(need in ends for need in needs):
                    break
                arrived = [ends[need] + (wire if need[0] != machine else 0.0) for need in needs]
                start = max([free[machine], *arrived])
                ends[task] = free[machine] = start + takes[task[1]]
                rows.append((*task, start, ends[task]))
                at[machine] += 1
    return pd.DataFrame(rows, columns=["machine", "task", "batch", "micro_batch", "start", "end"])


def steady(table: "pd.DataFrame") -> dict[str, float]:
    """Return what a simulation of two batches or more settles to: `busy`, `rate` and `held`.

    `busy`: the part of the time in which machines compute. `rate`: micro-batches in a unit of time. `held`: of how many
    micro-batches a machine holds what their gradient needs, at the most.
    """
    first = table[table["machine"] == 0].groupby("batch")["start"].min()
    if len(first) < 2:
        raise ValueError("how a pipeline settles takes two batches or more to see")
    period = first.iloc[-1] - first.iloc[-2]
    last = table[table["batch"] == table["batch"].max()]
    work = (last["end"] - last["start"]).sum() / (table["machine"].max() + 1)
    born = "recompute" if (last["task"] == "recompute").any() else "forward"
    taught = last["task"].isin(["backward", "local gradient"])
    changes = [(time, 1) for time in last[(last["task"] == born) & (last["machine"] == 0)]["start"]]
    changes += [(time, -1) for time in last[taught & (last["machine"] == 0)]["end"]]
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    micro_batches = table["micro_batch"].max() + 1
    return {"busy": work / period, "rate": micro_batches / period, "held": most}


def _needs(task: Task, machines: int) -> Iterator[Task]:
    """Yield what must be there, from whichever machine, before the task can begin."""
    machine, name, batch, micro = task
    last = machines - 1
    if name in ("forward", "recompute") and machine > 0:
        yield machine - 1, name, batch, micro
    if name == "backward" and machine < last:
        yield machine + 1, name, batch, micro
    if name == "local gradient" or (name == "recompute" and machine == 0) or (name == "backward" and machine == last):
        yield last, "forward", batch, micro  # e
