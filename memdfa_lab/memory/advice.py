"""What the peak of a plain training loop is made of, and what would lower it."""

from collections import Counter

from memdfa_lab.memory.events import Event
from memdfa_lab.memory.trace import Trace

LOWER = {
    "gradients": "update each weight within the backward pass, as ml.BASELINES['step_in_backward'] does",
    "activations": "run blocks again by checkpointing, or train by MEM-DFA, which keeps one block's",
    "temporaries of the optimizer": "give the optimizer fused=True",
}
WORTH_IT = 0.1  # of the peak


def advice(trace: Trace) -> str:
    """Return one or two sentences, or "" for a rule's step (it has a table) or a trace without a backward pass."""
    if {event.phase for event in trace.events} != {"", "backward"}:
        return ""
    births = {id(event.storage): event for event in reversed(trace.events)}
    ends = {id(event.storage): event for event in trace.events if event.change_bytes < 0}
    sizes: Counter[str] = Counter()
    for event in trace.events[: int(trace.totals.argmax())]:
        key = id(event.storage)
        sizes[_kind(births[key], ends.get(key))] += event.change_bytes
    shares = {kind: size / trace.peak_bytes for kind, size in sizes.most_common() if size > 0}
    parts = ", ".join(f"{share:.0%} {kind}" for kind, share in shares.items() if share >= 0.005)
    ways = [f"for {kind}, {LOWER[kind]}" for kind, share in shares.items() if kind in LOWER and share >= WORTH_IT]
    return f"The peak is {parts}." + (f" To lower it: {'; '.join(ways)}." if ways else "")


def _kind(born: Event, end: Event | None) -> str:
    if born.storage.category == "gradients":
        return "gradients"
    if end is None:
        return "tensors that stay (an optimizer's state, results)"
    if born.name.startswith("aten::_foreach_"):
        return "temporaries of the optimizer"
    if born.phase == "backward":
        return "signals of the backward pass"
    return "activations" if end.phase == "backward" else "other tensors"
