"""One network on several processes, each with its part of the batch: data-parallel training, as torchrun starts it.

The loss is that of the whole batch, and each rank has its own examples' rows of e (`whole_loss`). The gradient of a
block is then the sum over ranks of its gradients. A step exchanges three numbers for the loss (or all logits), and each
gradient once, block by block. MEM-DFA sends block i's gradient while block i + 1 is run again, and updates block i
before block i + 1 has its gradient: every rank holds one block's gradients, and a buffer to send them from. B is drawn
from its seed on each rank and never sent.

The backend is gloo on the CPU, nccl on CUDA, xccl on XPU. The code for GPUs has not been run on one.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memdfa_lab.core import group
from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.devices import CPU, check_device, module_of
from memdfa_lab.core.phases import label
from memdfa_lab.core.seeds import mix
from memdfa_lab.lab.whole_loss import whole_error

TIMEOUT_S = 60.0


class RankLost(RuntimeError):
    """Another process has ended, or does not answer."""


class Group(group.Group):
    """The ranks that train together; `Group()` is one process alone, and changes nothing.

    Attributes:
        idle: This rank has no example of its own in the batch; its results are ignored.
        asked: This rank was asked to stop after this step.
        stop: Some rank was asked to stop before this step, so that all ranks stop after it.
        agreed: The loss whose settings were found to be the same on all ranks.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", timeout_s: float = TIMEOUT_S):
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        self.idle = self.asked = self.stop = False
        self.agreed: Any = None
        self._update: Callable[[], None] | None = None
        self._begun: Sequence[Tensor] | None = None  # the parameters whose gradients are being summed
        self._works: list[Any] = []
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo: Any) -> "Group":
        return self  # processes are not copied with a module

    # What a rule needs: `core.group` says what each method does.

    def error(
        self, loss_fn: Callable[..., Tensor], compute: group.Compute, logits: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        return compute(logits, y) if self.size == 1 else whole_error(self, loss_fn, compute, logits.detach(), y)

    def start_sum(self, parameters: Sequence[Tensor], update: Callable[[], None]) -> None:
        self._update = update
        if self.size > 1:
            self._begin(parameters)
        else:
            self.finish_sum()

    def finish_sum(self) -> None:
        update, self._update = self._update, None
        if update is not None:
            update()

    def sum(self, parameters: Sequence[Tensor]) -> None:
        if self.size == 1:
            return
        if self._begun is not parameters:
            self._begin(parameters)
        for work, alike, counts in self._works:
            self.call("a block's gradients", work.wait)
            for parameter, count in zip(alike, counts.tolist(), strict=True):
                parameter.grad = parameter.grad if count else None
        self._begun, self._works = None, []

    @property
    def send_buffers(self) -> list[Tensor]:
        return list(self._buffers.values())

    def _begin(self, parameters: Sequence[Tensor]) -> None:
        """Move the gradients into the send buffer, and begin to sum them over ranks.

        A parameter may have a gradient on some ranks only, as in layer dropout. The others then send zeros, and all
        send for each parameter whether they have one: 1 or 0.
        """
        self._begun, self._works = parameters, []
        for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
            alike = [parameter for parameter in parameters if parameter.dtype == dtype]
            sizes = [parameter.numel() for parameter in alike]
            buffer = self._buffer("gradients", dtype, sum(sizes) + len(alike))
            *parts, counts = buffer.split([*sizes, len(alike)])
            counts.copy_(torch.tensor([float(parameter.grad is not None) for parameter in alike]))
            for parameter, part in zip(alike, parts, strict=True):
                # In logical order: the layout of a convolution's gradient depends on how many images a rank has.
                part = part.view(parameter.shape)
                parameter.grad = part.zero_() if parameter.grad is None else part.copy_(parameter.grad)
            work = self.call("a block's gradients", dist.all_reduce, buffer, async_op=True)
            self._works.append((work, alike, counts))

    def _buffer(self, use: str, dtype: torch.dtype, n: int) -> Tensor:
        """Return a buffer of n numbers, kept for this use: gloo frees its send buffers a moment late."""
        buffer = self._buffers.get((use, dtype))
        if buffer is None or len(buffer) < n:
            buffer = label("gradients", torch.empty(n, dtype=dtype, device=self.device))
            self._buffers[use, dtype] = buffer
        return buffer[:n]

    # What a training run needs.

    def part(self, chosen: Tensor) -> Tensor:
        """Return this rank's part of a batch, (n,). A rank without an example gets that of another, and is idle."""
        mine = chosen.tensor_split(self.size)[self.rank]
        self.idle = len(mine) == 0
        return chosen[:1] if self.idle else mine

    def mean(self, value: float, n: int) -> float:
        """Return the mean over the examples of all ranks, where `value` is the mean over this rank's n."""
        if self.size == 1:
            return value
        total, N = self.total([value * n, n], "a mean").tolist()
        return total / N

    def draw_apart(self, *numbers: int) -> None:
        """Seed torch's global generators from these numbers and the rank, so that dropout differs between ranks."""
        if self.size > 1:
            torch.manual_seed(mix(*numbers, self.rank))

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the first rank's buffers (BatchNorm's statistics) to every rank, so that all evaluate one network."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            if 0 not in buffer.stride():  # an expanded one cannot be written to: it is a constant
                sent = buffer.contiguous()
                self.call("buffers", dist.broadcast, sent, 0)
                if self.rank:
                    buffer.copy_(sent)

    def agree(self, **facts: Any) -> None:
        """Raise ValueError on every rank if a fact is not the same on all of them."""
        if self.size == 1:
            return
        texts = {name: str(value) for name, value in facts.items()}
        everyone: list[Any] = [None] * self.size
        self.call("the settings", dist.all_gather_object, everyone, texts)
        for rank, theirs in enumerate(everyone):
            for name in (name for name in everyone[0] if theirs.get(name) != everyone[0][name]):
                first, other = first_difference(everyone[0][name], theirs.get(name))
                raise ValueError(
                    f"ranks differ in {name}: {first} on rank 0, {other} on rank {rank}; start all of them with the "
                    "same arguments"
                )

    @contextmanager
    def first_rank_first(self) -> Iterator[None]:
        """Run the with-block, such as a download, on the first rank before the others."""
        if self.rank:
            self.call("the first rank's download", dist.barrier)
        yield
        if self.size > 1 and not self.rank:
            self.call("the other ranks", dist.barrier)

    def total(self, values: Tensor | Sequence[float], what: str) -> Tensor:
        """Return the sum over ranks of a vector, in float64; `what` names the vector in an error."""
        vector = torch.as_tensor(values, dtype=torch.float64)
        buffer = self._buffer("totals", vector.dtype, len(vector)).copy_(vector)
        self.call(what, dist.all_reduce, buffer)
        return buffer.clone()

    def call(self, what: str, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return run(*args, **options). Raises RankLost, which names what is waited for, if another rank ends."""
        try:
            return run(*args, **options)
        except RuntimeError as problem:
            raise RankLost(
                f"rank {self.rank} of {self.size} waited for {what} of another rank, which has ended or is more than "
                f"{self.timeout_s:g} s behind: look for its error; the same command resumes from a checkpoint"
            ) from problem


@contextmanager
def ranks(device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Iterator[Group]:
    """Join the processes that torchrun has started, within the with-block; without torchrun, yield a group of one.

    `device`: cpu (gloo) or an accelerator (nccl on cuda), of which each rank takes the one with its local rank.
    `timeout_s`: how long a rank waits for another before it ends with RankLost. Raises ValueError for a timeout that is
    not above 0, and for a device that is not there.
    """
    if not timeout_s > 0:
        raise ValueError(f"the timeout must be a number of seconds above 0, got {timeout_s!r}")
    size, kind, backend = int(os.environ.get("WORLD_SIZE", 1)), torch.device(check_device(device)).type, "gloo"
    if size == 1:
        yield Group(device=device)
        return
    if kind != CPU:
        device = check_device(f"{kind}:{os.environ['LOCAL_RANK']}")
        module_of(kind).set_device(device)
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    # Functions of this module keep the process group that exists at its first import, and an optimizer imports it in
    # its first step. The group's threads would then outlive `destroy_process_group`, and sometimes abort the process.
    import_module("torch.distributed.nn")
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as problem:
        raise RankLost(
            f"not all of the {size} ranks have connected within {timeout_s:g} s: start all of them"
        ) from problem
    try:
        yield Group(dist.get_rank(), size, device, timeout_s)
    finally:
        dist.destroy_process_group()


def digest(*tensors: Tensor) -> str:
    """Return a short fingerprint of the tensors' values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]
