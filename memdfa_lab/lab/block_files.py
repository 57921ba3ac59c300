"""The files of a network's blocks in one folder, and the manifest that says which of them count.

What is written goes to the other of a block's two files, and counts once a manifest that names it has replaced the one
before. A file that counts is not written to. So at any moment, also after a power cut, the folder holds what was
committed last, whole. Without `twice` a block has one file, which is written over; until the next commit the manifest
then says that nothing counts.

One thread reads and writes in the order in which it is asked to. So what is read is what was written last, and whoever
waits for a block to be read has waited for all that was to be written before.
"""

import io
import json
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memdfa_lab.core.checks import first_difference
from memdfa_lab.lab import tensor_files
from memdfa_lab.lab.files import locked, write_text, write_whole
from memdfa_lab.lab.place import FEEDBACK

MANIFEST, FORMAT = "network.json", 1
MOST_WAITING = 2  # to be written: they are in memory
T = TypeVar("T")
Wanted = Callable[[str], bool]


class BlockFiles:
    """The files in `folder`, which are this process's until `close`.

    `twice`: whether a block has two files. `thread`: whether a thread reads and writes; else that is waited for.
    `sync`: whether each block is brought onto the disk as soon as it is written, and not when it is committed.

    Attributes:
        device: On which the blocks compute.
        committed: What the manifest says; None if there is none yet.

    Raises ValueError if the folder is in use, cannot be written to, or holds no whole network.
    """

    device = "cpu"

    def __init__(self, folder: Path, twice: bool, thread: bool, sync: bool):
        self.folder, self.twice, self.sync = folder, twice, sync
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file: name a folder for the network's weights")
        self._thread = ThreadPoolExecutor(1) if thread else None
        self._lock = ExitStack()
        self._lock.enter_context(locked(folder / MANIFEST))
        try:
            self.committed = self._read_manifest()
        except BaseException:
            self.close()
            raise
        self.names: list[str] = list(self.committed["blocks"]) if self.committed else []  # of the newest files
        self._to_sync: set[str] = set()
        tensor_files.give_back_at_once()
        self._writing: deque[Future[Any]] = deque()

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def is_filled(self) -> bool:
        return self.committed is not None

    def close(self) -> None:
        """Let other processes have the folder, once the thread has ended."""
        if self._thread is not None:
            self._thread.shutdown()
        self._lock.close()

    def check(self, network: str) -> list[dict[str, Any]]:
        """Return what each committed file says of its tensors.

        Raises ValueError if they are of another network, or a file is missing, damaged or cut.
        """
        assert self.committed is not None
        if self.committed["network"] != network:
            theirs, ours = first_difference(self.committed["network"], network)
            raise ValueError(
                f"{self.folder} holds another network: it has {theirs!r}, this one {ours!r}; choose another folder"
            )
        return [tensor_files.check(self.folder / name) for name in self.names]

    def write(self, i: int, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write block i, which stays in memory until that is done."""
        self._write(partial(tensor_files.write, self._next_path(i), tensors, metadata, self.sync))

    def header(self, i: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Return what block i's file says of its tensors, and its texts."""
        return tensor_files.header(self.folder / self.names[i])[:2]

    def write_feedback(self, i: int, B: Tensor) -> None:
        """Write B_i, which is not committed."""
        self._write(partial(tensor_files.write, self._feedback(i), {FEEDBACK: B}, {}, sync=False))

    def read(self, i: int, wanted: Wanted, feedback: bool = False) -> Future[dict[str, Tensor]]:
        """Read the tensors of block i whose names are wanted, and B_i as FEEDBACK."""
        path, more = self.folder / self.names[i], self._feedback(i) if feedback else None
        return self._start(lambda: {**tensor_files.read(path, wanted), **(tensor_files.read(more) if more else {})})

    def _feedback(self, i: int) -> Path:
        return self.folder / f"feedback_{i:05d}.safetensors"

    def _write(self, job: Callable[[], object]) -> None:
        self._writing.append(self._start(job))
        while self._writing and (self._writing[0].done() or len(self._writing) > MOST_WAITING):
            self._writing.popleft().result()

    def _start(self, job: Callable[[], T]) -> Future[T]:
        if self._thread is not None:
            return self._thread.submit(job)
        done: Future[T] = Future()
        try:
            done.set_result(job())
        except Exception as problem:
            done.set_exception(problem)
        return done

    def _next_path(self, i: int) -> Path:
        """Return the file that block i is to be written to, which from now on is its newest."""
        if not self._to_sync and not self.twice and self.committed is not None:
            self._write_manifest({**self.committed, "whole": False})
        old = self.committed["blocks"][i] if self.committed and self.twice else ""
        name = f"block_{i:05d}.{'b' if '.a.' in old else 'a'}.safetensors"
        self.names[i : i + 1] = [name]
        self._to_sync.add(name)
        return self.folder / name

    def commit(self, facts: Mapping[str, Any], rest: object) -> None:
        """Let the newest files count, with `facts`, which JSON can hold, and `rest`, which torch can save."""
        while self._writing:
            self._writing.popleft().result()
        before = self.committed["rest"] if self.committed else ""
        name = f"rest.{'b' if '.a.' in before else 'a'}.pt"
        write_whole(self.folder / name, lambda path: _save(path, rest))
        for written in () if self.sync else self._to_sync:
            tensor_files.sync(self.folder / written)
        tensor_files.sync(self.folder)
        committed = {**facts, "format": FORMAT, "whole": True, "blocks": list(self.names), "rest": name}
        self._write_manifest(committed)
        self.committed = committed
        self._to_sync.clear()

    def rest(self) -> Any:
        """Return what was committed beside the blocks."""
        assert self.committed is not None
        path = self.folder / self.committed["rest"]
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as problem:  # damage shows as any kind of exception
            raise ValueError(f"{path} is damaged or missing: take a copy of the folder, or begin anew") from problem

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_text(self.folder / MANIFEST, json.dumps(manifest))
        tensor_files.sync(self.folder)

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        if not path.exists():
            return None
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            version, whole = manifest["format"], manifest["whole"]
        except (ValueError, KeyError, TypeError) as problem:
            raise ValueError(f"{path} is damaged or not of this package: choose another folder") from problem
        if version != FORMAT:
            raise ValueError(f"{path} has format {version}, this version of memdfa_lab {FORMAT}: choose another folder")
        if not whole:
            raise ValueError(
                f"{self.folder} was left in the middle of a step that had no commits: delete it and begin anew (with "
                "commit_every=1 the last step is kept whole)"
            )
        return manifest


def _save(path: Path, rest: object) -> None:
    content = io.BytesIO()
    torch.save(rest, content)  # of a file, torch hides why it could not be written
    path.write_bytes(content.getbuffer())
