"""Weights that do not rest in memory: `Disk` keeps each block's in a file, and brings in one block at a time.

What rests where. A block's file, in the safetensors format, has its weights and buffers under the names of
`rule.blocks.state_dict()`, and the state of its optimizer as `optimizer.BLOCK.PARAMETER.NAME`. Stored B has a file of
its own, which is not committed, since B follows from its seed. In memory are the block in use, the `ahead` blocks that
are read ahead, those that are being written, and what does not grow with the network: activations, e, the loss with
its parameters, one shared B.

Never half a network. A block is written to the other of its two files, a and b, and a commit brings them onto the disk
and then replaces a manifest that says which of them count. So the disk holds weights and state twice, and after a crash
the last committed step is there, whole. With `commit_every=None` a block has one file, which is written over: a crash
loses the network, and `commit` or `close` makes it whole.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import check_int, first_difference
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.store import FORWARD, TEACH, Store
from memdfa_lab.lab.block_files import BlockFiles
from memdfa_lab.lab.deferred import Deferred, check_attributes
from memdfa_lab.lab.resting import Resting, Saved

Values = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]  # of a block's tensors, by its number


class Disk(Store):
    """A folder in which the blocks of a network rest: `MemDFA(store.build(make), optimizer, offload=store)`.

    `folder`: is made if it is not there. `ahead`: how many blocks a thread reads before they are needed, while it also
    writes those that are done; with 0 all reading and writing is waited for. `commit_every`: after so many steps the
    folder takes them over, so that nothing that happens later can damage them; that waits for the disk. With None the
    network is there once on the disk, and whole after `commit` and `close` alone.

    The model's tensors have data only while their block is in use. A model in memory may be given to MemDFA as well: it
    is written to the folder, which must not have a network yet, and its memory is given back.

    Attributes:
        steps: How many steps the network has made, in all processes that had it.

    Raises ValueError for a folder that is in use, cannot be written to, or holds no whole network.
    """

    offloads = True

    def __init__(self, folder: str | Path, *, ahead: int = 1, commit_every: int | None = 1):
        self.ahead = check_int("ahead", ahead, 0)
        self.commit_every = None if commit_every is None else check_int("commit_every", commit_every)
        self.folder = Path(folder)
        self._files = BlockFiles(self.folder, commit_every is not None, bool(ahead), commit_every == 1)
        self.steps: int = self._files.committed["steps"] if self._files.committed else 0
        self.progress = self._files.rest()["progress"] if self._files.committed else None
        self._resting: Resting | None = None
        self._broken = ""  # why the store can no longer be used

    def build(self, make: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
        """Return make() as blocks without data, whose values are in the folder.

        A folder that has a network keeps it, which must be one of this make(). Else each block is initialised by itself
        as make() would do it, with random numbers from (seed, block). `make` runs without data: nothing but its shapes
        is in memory. Raises ValueError if the folder has another network, the disk has no room, or make() initialises
        a tensor in a way that cannot be done later.
        """
        check_int("seed", seed, 0, LARGEST_SEED)
        deferred = Deferred()
        model = deferred.make(make)
        deferred.check(model)
        return self._fill(as_blocks(model), lambda i, tensors: deferred.draw(tensors, mix(seed, i)))

    def load(self, make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Sequential:
        """Return make() as blocks without data, with the values of a state_dict of such a model in the folder.

        They are taken block by block: of torch.load(file, mmap=True) no more is in memory at once. Raises ValueError if
        the folder has a network, the disk has no room, or the state is of another model.
        """
        model = Deferred().make(make)
        check_attributes(model)
        if self._files.committed is not None:
            raise ValueError(f"{self.folder} holds a network already: go on with it by build, or take another folder")
        named = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
        ours, theirs = ("\n".join(f"{k} {tuple(v.shape)}" for k, v in each.items()) for each in (named, state))
        if ours != theirs:
            ours, theirs = first_difference(ours, theirs)
            raise ValueError(f"this state is of another model: it has {theirs!r}, make() has {ours!r}")
        names = {id(tensor): name for name, tensor in named.items()}

        def values(i: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            unsaved = [name for name, tensor in tensors.items() if id(tensor) not in names]
            if unsaved:
                raise ValueError(f"{unsaved[0]} is a buffer that is in no state_dict: register it as persistent")
            return {name: state[names[id(t)]].detach().to("cpu", t.dtype) for name, t in tensors.items()}

        return self._fill(as_blocks(model), values)

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the network's weights and buffers by name; each is read from the folder when it is asked for."""
        return Saved(self._network())

    @property
    def free_bytes(self) -> int:
        """How much the folder's disk can still hold."""
        return shutil.disk_usage(self.folder).free

    def take(self, rule: Any) -> None:
        if self._resting is None:
            if self._files.committed is not None:
                raise ValueError(
                    f"{self.folder} holds a network already, with which store.build(make) goes on: give MemDFA what "
                    "that returns, or take another folder for this model"
                )
            self._fill(rule.blocks, lambda i, tensors: {name: tensor.detach() for name, tensor in tensors.items()})
        resting = self._network()
        if resting.rule is not None:
            raise ValueError(f"{self.folder} has the network of a rule already: give each rule a store of its own")
        if not resting.has(rule.chain):
            raise ValueError("these are not the blocks that the store has: give MemDFA what build returned, as it is")
        before = self._files.committed or {}
        for name, value in _facts(rule).items():
            if before.get(name, value) != value:
                raise ValueError(f"{self.folder} was trained with {name} {before[name]}, and this rule has {value}")
        loss = self._files.rest()["loss"]
        if loss is not None and rule.loss_optimizer is not None:
            rule.loss_fn.load_state_dict(loss["module"])
            rule.loss_optimizer.load_state_dict(loss["optimizer"])
        resting.remember_state(rule)

    @contextmanager
    def block(self, i: int, use: str = FORWARD) -> Iterator[None]:
        resting = self._network()
        with self._disk_errors():
            resting.bring_in(i, use)
        try:
            yield
        except BaseException:
            if use == TEACH:
                self._broken = f"a step was cut short: make store and rule anew, which go on from {self._whole()}"
            resting.take_out(i)
            raise
        with self._disk_errors():
            resting.leave(i, use)

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
        with self._disk_errors():
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

    def __deepcopy__(self, memo: object) -> Self:
        raise TypeError(f"a rule whose network rests in {self.folder} cannot be copied: make another, in memory")

    def _network(self) -> Resting:
        if self._broken:
            raise RuntimeError(self._broken)
        if self._resting is None:
            raise RuntimeError(f"the store of {self.folder} has no network yet: build one, or give MemDFA a model")
        return self._resting

    def _fill(self, blocks: nn.Sequential, values: Values) -> nn.Sequential:
        """Take over blocks, write these values unless the folder has some, and return the blocks without data."""
        if self._resting is not None:
            raise ValueError(f"the store of {self.folder} has a network already: make another store")
        resting = Resting(list(blocks), self._files, self.ahead)
        if self._files.committed is not None:
            self._files.check(resting.network)
        else:
            self._check_space(resting)
            with self._disk_errors():
                for i in range(len(blocks)):
                    self._files.write(i, values(i, resting.tensors(i)), {})
        self._resting = resting
        if self._files.committed is None:
            self.commit()
        for i in range(len(blocks)):
            resting.take_out(i, all_of_it=True)
        return blocks

    def _check_space(self, resting: Resting) -> None:
        """Raise ValueError if the disk has no room for the weights."""
        tensors = [tensor for i in range(len(resting.chain)) for tensor in resting.tensors(i).values()]
        needed = sum(tensor.numel() * tensor.itemsize for tensor in tensors) * (2 if self._files.twice else 1)
        free = self.free_bytes
        if needed > free:
            twice = ", twice (with commit_every=None once)" if self._files.twice else ""
            raise ValueError(
                f"the disk of {self.folder} has {free:,} bytes free, and the weights take {needed:,}{twice}: choose "
                "another"
            )

    def _whole(self) -> str:
        committed = self._files.committed
        return f"step {committed['steps']}" if committed is not None and self._files.twice else "the beginning"

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Say of what cannot be read or written within from where to go on; nothing more is written."""
        try:
            yield
        except OSError as problem:
            why, where = problem.strerror or problem, problem.filename or self.folder
            self._broken = f"{where} cannot be read or written ({why}): mend that, then go on from {self._whole()}"
            raise OSError(problem.errno or 0, self._broken) from problem


def _facts(rule: Any) -> dict[str, Any]:
    """Return what must not change between the processes that train a network."""
    feedback = {name: value for name, value in rule.feedback.state_dict().items() if name != "matrices"}
    kinds = sorted({type(optimizer).__name__ for optimizer in rule.optimizers if optimizer is not None})
    return {"optimizer": ", ".join(kinds), "feedback": feedback}
