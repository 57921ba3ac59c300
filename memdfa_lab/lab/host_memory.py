"""Tensors of blocks in the machine's memory, copied to and from a device, on a GPU beside its computation."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memdfa_lab.lab.place import FEEDBACK


class HostMemory:
    """The tensors of blocks, pinned if `device` is a GPU: then copies are made by the GPU, on a stream of their own.

    Attributes:
        device: On which the blocks compute.
    """

    def __init__(self, device: str):
        self.device = device
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._texts: dict[int, dict[str, str]] = {}
        self._stream = None if device == "cpu" else torch.cuda.Stream(device)

    def __str__(self) -> str:
        return "the machine's memory"

    @property
    def is_filled(self) -> bool:
        return False  # only in this process, whose store knows it

    def check(self, network: str) -> None:
        """A process has one network here."""

    def write(self, i: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Take over the tensors and texts of block i."""
        here = self._tensors.setdefault(i, {})
        self._texts[i] = dict(metadata)
        with self._copying():
            for name, tensor in tensors.items():
                if name not in here:
                    here[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
                here[name].copy_(tensor, non_blocking=True)
                if self._stream is not None and tensor.is_cuda:
                    tensor.record_stream(self._stream)

    def write_feedback(self, i: int, B: Tensor) -> None:
        """Take over B_i, which never changes."""
        self.write(i, {FEEDBACK: B}, self._texts[i])

    def header(self, i: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return nothing: no network from before is here."""
        return {}, {}

    def read(self, i: int, wanted: Callable[[str], bool], feedback: bool = False) -> "_Copies":
        """Begin to copy the tensors of block i whose names are wanted, and B_i as FEEDBACK."""
        with self._copying():
            found = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor, non_blocking=True)
                for name, tensor in self._tensors[i].items()
                if (feedback if name == FEEDBACK else wanted(name))
            }
        return _Copies(found, self._stream)

    def _copying(self) -> Any:
        """Return the context of copies, which begin when all that has been asked of the GPU is done."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)


class _Copies(NamedTuple):
    tensors: dict[str, Tensor]
    stream: Any

    def result(self) -> dict[str, Tensor]:
        if self.stream is not None:
            now = torch.cuda.current_stream(self.stream.device)
            now.wait_stream(self.stream)
            for tensor in self.tensors.values():
                tensor.record_stream(now)
        return self.tensors
