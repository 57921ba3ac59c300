"""One network on several processes, each with its part of the batch: data-parallel training, as torchrun starts it.

The loss is a mean over the whole batch of N examples. A rank with n of them scales its e by n / N; then the sum over
ranks of each block's gradients is the gradient of that loss. What goes over the wire in a step is three numbers with
the loss, and each gradient once, block by block: MEM-DFA sends block i's while block i + 1 is run again, and updates
block i before block i + 1 has its gradient, so that every rank holds one block's gradients, and room to send them from.
B is drawn from its seed on each rank and never sent.

gloo on the CPU; nccl on CUDA (written, not run).
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from memdfa_lab.core import group as core
from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.phases import label

TIMEOUT_S = 60.0


class RankLost(RuntimeError):
    """Another process has ended, or answers no more."""


class Group(core.Group):
    """The ranks that train together; `Group()` is one process alone, and changes nothing.

    `idle`: this rank has no example of its own in the batch; what it computes counts for nothing. `asked`: it wants to
    stop after this step; `stop`: some rank did, before this step, so that all stop after it.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu", timeout_s: float = TIMEOUT_S):
        self.rank, self.size, self.device, self.timeout_s = rank, size, device, timeout_s
        self.idle = self.asked = self.stop = False
        self._then: Callable[[], None] | None = None
        self._begun: Sequence[Tensor] | None = None  # the parameters whose gradients are on their way
        self._works: list[Any] = []
        self._rooms: dict[tuple[str, torch.dtype], Tensor] = {}

    def __deepcopy__(self, memo: Any) -> "Group":
        return self  # processes are not copied with a module

    # What a rule needs.

    def reduce_loss(self, loss: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole batch's loss, 0-d, and this rank's rows of its e, (n, C), from those of its own part."""
        if self.size == 1:
            return loss, e
        n = 0 if self.idle else len(e)
        bad = 0 * e.sum().item()  # NaN if e is not finite: then so is the loss, on every rank, and none goes on
        total, N, asked = self.total([n * loss.item() + bad, n, self.asked], "the loss").tolist()
        self.stop = asked > 0
        return loss.new_tensor(total / N), e.mul_(n / N)

    def start_sum(self, parameters: Sequence[Tensor], update: Callable[[], None]) -> None:
        """Begin to sum these parameters' gradients over ranks; `finish_sum` calls `update`. Alone: call it now."""
        self._then = update
        if self.size == 1:
            self.finish_sum()
        else:
            self._begin(parameters)

    def finish_sum(self) -> None:
        """Do what `start` was told to do then, if it has not been done."""
        then, self._then = self._then, None
        if then is not None:
            then()

    def sum(self, parameters: Sequence[Tensor]) -> None:
        """Make these parameters' gradients those of the whole batch; wait for them, if `start` has begun."""
        if self.size == 1:
            return
        if self._begun is not parameters:
            self._begin(parameters)
        for work in self._works:
            self._call("a block's gradients", work.wait)
        self._begun, self._works = None, []

    def _begin(self, parameters: Sequence[Tensor]) -> None:
        self._begun, self._works = parameters, []
        learned = [parameter for parameter in parameters if parameter.grad is not None]
        for dtype in dict.fromkeys(parameter.dtype for parameter in learned):
            alike = [parameter for parameter in learned if parameter.dtype == dtype]
            sizes = [parameter.numel() for parameter in alike]
            room = self._room("gradients", dtype, sum(sizes))
            for parameter, part in zip(alike, room.split(sizes), strict=True):
                # In logical order: the layout of a convolution's gradient depends on how many images a rank has.
                part = part.view(parameter.shape)
                parameter.grad = part.copy_(parameter.grad)
            self._works.append(self._call("a block's gradients", dist.all_reduce, room, async_op=True))

    def _room(self, use: str, dtype: torch.dtype, n: int) -> Tensor:
        """Return room for n numbers, from what is kept for this use: gloo lets go of what it has sent a moment late."""
        room = self._rooms.get((use, dtype))
        if room is None or len(room) < n:
            room = self._rooms[use, dtype] = label("gradients", torch.empty(n, dtype=dtype, device=self.device))
        return room[:n]

    @property
    def send_buffers(self) -> list[Tensor]:
        """What is kept to send from: as much as the largest block's gradients, and as the longest vector."""
        return list(self._rooms.values())

    # What a training run needs.

    def part(self, chosen: Tensor) -> Tensor:
        """Return this rank's part of a batch, (n,); if it has none, one example of another, and be idle."""
        mine = chosen.tensor_split(self.size)[self.rank]
        self.idle = len(mine) == 0
        return chosen[:1] if self.idle else mine

    def mean(self, value: float, n: int) -> float:
        """Return the mean over all examples of a mean over this rank's n."""
        if self.size == 1:
            return value
        total, N = self.total([value * n, n], "a mean").tolist()
        return total / N

    def draw_apart(self, *numbers: int) -> None:
        """Seed torch's global generators from these numbers and the rank, so that no two ranks drop the same units."""
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1)[0]))

    def share_buffers(self, model: nn.Module) -> None:
        """Give every rank the first one's buffers (BatchNorm's statistics), to evaluate one network."""
        if self.size == 1:
            return
        for buffer in model.buffers():
            if 0 not in buffer.stride():  # an expanded one cannot be written to: it is a constant
                sent = buffer.contiguous()
                self._call("buffers", dist.broadcast, sent, 0)
                if self.rank:
                    buffer.copy_(sent)

    def agree(self, **facts: Any) -> None:
        """Raise ValueError on every rank if a fact is not the same on all of them."""
        if self.size == 1:
            return
        texts = {name: str(value) for name, value in facts.items()}
        everyone: list[Any] = [None] * self.size
        self._call("the settings", dist.all_gather_object, everyone, texts)
        for rank, theirs in enumerate(everyone):
            for name in (name for name in everyone[0] if theirs.get(name) != everyone[0][name]):
                first, other = first_difference(everyone[0][name], theirs.get(name))
                raise ValueError(
                    f"ranks differ in {name}: {first} on rank 0, {other} on rank {rank}; start all of them with the "
                    "same arguments"
                )

    def total(self, values: Tensor | Sequence[float], what: str) -> Tensor:
        """Return the sum over ranks of a vector, in float64; `what` it is, for the error."""
        vector = torch.as_tensor(values, dtype=torch.float64)
        room = self._room("totals", vector.dtype, len(vector)).copy_(vector)
        self._call(what, dist.all_reduce, room)
        return room.clone()

    def _call(self, what: str, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return run(*args, **options)
        except RuntimeError as problem:
            raise RankLost(
                f"rank {self.rank} of {self.size} waited for {what} of another rank, which has ended or is more than "
                f"{self.timeout_s:g} s behind: look for its error; from a checkpoint, the same command goes on"
            ) from problem


@contextmanager
def ranks(device: str = "cpu", timeout_s: float = TIMEOUT_S) -> Iterator[Group]:
    """Join the processes that torchrun has started, for as long as the block runs; without torchrun, be alone.

    `device`: cpu (gloo) or cuda (nccl), each rank then having the GPU of its number on the machine. `timeout_s`: how
    long a rank waits for another before it ends with RankLost. Raises ValueError for a timeout that is not above 0, and
    for a GPU that is not there.
    """
    if not timeout_s > 0:
        raise ValueError(f"the timeout must be a number of seconds above 0, got {timeout_s!r}")
    size, on_gpu = int(os.environ.get("WORLD_SIZE", 1)), device.startswith("cuda")
    if size == 1:
        yield Group(device=device)
        return
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} is not there: use cpu, or install a torch that finds your GPU")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # Its functions hold the group that there is when it is first imported, as an optimizer does in its first step; the
    # group's threads would outlive `destroy_process_group`, and now and then abort the interpreter at its end.
    import_module("torch.distributed.nn")

    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    except RuntimeError as problem:
        raise RankLost(
            f"not all of the {size} ranks came together within {timeout_s:g} s: start all of them"
        ) from problem
    try:
        yield Group(dist.get_rank(), size, device, timeout_s)
    finally:
        dist.destroy_process_group()


def digest(*tensors: Tensor) -> str:
    """Return a short fingerprint of what the tensors hold."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:12]
