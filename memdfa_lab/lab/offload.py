"""Weights that do not rest in memory: `Disk` keeps each block's in a file, and brings in one block at a time.

`Host` does the same for a GPU, with the machine's memory in place of files.

What rests where. A block's file, in the safetensors format, has its weights and buffers under the names of
`rule.blocks.state_dict()`, the state of its optimizer as `optimizer.BLOCK.PARAMETER.NAME`, and a B that learns. Stored
B has a file of its own, which is not committed, since it follows from its seed. In memory are the block in use, the
`ahead` blocks that are read ahead, those that are being written, and what does not grow with the network: activations,
e, the loss with its parameters, one shared B.

Never half a network. A block is written to the other of its two files, a and b, and a commit brings them onto the disk
and then replaces a manifest that says which of them count. So the disk holds weights and state twice, and after a crash
the last committed step is there, whole. With `commit_every=None` a block has one file, which is written over: a crash
loses the network, and `commit` or `close` makes it whole.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from memdfa_lab.core.checks import check_int
from memdfa_lab.lab.block_files import BlockFiles
from memdfa_lab.lab.elsewhere import Elsewhere
from memdfa_lab.lab.host_memory import HostMemory
from memdfa_lab.lab.resting import Resting, state_bytes


class Disk(Elsewhere):
    """A folder in which the blocks of a network rest: `MemDFA(store.build(make), optimizer, offload=store)`.

    `folder`: is made if it is not there. `ahead`: how many blocks a thread reads before they are needed, while it also
    writes those that are done; with 0 all reading and writing is waited for. `commit_every`: after so many steps the
    folder takes them over, so that nothing that happens later can damage them; that waits for the disk. With None the
    network is there once on the disk, and whole after `commit` and `close` alone. Under glibc, opening a Disk lets this
    process give memory of 64 KiB and more back to the system as soon as it is free.

    The model's tensors have data only while their block is in use. A model in memory may be given to MemDFA as well: it
    is written to the folder, which must not have a network yet, and its memory is given back.

    Attributes:
        steps: How many steps the network has made, in all processes that had it.

    Raises ValueError for a folder that is in use, cannot be written to, or holds no whole network.
    """

    def __init__(self, folder: str | Path, *, ahead: int = 1, commit_every: int | None = 1):
        check_int("ahead", ahead, 0)
        self.commit_every = None if commit_every is None else check_int("commit_every", commit_every)
        self.folder = Path(folder)
        self._files = BlockFiles(self.folder, commit_every is not None, bool(ahead), commit_every == 1)
        self.steps: int = self._files.committed["steps"] if self._files.committed else 0
        self.progress = self._files.rest()["progress"] if self._files.committed else None
        super().__init__(self._files, ahead)

    @property
    def free_bytes(self) -> int:
        """How much the folder's disk can still hold."""
        return shutil.disk_usage(self.folder).free

    def check_rule(self, rule: Any, resting: Resting) -> None:
        before = self._files.committed or {}
        for name, value in _facts(rule).items():
            if before.get(name, value) != value:
                raise ValueError(f"{self.folder} was trained with {name} {before[name]}, and this rule has {value}")
        if not self.steps:
            self.check_space(state_bytes(rule), "the optimizer's state takes")
        loss = self._files.rest()["loss"]
        if loss is not None and rule.loss_optimizer is not None:
            rule.loss_fn.load_state_dict(loss["module"])
            rule.loss_optimizer.load_state_dict(loss["optimizer"])

    def end_step(self) -> None:
        self.steps += 1
        if self.commits_by_itself and self.due:
            self.commit()

    @property
    def due(self) -> bool:  # type: ignore[override]
        return self.commit_every is not None and self.steps % self.commit_every == 0

    def commit(self, progress: object = None) -> None:
        """Let the folder take over the network as it is now, and `progress`, what else a run needs to go on."""
        resting, loss = self._network(), None
        facts = {"network": resting.network, "steps": self.steps}
        if resting.rule is not None:
            facts |= _facts(resting.rule)
            if resting.rule.loss_optimizer is not None:
                own = resting.rule.loss_optimizer.state_dict()
                loss = {"module": resting.rule.loss_fn.state_dict(), "optimizer": own}
        with self.errors_named():
            self._files.commit(facts, {"loss": loss, "progress": progress})
        self.progress = progress

    def close(self) -> None:
        """Commit the steps since the last commit, unless one was cut short, and let others have the folder."""
        committed = self._files.committed
        if not self._broken and self.commits_by_itself and committed is not None and committed["steps"] != self.steps:
            self.commit()
        self._broken = self._broken or f"the store of {self.folder} is closed: make another"
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def filled(self) -> None:
        self.commit()

    def check_space(self, needed: int, what: str = "the network takes") -> None:
        twice = ", twice (with commit_every=None once)" if self._files.twice else ""
        if needed * (1 + self._files.twice) > self.free_bytes:
            raise ValueError(
                f"the disk of {self.folder} has {self.free_bytes:,} bytes free, and {what} {needed:,}{twice}: choose "
                "another"
            )

    def whole(self) -> str:
        committed = self._files.committed
        return f"step {committed['steps']}" if committed is not None and self._files.twice else "the beginning"

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """Say of what cannot be read or written within from where to go on; nothing more is written."""
        try:
            yield
        except OSError as problem:
            why, where = problem.strerror or problem, problem.filename or self.folder
            self._broken = f"{where} cannot be read or written ({why}): mend that, then go on from {self.whole()}"
            raise OSError(problem.errno or 0, self._broken) from problem


class Host(Elsewhere):
    """The memory of the machine, in which the blocks of a network rest that computes on a GPU, one block at a time.

    `device`: on which blocks compute; on "cpu" nothing is saved, and what a prediction with it says is what a `Disk`
    with ahead=0 holds. `ahead`: how many blocks are copied before they are needed. Copies from and to pinned memory run
    on a stream of their own, beside the computation. Nothing outlasts the process: save `state_dict()`.
    Not run on a GPU yet.

    Raises ValueError for a GPU that is not there.
    """

    def __init__(self, device: str = "cuda", *, ahead: int = 1):
        if device != "cpu" and not torch.cuda.is_available():
            raise ValueError(
                f"device {device!r} is not there: give Host(device='cpu'), or take ml.offload.Disk(folder)"
            )
        super().__init__(HostMemory(device), ahead)


def _facts(rule: Any) -> dict[str, Any]:
    """Return what must not change between the processes that train a network."""
    kinds = sorted({type(optimizer).__name__ for optimizer in rule.optimizers if optimizer is not None})
    return {"optimizer": ", ".join(kinds), "feedback": rule.feedback.settings()}
