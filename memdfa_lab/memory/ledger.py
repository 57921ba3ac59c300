"""A step's memory, counted: every storage that is allocated ("born") or freed in it, in order, to the byte.

A watcher (`core.watcher`) sees each operation that torch runs. A storage is born in the operation that first returns
it; a weak reference tells when it is freed. Views and in-place operations use the storage of another tensor and count
nothing. Memory that an operation allocates and frees internally is not seen (`memory.crosscheck` sees it, too).

Watching must not change the operations that torch runs. It changes one: where gradients meet, autograd adds the second
to the first in place, unless Python knows the storage of the first. Such a sum is counted as if it were in place.
"""

import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core import phases
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.compat import SUM, current_node, next_node_number, node_number, storage_id
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.watcher import Watcher, watchers
from memdfa_lab.memory.events import Event, Storage
from memdfa_lab.memory.trace import OFFLOADED, Trace

Tensors = Callable[[], Mapping[str, Iterable[Tensor]]]  # tensors by category
Run = Callable[[Any, Any, Any], Any]  # runs an operation: (operation, args, kwargs) -> its output
# The category of a storage born in a phase, unless it is labelled; in all other phases it is workspace.
BORN_IN = {
    "forward": "activations",
    "recompute": "activations",
    "error": "error",
    "backward": "error",
    "local gradient": "error",
}
SILENT = ("prim::", "profiler::")  # queries and markers, not operations
WITHOUT_MEMORY = "aten::_efficientzerotensor"  # zeros that take no memory


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation unchanged."""
    return func(*args, **kwargs)


def measure(
    step: Any, *batch: Tensor, steps: int = 1, warm_up: int = 0, tensors: Tensors | None = None, run: Run = call
) -> Trace:
    """Run steps on a batch and return a Trace of their memory. Measuring does not change the steps' results by one bit.

    `step` is anything with a method `step`, or a function; it is called with the batch, `steps` times. The `warm_up`
    steps before are not counted: a first step makes the optimizer's state and stored feedback, which then stay in
    memory (with `steps=0`, the trace has these only). `tensors` returns what is in memory between steps, by category;
    default: `step.tensors`. The batch counts as "input". `run(func, args, kwargs)` runs each operation. If the batch is
    on an accelerator, only the accelerator's memory is counted.

    Raises TypeError if the step cannot be called or the batch is not of tensors, ValueError for steps or warm_up below
    0, and what the step raises; use `Ledger` to look at a step that fails.
    """
    check_int("steps", steps, 0)
    check_int("warm_up", warm_up, 0)
    if not all(isinstance(tensor, Tensor) for tensor in batch):
        raise TypeError(f"a batch must be tensors (x, y), got {', '.join(type(item).__name__ for item in batch)}")
    take_step = as_function(step)
    if getattr(getattr(step, "store", None), "ahead", 0):
        raise ValueError("blocks that are read ahead come in by a thread that is not counted: measure with ahead=0")
    resting: Tensors = getattr(step, "tensors", dict) if tensors is None else tensors
    for _ in range(warm_up):
        take_step(*batch)
    kinds = {tensor.device.type for tensor in batch} - {"cpu", "meta"}
    with Ledger(lambda: {**resting(), "input": batch}, run, next(iter(kinds), None)) as ledger:
        for _ in range(steps):
            take_step(*batch)
    return ledger.trace()


def as_function(step: Any) -> Callable[..., Any]:
    """Return a rule's step, or a function unchanged. Raises TypeError for anything else."""
    take_step: Callable[..., Any] = getattr(step, "step", step)
    if not callable(take_step):
        raise TypeError(f"measure takes a rule or a function of the batch, not a {type(step).__name__}")
    return take_step


class Ledger(Watcher):
    """A context that records every storage born or freed in it; `trace()` returns the record, also after an exception.

    `resting` returns the tensors that are in memory between steps, by category. It is called at the start, and again at
    the end to find what was made to stay, such as an optimizer's state. `run(func, args, kwargs)` runs an operation.
    `device`: count only the memory of this kind of device, such as cuda; default: of all kinds.
    """

    def __init__(self, resting: Tensors = dict, run: Run = call, device: str | None = None):
        self.resting, self.run, self.device = resting, run, device
        self.events: list[Event] = []
        self.resting_bytes: dict[str, int] = {}
        self._storages: dict[int, Storage] = {}  # by storage_id, while they live
        self._alive: dict[int, Any] = {}  # weak references to them
        self._nodes: dict[int, int | None] = {}  # the node of autograd's graph in which each was born
        self._sum: tuple[int, int, int] | None = None  # storages of the first term and of the sum, and when it was made
        self._operations, self._name = 0, ""
        self._phases: list[tuple[str, int | None]] = [("", None)]
        # In the backward pass, a node's number tells which block's forward pass made it.
        self._numbers: list[int] = []
        self._blocks: list[int | None] = []

    def __enter__(self) -> "Ledger":
        self._started, self._thread = time.perf_counter(), get_ident()
        for category, tensors in self.resting().items():
            for tensor in tensors:
                if storage_id(tensor) not in self._storages and self._counts(tensor):
                    storage = self._watch(tensor, category, "outside" if category == OFFLOADED else "resting")
                    self.resting_bytes[category] = self.resting_bytes.get(category, 0) + storage.size_bytes
        phases.listeners.append(self)
        super().__enter__()
        return self

    def __exit__(self, *problem: object) -> None:
        super().__exit__(*problem)
        phases.listeners.remove(self)
        for category, tensors in self.resting().items():
            for tensor in tensors:
                self._set_category(category, tensor)
        self._alive.clear()  # later frees are not recorded

    def trace(self) -> Trace:
        """Return the record so far."""
        return Trace(self.events, self.resting_bytes)

    def _counts(self, tensor: Tensor) -> bool:
        return self.device is None or tensor.device.type == self.device

    # What the rule announces (`core.phases`). Announcements of other threads are ignored, except those of autograd's
    # threads, which run this step's backward pass within this watcher.

    def _is_ours(self) -> bool:
        return get_ident() == self._thread or self in watchers()

    def enter(self, name: str, block: int | None) -> None:
        if self._is_ours():
            self._phases.append((name, block))
            self._note_block(block)

    def leave(self) -> None:
        if self._is_ours():
            self._phases.pop()
            self._note_block(self._phases[-1][1])

    def label(self, category: str, tensor: Tensor) -> None:
        if self._is_ours():
            is_new = storage_id(tensor) not in self._storages and self._counts(tensor)
            if is_new and self in watchers():  # it was read from a file
                self._note(tensor.untyped_storage().nbytes(), self._watch(tensor, category, "born"), None)
            self._set_category(category, tensor)

    def _note_block(self, block: int | None) -> None:
        self._numbers.append(next_node_number())
        self._blocks.append(block)

    # What torch runs.

    def watch(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.name().partition(".")[0]
        if name.startswith(SILENT):
            return func(*args, **kwargs)
        out = self.run(func, args, kwargs)
        self._operations, self._name = self._operations + 1, name
        node = current_node()
        accumulates = node is not None and node.name().endswith("AccumulateGrad") and self._phases[-1][0] != "update"
        for tensor in filter(self._counts, tensors_in(out)):
            key, size_bytes = storage_id(tensor), tensor.untyped_storage().nbytes()
            seen = self._storages.get(key)
            if seen is None:
                given = name != "aten::lift_fresh" and key in map(storage_id, tensors_in((args, kwargs)))
                category = BORN_IN.get(self._phases[-1][0], "workspace")
                seen = self._watch(tensor, category, "outside" if given or name == WITHOUT_MEMORY else "born")
                self._nodes[key] = node and node_number(node)
                self._note(seen.size_bytes, seen, node)
                if func is SUM and node is not None and not torch.is_grad_enabled():
                    self._note_sum(storage_id(args[0]), key, node)
            elif seen.size_bytes != size_bytes:  # resized
                change, seen.size_bytes = size_bytes - seen.size_bytes, size_bytes
                self._note(change, seen, node)
            if accumulates:
                self._set_category("gradients", tensor)
        return out

    def _note_sum(self, first: int, key: int, node: Any) -> None:
        """Note a sum that may add gradients that meet: its first term is from another node, or from one with two edges.

        If so, nothing else holds the first term, and it is freed at once.
        """
        storage, edges = self._storages.get(first), node.next_functions
        may_meet = first in self._nodes and (self._nodes[first] != node_number(node) or len(set(edges)) < len(edges))
        if may_meet and storage is not None and storage.size_bytes == self._storages[key].size_bytes > 0:
            self._sum = first, key, len(self.events)

    def _set_category(self, category: str, tensor: Tensor) -> None:
        storage = self._storages.get(storage_id(tensor))
        if storage is not None and storage.kind == "born":
            storage.category = category

    def _watch(self, tensor: Tensor, category: str, kind: str) -> Storage:
        untyped, key = tensor.untyped_storage(), storage_id(tensor)
        storage = Storage(category, untyped.nbytes(), tuple(tensor.shape), str(tensor.dtype)[6:], kind)
        self._storages[key] = storage
        self._alive[key] = weakref.ref(untyped, partial(self._freed, key))
        return storage

    def _freed(self, key: int, reference: Any) -> None:
        del self._alive[key]
        storage, self._sum, made = self._storages.pop(key), None, self._sum
        self._nodes.pop(key, None)
        if made is not None and made[0] == key and made[2] == len(self.events):
            self.events.pop()
            self._storages[made[1]] = storage
            return
        self._note(-storage.size_bytes, storage, current_node())

    def _note(self, change: int, storage: Storage, node: Any) -> None:
        if change == 0 or storage.kind == "outside":
            return
        phase, block = self._phases[-1]
        if node is not None and not phase:  # a plain loop, which announces nothing
            phase = "backward"
        if block is None and node is not None and self._numbers:
            block = self._blocks[bisect_right(self._numbers, node_number(node)) - 1]
        seconds = time.perf_counter() - self._started
        self.events.append(Event(seconds, self._operations, self._name, phase, block, change, storage))
