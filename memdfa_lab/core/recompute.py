"""A forward pass that leaves nothing behind, so that it can be run again with the same result.

Pass 1 of MEM-DFA (Chu et al. 2020) needs only the network's output. Whatever else a forward pass changes, the random
number generator and the buffers, is put back, so that pass 2 draws the same dropout masks and updates BatchNorm's
statistics once.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from memdfa_lab.core import local
from memdfa_lab.core.phases import label, phase


def forward_without_trace(blocks: Iterable[nn.Module], x: Tensor, first: int = 0) -> Tensor:
    """Return the output of `blocks` for `x`: no graph, generators and buffers as they were before.

    `first`: the number of the first of these blocks in the network, for who listens to the phases.
    """
    with torch.no_grad(), generators_put_back(x.device):
        h = x
        for i, block in enumerate(blocks, first):
            with phase("forward", i), buffers_put_back(block):  # by block: copies of all buffers would grow with depth
                h = local.prepare(block, h).output()
    return h


def generators_put_back(device: torch.device) -> AbstractContextManager[None]:
    """Put torch's global generators, the CPU's and that of `device`, back on leaving."""
    on_accelerator = [device] if device.type not in ("cpu", "meta") else []
    return torch.random.fork_rng(on_accelerator, device_type=device.type if on_accelerator else "cuda")


@contextmanager
def buffers_put_back(module: nn.Module) -> Iterator[None]:
    """Put the module's buffers back on leaving, both the tensors and what they hold."""
    owners = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    # An expanded buffer (stride 0) cannot be written to, nor copied into. BatchNorm does not count its writes as
    # versions of the buffer, so there is no asking what has changed.
    saved = [None if b is None or 0 in b.stride() else label("workspace", b.clone()) for _, _, b in owners]
    try:
        yield
    finally:
        with torch.no_grad():
            for (part, name, buffer), before in zip(owners, saved, strict=True):
                part._buffers[name] = buffer
                if buffer is not None and before is not None:
                    buffer.copy_(before)
