"""A forward pass that leaves nothing behind, so that a second one has the same result.

Pass 1 of MEM-DFA (Chu et al. 2020) needs only the network's output. Whatever else a forward pass changes, the random
number generators and the buffers, is restored. Pass 2 then draws the same dropout masks, and BatchNorm's statistics are
updated once.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from memdfa_lab.core.compat import buffers_of
from memdfa_lab.core.local import block_gradient
from memdfa_lab.core.phases import label, phase


def forward_without_trace(blocks: Iterable[nn.Module], x: Tensor, first: int = 0) -> Tensor:
    """Return the output of `blocks` for x (N, ...), without a graph; generators and buffers stay as they were.

    `first` is the number of the first of these blocks in the network, for the profilers.
    """
    with torch.no_grad(), generators_restored(x.device):
        h = x
        for i, block in enumerate(blocks, first):
            with phase("forward", i), buffers_restored(block):  # by block: copies of all buffers would grow with depth
                h = block_gradient(block, h).output()
    return h


def generators_restored(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's global generators, the CPU's and that of `device`, on leaving."""
    on_accelerator = [device] if device.type not in ("cpu", "meta") else []
    return torch.random.fork_rng(on_accelerator, device_type=device.type if on_accelerator else "cuda")


@contextmanager
def buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore the module's buffers on leaving, both which tensors they are and what these hold."""
    owners = [(part, name, buffer) for part in module.modules() for name, buffer in buffers_of(part).items()]
    # An expanded buffer (stride 0) cannot be written to, nor copied into. BatchNorm's writes do not count as versions
    # of the buffer, so what has changed cannot be asked.
    saved = [None if b is None or 0 in b.stride() else label("workspace", b.clone()) for _, _, b in owners]
    try:
        yield
    finally:
        with torch.no_grad():
            for (part, name, buffer), before in zip(owners, saved, strict=True):
                buffers_of(part)[name] = buffer
                if buffer is not None and before is not None:
                    buffer.copy_(before)
