"""From gradients to updates: gradients are unscaled, clipped and passed to the optimizers."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_finite, check_number, check_type
from memdfa_lab.core.group import Group
from memdfa_lab.core.local import BlockGradient
from memdfa_lab.core.phases import phase
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.signal import Signal
from memdfa_lab.core.store import IN_MEMORY, NORM, Store
from memdfa_lab.core.terms import Terms


class Updates:
    """The updates of a rule's blocks, one optimizer a block."""

    so_far: ClassVar[str] = "no weight was changed"  # what is true when the loss of a batch is found
    leaves_blocks: ClassVar[bool] = False  # whether a block, once taught, is not needed again in the step
    chain: list[nn.Module]
    parameters: list[list[nn.Parameter]]  # those that learn, by block
    optimizers: list[torch.optim.Optimizer | None]

    def __init__(self, clip_norm: float | None, clip_global_norm: float | None, offload: Store | None):
        for name, limit in (("clip_norm", clip_norm), ("clip_global_norm", clip_global_norm)):
            if limit is not None:
                check_number(name, limit, or_more=False)
        if clip_norm is not None and clip_global_norm is not None:
            raise ValueError("clip_norm is of one block's gradient, clip_global_norm of all: give one of them")
        check_type("offload", offload or IN_MEMORY, Store, "a store, such as ml.offload.Disk(folder)")
        if offload is not None and not self.leaves_blocks:
            raise ValueError(
                f"{type(self).__name__} cannot offload: MEM-DFA's step alone takes weights from a store; take MemDFA, "
                "or leave offload out"
            )
        self.clip_norm, self.clip_global_norm = clip_norm, clip_global_norm
        self.group = Group()
        self.store = IN_MEMORY if offload is None else offload
        self.scalers: list[torch.amp.GradScaler] = []  # one a block in float16
        self._unscaled: int | None = None  # the block whose gradient has been divided by its scale
        self._norm: Tensor | None = None  # of all gradients, 0-d, if they are clipped by it
        self._terms: Terms | None = None

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return the signal that block i is taught."""
        raise NotImplementedError

    def begin_updates(self) -> None:
        """Forget the last step's norm. Raises ValueError for a setting that several processes cannot use."""
        self._norm = None
        given = {"clip_global_norm": self.clip_global_norm, "float16": self.scalers, "offload": self.store.offloads}
        alone = [name for name, value in given.items() if value]
        if alone and self.group.size > 1:
            raise ValueError(f"for one process only: {', '.join(alone)}; use clip_norm, bfloat16, no offload")

    def update_all(self, blocks: Iterable[int]) -> None:
        """Update these blocks by the gradients they hold."""
        if self.clip_global_norm is not None:
            for i in blocks:
                self._add_penalties(i)
                self._add_norm(i)
            self._check_norm()
        for i in blocks:
            self.update(i)

    def find_norm(self, x: Tensor, e: Tensor) -> None:
        """Form each block's gradient on x (N, ...), add up its norm, and drop it; everything else is restored."""

        def learn(i: int, block: BlockGradient) -> None:
            if self.parameters[i]:
                with torch.enable_grad(), phase("local gradient", i):
                    block.learn(self.signal(i, e.clone() if i == len(self.chain) - 1 else e))
                    self._add_penalties(i, once=False)
                self._add_norm(i)
                for parameter in self.parameters[i]:
                    parameter.grad = None

        forward_without_trace(self.chain, x, learn=learn, store=self.store, use=NORM)
        self._check_norm()

    def _add_norm(self, i: int) -> None:
        gradients = [p.grad for p in self.parameters[i] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients).double()
        self._norm = norm if self._norm is None else torch.hypot(self._norm, norm.to(self._norm.device))

    def _check_norm(self) -> None:
        if self._norm is not None:
            check_finite("the norm of all gradients is not finite", self._norm)

    def update(self, i: int) -> None:
        """Update block i's weights by the gradients they hold, and free the gradients."""
        self._add_penalties(i)
        optimizer = self.optimizers[i]
        if optimizer is None:
            return
        self.group.sum(self.parameters[i])
        with phase("update", i):
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters[i], self.clip_norm)
            if self.clip_global_norm is not None and self._norm is not None:
                nn.utils.clip_grads_with_norm_(self.parameters[i], self.clip_global_norm, self._norm)
            if self._unscaled == i:
                self.scalers[i].step(optimizer)
                self.scalers[i].update()
            else:
                optimizer.step()
            for parameter in self.parameters[i]:
                parameter.grad = None  # as zero_grad does, whose call takes longer than the step of a small block

    def _unscale(self, i: int) -> None:
        optimizer = self.optimizers[i]
        self._unscaled = None
        if self.scalers and optimizer is not None and any(p.grad is not None for p in self.parameters[i]):
            self._unscaled = i  # a block without a gradient is not updated in this step
            self.scalers[i].unscale_(optimizer)

    def _add_penalties(self, i: int, once: bool = True) -> None:
        if self._terms is not None:
            self._terms.add(i, self.group.share, once)
            if not self._terms.leaves:
                self._terms = None  # frees the loss's graph
