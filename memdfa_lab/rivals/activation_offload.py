"""BP whose activations wait in a file: the forward pass writes what autograd saves, and the backward pass reads it."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memdfa_lab.core.checks import check_type
from memdfa_lab.core.compat import storage_id
from memdfa_lab.core.devices import CPU, module_of
from memdfa_lab.core.phases import label
from memdfa_lab.core.watcher import has_data, unwatched
from memdfa_lab.rivals.lean_bp import LeanBP


class ActivationOffload(LeanBP):
    """BP, bit for bit, with one block's activations and gradients in memory; the other activations are on the disk.

    torch's hooks write what autograd saves in the forward pass to an unnamed file in `folder`. The default is the
    system's folder for temporary files, which may itself be in memory: name a folder on a disk. The system frees the
    file when the step ends, also after an error. Weights, buffers and x are in memory anyway, and are not written. A
    tensor that two operations save is written twice. Each block is updated in the backward pass. On a GPU, activations
    wait in the host's memory (not run on one yet).

    `written_bytes`: the bytes that the last step wrote; a memory profile does not count them. `feedback` is not used.
    Raises TypeError if `folder` is no path; ValueError if there is no such folder, and for clip_global_norm; OSError
    from a step if the disk is full.
    """

    checkpoints, updates_in_backward = False, True

    def __init__(self, *given: Any, folder: str | Path | None = None, **options: Any):
        super().__init__(*given, **options)
        check_type("folder", folder, str | Path | None, "the path of a folder on a disk, such as '/var/tmp'")
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"there is no folder {str(folder)!r} for the activations of a step: make it first")
        self.folder, self.written_bytes = folder, 0

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        with tempfile.TemporaryFile(dir=self.folder) as file:
            self._file = file
            return super().step(x, y)

    def _forward_in_segments(self, h: Tensor) -> Tensor:
        stay = [*self.blocks.parameters(), *self.blocks.buffers(), h]
        waiting = _Waiting(self._file, {storage_id(tensor) for tensor in stay if tensor.layout is torch.strided})
        with saved_tensors_hooks(waiting.put, waiting.take):
            h = super()._forward_in_segments(h)
        self.written_bytes = waiting.size_bytes
        return h


class _Saved(NamedTuple):
    """Where a saved tensor is in the file, and its layout."""

    at: int
    extent: int  # how many numbers it spans, from its first to its last
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    host: Tensor | None


class _Waiting:
    """What autograd has saved, in a file; tensors on the storages in `stay` remain in memory."""

    def __init__(self, file: Any, stay: set[int]):
        self.file, self.stay, self.size_bytes = file, stay, 0

    @torch.no_grad()
    def put(self, tensor: Tensor) -> Any:
        if tensor.layout is not torch.strided or storage_id(tensor) in self.stay:
            return tensor
        shape, stride, at = tensor.shape, tensor.stride(), self.size_bytes
        extent = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if tensor.numel() else 0
        line = tensor.detach().as_strided((extent,), (1,))
        self.size_bytes += extent * tensor.itemsize
        host = None
        if tensor.device.type not in (CPU, "meta"):
            pinned = hasattr(module_of(tensor.device), "Stream")
            host = torch.empty(extent, dtype=tensor.dtype, pin_memory=pinned).copy_(line, non_blocking=pinned)
        elif has_data(tensor):
            with unwatched():
                self.file.seek(at)
                self.file.write(line.view(torch.uint8).numpy().data)
        return _Saved(at, extent, shape, stride, tensor.dtype, tensor.device, host)

    @torch.no_grad()
    def take(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        line = label("activations", torch.empty(saved.extent, dtype=saved.dtype, device=saved.device))
        if saved.host is not None:
            line.copy_(saved.host, non_blocking=True)
        elif has_data(line):
            with unwatched():
                self.file.seek(saved.at)
                self.file.readinto(line.view(torch.uint8).numpy().data)
        return line.as_strided(saved.shape, saved.stride)
