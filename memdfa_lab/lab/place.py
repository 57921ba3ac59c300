"""The place in which the tensors of blocks rest: files (`block_files`), or the machine's memory (`host_memory`)."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

FEEDBACK = "feedback"  # the name of a block's B that does not change


class Coming(Protocol):
    """Tensors that are on their way into memory."""

    def result(self) -> dict[str, Tensor]: ...


class Place(Protocol):
    """Where the tensors of blocks rest, by block and name; `str` of it says so in messages."""

    device: str  # on which blocks compute

    @property
    def is_filled(self) -> bool:
        """Whether it has a network."""

    def check(self, network: str) -> object:
        """Raise ValueError if the network that is there is damaged, or another one."""

    def write(self, i: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Take over the tensors and texts of block i."""

    def write_feedback(self, i: int, B: Tensor) -> None:
        """Take over B_i, which never changes."""

    def header(self, i: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return dtype and shape of each tensor of block i as it was when the network was last used, and its texts."""

    def read(self, i: int, wanted: Callable[[str], bool], feedback: bool = False) -> Coming:
        """Begin to read the tensors of block i whose names are wanted, and B_i as FEEDBACK."""
