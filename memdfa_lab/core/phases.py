"""What a rule is doing at the moment, for profilers: the phase, the block, and what a tensor is for.

Rules announce it as they run. Without a listener this costs next to nothing. Rules and profilers do not depend on each
other.
"""

from types import TracebackType
from typing import Protocol

from torch import Tensor


class Listener(Protocol):
    def enter(self, name: str, block: int | None) -> None: ...
    def leave(self) -> None: ...
    def label(self, category: str, tensor: Tensor) -> None: ...


listeners: list[Listener] = []  # a copy is iterated over: another thread may add or remove one meanwhile


class phase:
    """Within it, the step is in the phase `name` of a block: forward, error, recompute, backward, ..."""

    def __init__(self, name: str, block: int | None = None):
        self.name, self.block = name, block

    def __enter__(self) -> None:
        for listener in tuple(listeners):
            listener.enter(self.name, self.block)

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for listener in tuple(listeners):
            listener.leave()


def label(category: str, tensor: Tensor) -> Tensor:
    """Announce what a tensor is for (feedback, error, gradients, ...), also one from a file, and return it."""
    for listener in tuple(listeners):
        listener.label(category, tensor)
    return tensor
