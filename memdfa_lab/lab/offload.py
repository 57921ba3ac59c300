"""Stores for weights outside of memory: `Disk` keeps each block in a file, and loads one block at a time.

`Host` does the same for a GPU, with the machine's memory in place of files.

Files. A block's file, in the safetensors format, has its weights and buffers under the names of
`rule.blocks.state_dict()`, the state of its optimizer as `optimizer.BLOCK.PARAMETER.NAME`, and a B that learns. A
stored B has a file of its own, which is not committed, since it follows from its seed. In memory are the block in use,
the `ahead` blocks that are read ahead, the blocks that are being written, and what does not grow with depth:
activations, e, the loss with its parameters, one shared B.

Commits. Each block has two files, a and b, and is written to the one that is not committed. A commit syncs these files
to the disk, and then replaces `network.pt`, which lists the valid ones. The disk therefore holds weights and state
twice, and after a crash the last committed step is complete. With `commit_every=None` a block has one file, which is
overwritten: a crash then loses the network. `network.pt` marks it as invalid until `commit` or `close` completes it.
"""

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, first_difference
from memdfa_lab.core.compat import tree_map_only
from memdfa_lab.lab import tensor_files
from memdfa_lab.lab.elsewhere import Coming, Elsewhere
from memdfa_lab.lab.files import locked, read_saved, write_saved
from memdfa_lab.lab.host_memory import Host as Host
from memdfa_lab.lab.resting import FEEDBACK, give_back, kept_of, state_bytes

MANIFEST = "network.pt"
MOST_WAITING = 2  # blocks in memory that wait to be written


class Disk(Elsewhere):
    """A folder in which the blocks of a network rest: `MemDFA(store.build(make), optimizer, offload=store)`.

    `folder`: is created if it does not exist. `ahead`: how many blocks a thread reads before they are needed; it also
    writes finished blocks. With 0, the step waits for all reading and writing. `commit_every`: the number of steps
    between commits. A committed network survives a crash; a commit waits for the disk. With None the disk holds the
    network once, complete only after `commit` and `close`. Under glibc, opening a Disk makes this process return freed
    memory of 64 KiB and more to the system at once.

    The model's tensors have data only while their block is in use. A model in memory may be given to MemDFA as well: it
    is written to the folder, which must not have a network yet, and its memory is freed.

    Attributes:
        steps: How many steps the network was trained for, over all processes that used it.

    Raises ValueError for a folder that is in use, cannot be written to, or holds an incomplete network.
    """

    def __init__(self, folder: str | Path, *, ahead: int = 1, commit_every: int | None = 1):
        super().__init__(ahead)
        self.commit_every = None if commit_every is None else check_int("commit_every", commit_every)
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the network's weights")
        self._lock = ExitStack()
        self._lock.enter_context(locked(self.folder / MANIFEST))
        try:
            self._committed = self._read_manifest()
        except BaseException:
            self._lock.close()
            raise
        self.steps, self.progress = self._committed.get("steps", 0), self._committed.get("progress")
        self._newest: list[str] = list(self._committed.get("blocks", []))  # files, by block
        self._to_sync: set[str] = set()
        # One thread reads and writes in the order of the requests. A read therefore returns what was written last, and
        # waiting for it also waits for all writes before it.
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[Future[Any]] = deque()
        tensor_files.give_back_at_once()

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def is_filled(self) -> bool:  # type: ignore[override]
        return bool(self._committed)

    @property
    def free_bytes(self) -> int:
        """The free bytes of the folder's disk."""
        return shutil.disk_usage(self.folder).free

    def write(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        path, sync = self._feedback(i), False
        if FEEDBACK not in tensors:
            path, sync = self._next_path(i), self.commit_every == 1
        self._writing.append(self._start(lambda: tensor_files.write(path, tensors, sync)))
        while self._writing and (self._writing[0].done() or len(self._writing) > MOST_WAITING):
            self._writing.popleft().result()

    def read(self, i: int, wanted: Callable[[str], bool]) -> Coming:
        paths = [
            self.folder / self._newest[i],
            *([self._feedback(i)] if i in self._stored and wanted(FEEDBACK) else []),
        ]

        def job() -> dict[str, Tensor]:
            return {name: tensor for path in paths for name, tensor in tensor_files.read(path, wanted).items()}

        return self._start(job).result

    def begin(self, network: str, needed: int) -> None:
        if not self._committed:
            self._check_space(needed, "the network takes")
        elif self._committed["network"] != network:
            theirs, ours = first_difference(self._committed["network"], network)
            raise ValueError(
                f"{self.folder} holds another network: it has {theirs!r}, this one {ours!r}: choose another folder"
            )
        for name in self._newest:
            tensor_files.check(self.folder / name)

    def resume(self, rule: Any) -> None:
        for name, value in _facts(rule).items():
            if self._committed.get(name, value) != value:
                raise ValueError(
                    f"{self.folder} was trained with {name} {self._committed[name]}, and this rule has {value}: "
                    "use the same, or choose another folder"
                )
        if not self.steps:
            self._check_space(state_bytes(rule), "the optimizer's state takes")
        loss = self._committed.get("loss")
        if loss is not None and rule.loss_optimizer is not None:
            rule.loss_fn.load_state_dict(loss["module"])
            rule.loss_optimizer.load_state_dict(loss["optimizer"])
        for i, kept in enumerate(self._committed.get("kept", ())):
            give_back(i, self.chain[i], rule, kept, str(self))

    def end_step(self) -> None:
        self.steps += 1
        if self.commits_by_itself and self.due:
            self.commit()

    @property
    def due(self) -> bool:  # type: ignore[override]
        return self.commit_every is not None and self.steps % self.commit_every == 0

    def commit(self, progress: object = None) -> None:
        """Save the present network in the folder, with `progress`: what else a run needs to resume."""
        rule, loss = self._network().rule, None
        if rule is not None and rule.loss_optimizer is not None:
            loss = {"module": rule.loss_fn.state_dict(), "optimizer": rule.loss_optimizer.state_dict()}
        facts = {"network": self.network, "steps": self.steps, "loss": loss, "progress": progress}
        with self.errors_named():
            while self._writing:
                self._writing.popleft().result()
            for written in () if self.commit_every == 1 else self._to_sync:
                tensor_files.sync(self.folder / written)
            tensor_files.sync(self.folder)
            facts |= {"whole": True, "blocks": list(self._newest)}
            if rule is not None:
                of_blocks = [kept_of(i, block, rule) for i, block in enumerate(self.chain)]
                facts |= _facts(rule) | {"kept": tree_map_only(Tensor, _without_data, of_blocks)}
            self._write_manifest(facts)
        self._to_sync.clear()
        self.progress = progress

    def close(self) -> None:
        """Commit the steps since the last commit, unless one was interrupted, and release the folder."""
        if not self._broken and self.commits_by_itself and self._committed.get("steps", self.steps) != self.steps:
            self.commit()
        self._broken = self._broken or f"the store of {self.folder} is closed: open another Disk"
        self._thread.shutdown()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def whole(self) -> str:
        has_commit = self._committed and self.commit_every is not None
        return f"step {self._committed['steps']}" if has_commit else "the beginning"

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """After an error of reading or writing, write nothing more, and name the step from which to resume."""
        try:
            yield
        except OSError as problem:
            why, where = problem.strerror or problem, problem.filename or self.folder
            self._broken = f"{where} cannot be read or written ({why}): correct this, then resume from {self.whole()}"
            raise OSError(problem.errno or 0, self._broken) from problem

    def _check_space(self, needed: int, what: str) -> None:
        times, twice = (1, "") if self.commit_every is None else (2, ", twice (once with commit_every=None)")
        if needed * times > self.free_bytes:
            raise ValueError(
                f"the disk of {self.folder} has {self.free_bytes:,} bytes free, and {what} {needed:,}{twice}: choose "
                "another disk"
            )

    def _start(self, job: Callable[[], Any]) -> Future[Any]:
        if self.ahead:
            return self._thread.submit(job)
        done: Future[Any] = Future()  # run it in this thread, where profilers see it
        try:
            done.set_result(job())
        except Exception as problem:
            done.set_exception(problem)
        return done

    def _feedback(self, i: int) -> Path:
        return self.folder / f"feedback_{i:05d}.safetensors"

    def _next_path(self, i: int) -> Path:
        """Return the file to which block i is written next, and record it as the newest."""
        counts = self._committed["blocks"][i] if self._committed and self.commit_every is not None else ""
        if self._committed and self.commit_every is None and not self._to_sync:
            self._write_manifest({**self._committed, "whole": False})
        self._newest[i : i + 1] = [f"block_{i:05d}_{'b' if '_a.' in counts else 'a'}.safetensors"]
        self._to_sync.add(self._newest[i])
        return self.folder / self._newest[i]

    def _write_manifest(self, manifest: dict[str, Any]) -> None:
        write_saved(self.folder / MANIFEST, manifest)
        tensor_files.sync(self.folder)
        self._committed = manifest

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        found = read_saved(path, "choose another folder") if path.exists() else {}
        if not found.get("whole", True):
            raise ValueError(
                f"{self.folder} was left in the middle of a step, without a commit: delete it and start anew (with "
                "commit_every=1 the last step is always complete)"
            )
        return found


def _without_data(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _facts(rule: Any) -> dict[str, Any]:
    """Return what must not change between the processes that train a network."""
    kinds = sorted({type(optimizer).__name__ for optimizer in rule.optimizers if optimizer is not None})
    return {"optimizer": ", ".join(kinds), "feedback": rule.feedback.settings()}
