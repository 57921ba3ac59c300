"""What a step holds, counted: every storage that is born or freed in it, in order, to the byte.

A TorchDispatchMode sees each operation that torch runs. A storage that comes out of one for the first time was born
there; a weak reference tells when it is freed. Views and in-place operations have the storage of another tensor and
count nothing. What an operation allocates and frees inside itself is not seen (`memory.process` sees that too).
"""

import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from memdfa_lab.core import phases
from memdfa_lab.core.checks import whole
from memdfa_lab.memory.trace import Event, Storage, Trace

Known = Callable[[], Mapping[str, Iterable[Tensor]]]
Run = Callable[[Any, Any, Any], Any]
# What is born in a phase, unless it is labelled or turns out to be something else; in others, workspace.
BORN_IN = {
    "forward": "activations",
    "recompute": "activations",
    "error": "error",
    "backward": "error",
    "local gradient": "error",
}
SILENT = ("prim::", "profiler::")  # questions and markers, not operations


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation."""
    return func(*args, **kwargs)


def measure(
    step: Any, *batch: Tensor, steps: int = 1, warm_up: int = 0, tensors: Known | None = None, run: Run = call
) -> Trace:
    """Run steps on a batch and return what they held.

    `step` is anything with a method `step`, or a callable; it is called with the batch, `steps` times, as it would be
    without us: the results are the same, bit for bit. `warm_up` steps before are not counted: the first step makes the
    optimizer's state and stored feedback, which rest from then on (and are all that there is with `steps=0`). `tensors`
    tells what rests, by category; it is `step.tensors` if there is one. The batch rests too, as "input".
    `run(func, args, kwargs)` runs each operation.

    Whatever the step raises goes through; use `Ledger` to look at a step that fails.
    """
    whole("steps", steps, 0)
    whole("warm_up", warm_up, 0)
    if not all(isinstance(tensor, Tensor) for tensor in batch):
        raise TypeError(f"a batch is tensors, such as x and y; got {', '.join(type(item).__name__ for item in batch)}")
    take = as_callable(step)
    known: Known = getattr(step, "tensors", dict) if tensors is None else tensors
    for _ in range(warm_up):
        take(*batch)
    with Ledger(lambda: {**known(), "input": batch}, run) as ledger:
        for _ in range(steps):
            take(*batch)
    return ledger.trace()


def as_callable(step: Any) -> Callable[..., Any]:
    """Return a rule's step, or what can be called as it is. Raises TypeError for anything else."""
    take = getattr(step, "step", step)
    if not callable(take):
        raise TypeError(f"measure takes a rule or a function of the batch, not a {type(step).__name__}")
    return take


class Ledger(TorchDispatchMode):
    """Count all that is born and freed within it; `trace()` gives the account, also after an exception.

    `known` is called at the start, for what rests (category -> tensors), and once more at the end, so that what was
    made in between to stay (an optimizer's state) is known too. `run(func, args, kwargs)` runs an operation.
    """

    def __init__(self, known: Known = dict, run: Run = call):
        super().__init__()
        self.known, self.run = known, run
        self.events: list[Event] = []
        self.resting: dict[str, int] = {}
        self._storages: dict[int, Storage] = {}  # by address, while they live
        self._alive: dict[int, Any] = {}  # weak references to them
        self._operations, self._name = 0, ""
        self._phases: list[tuple[str, int | None]] = [("", None)]
        # In the backward pass, a node's sequence number tells which block's forward pass made it.
        self._numbers: list[int] = []
        self._blocks: list[int | None] = []

    def __enter__(self) -> "Ledger":
        self._started, self._thread = time.perf_counter(), get_ident()
        for category, tensors in self.known().items():
            for tensor in tensors:
                if address(tensor) not in self._storages:
                    storage = self._watch(tensor, category, "resting")
                    self.resting[category] = self.resting.get(category, 0) + storage.size_bytes
        phases.listeners.append(self)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, problem, traceback)
        phases.listeners.remove(self)
        for category, tensors in self.known().items():
            for tensor in tensors:
                self._call_it(category, tensor)
        self._alive.clear()  # nothing more is noted

    def trace(self) -> Trace:
        """Return the account so far."""
        return Trace(self.events, self.resting)

    # What the rule says (`memdfa_lab.core.phases`); not in other threads: of these, autograd's alone have our mode.

    def _is_ours(self) -> bool:
        return get_ident() == self._thread or self in _get_current_dispatch_mode_stack()

    def enter(self, name: str, block: int | None) -> None:
        if self._is_ours():
            self._phases.append((name, block))
            self._note_node(block)

    def leave(self) -> None:
        if self._is_ours():
            self._phases.pop()
            self._note_node(self._phases[-1][1])

    def label(self, category: str, tensor: Tensor) -> None:
        if self._is_ours():
            self._call_it(category, tensor)

    def _note_node(self, block: int | None) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._blocks.append(block)

    # What torch does.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith(SILENT):
            return func(*args, **kwargs)
        out = self.run(func, args, kwargs)
        self._operations, self._name = self._operations + 1, name
        node = torch._C._current_autograd_node()
        accumulates = node is not None and node.name().endswith("AccumulateGrad") and self._phases[-1][0] != "update"
        for tensor in tensors_in(out):
            untyped = tensor.untyped_storage()
            seen = self._storages.get(untyped._cdata)
            if seen is None:
                was_there = name != "aten::lift_fresh" and address(tensor) in map(address, tensors_in((args, kwargs)))
                seen = self._watch(tensor, self._category(), "outside" if was_there else "born")
                self._note(seen.size_bytes, seen, node)
            elif seen.size_bytes != untyped.nbytes():  # resized
                change = untyped.nbytes() - seen.size_bytes
                seen.size_bytes += change
                self._note(change, seen, node)
            if accumulates:
                self._call_it("gradients", tensor)
        return out

    def _category(self) -> str:
        return BORN_IN.get(self._phases[-1][0], "workspace")

    def _call_it(self, category: str, tensor: Tensor) -> None:
        storage = self._storages.get(address(tensor))
        if storage is not None and storage.kind == "born":
            storage.category = category

    def _watch(self, tensor: Tensor, category: str, kind: str) -> Storage:
        untyped = tensor.untyped_storage()
        storage = Storage(category, untyped.nbytes(), tuple(tensor.shape), str(tensor.dtype)[6:], kind)
        self._storages[untyped._cdata] = storage
        self._alive[untyped._cdata] = weakref.ref(untyped, partial(self._freed, untyped._cdata))
        return storage

    def _freed(self, address: int, reference: Any) -> None:
        del self._alive[address]
        storage = self._storages.pop(address)
        self._note(-storage.size_bytes, storage, torch._C._current_autograd_node())

    def _note(self, change: int, storage: Storage, node: Any) -> None:
        if change == 0 or storage.kind == "outside":
            return
        phase, block = self._phases[-1]
        if block is None and node is not None and self._numbers:
            block = self._blocks[bisect_right(self._numbers, node._sequence_nr()) - 1]
        seconds = time.perf_counter() - self._started
        self.events.append(Event(seconds, self._operations, self._name, phase, block, change, storage))


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an operation's arguments, or in what it returns."""
    if isinstance(value, Tensor):  # with another layout it keeps several storages, each a tensor of its own
        return [value] if value.layout is torch.strided else []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    return [tensor for item in value for tensor in tensors_in(item)]
