"""A store in the machine's memory, for a device; a GPU computes while blocks are copied."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.devices import CPU, accelerator, check_device, module_of
from memdfa_lab.lab.elsewhere import Coming, Elsewhere


class Host(Elsewhere):
    """A store in the machine's memory for the blocks of a network that computes on a GPU, one block at a time.

    `device`: where blocks compute; default: the machine's accelerator. On "cpu" no memory is saved, and a prediction
    gives what a `Disk` with ahead=0 holds. `ahead`: how many blocks are copied before they are needed. On a device with
    streams, such as CUDA's, copies from and to pinned memory run on a stream of their own, during the computation. The
    store ends with the process: save `state_dict()`. It has not been run on a GPU yet.

    Raises ValueError for a device that is not there.
    """

    def __init__(self, device: str | None = None, *, ahead: int = 1):
        super().__init__(ahead)
        self.device = check_device(device or accelerator() or "cuda")
        self._kept: dict[int, dict[str, Tensor]] = {}  # pinned if there is a stream
        self._module = module_of(self.device)
        has_streams = self.device != CPU and hasattr(self._module, "Stream")
        self._stream = self._module.Stream(self.device) if has_streams else None

    def __str__(self) -> str:
        return "the machine's memory"

    def write(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        kept = self._kept.setdefault(i, {})
        if self._stream is not None and any(tensor.device.type == CPU for tensor in tensors.values()):
            self._stream.synchronize()  # copies by the CPU do not wait for the stream
        with self._copying():
            for name, tensor in tensors.items():
                if name not in kept:
                    kept[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._stream is not None)
                kept[name].copy_(tensor, non_blocking=True)
                if self._stream is not None and tensor.device.type != CPU:
                    tensor.record_stream(self._stream)

    def read(self, i: int, wanted: Callable[[str], bool]) -> Coming:
        with self._copying():
            found = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor, non_blocking=True)
                for name, tensor in self._kept[i].items()
                if wanted(name)
            }

        def wait() -> dict[str, Tensor]:
            if self._stream is not None:
                now = self._module.current_stream(self.device)
                now.wait_stream(self._stream)
                for tensor in found.values():
                    tensor.record_stream(now)
            return found

        return wait

    def _copying(self) -> Any:
        """Return the context of copies; they begin after all work that the device has been given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(self._module.current_stream(self.device))
        return self._module.stream(self._stream)
