"""What stores have in common: how a network gets into a store, and how blocks are loaded into memory and removed again.

A network rests in a store: its tensors are kept there, and those of a block are in memory only while it is used.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import check_int
from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.phases import label
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.store import FORWARD, NORM, TEACH, Store
from memdfa_lab.core.watcher import unwatched
from memdfa_lab.lab.deferred import Deferred, check_attributes
from memdfa_lab.lab.resting import (
    FEEDBACK,
    KINDS,
    Saved,
    absent,
    check_block,
    described,
    state_bytes,
    tensors_of,
    values_of,
    weights,
)

ORDER = (FORWARD, NORM, TEACH)
Values = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]  # of a block's tensors, by its number
Coming = Callable[[], dict[str, Tensor]]  # waits for tensors that are on their way into memory, and returns them


class Elsewhere(Store):
    """A store outside the memory of the model; `ahead` blocks are loaded before they are needed.

    A subclass says where: its `str` names the place, and `write` and `read` move tensors. The methods from `begin` to
    `errors_named` are for stores that outlast the process or can fail.

    Attributes:
        device: The device on which the blocks compute.
        is_filled: Whether the store has a network already.
        chain: The blocks; empty until the store is given some.
        rule: The rule that trains them, or None.
        network: A description of the network, by which a different one is recognised.
    """

    offloads = True
    device = "cpu"
    is_filled = False

    def __init__(self, ahead: int):
        self.ahead = check_int("ahead", ahead, 0)
        self.chain: list[nn.Module] = []
        self.rule: Any = None
        self.network = ""
        self._broken = ""  # why the store can no longer be used
        self._coming: dict[int, tuple[str, Coming]] = {}  # what is read ahead, by block
        self._stored: dict[int, Tensor] = {}  # the B that rests there and does not change, by block

    def write(self, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of block i: all but FEEDBACK, or FEEDBACK alone."""
        raise NotImplementedError

    def read(self, i: int, wanted: Callable[[str], bool]) -> Coming:
        """Begin to read the tensors of block i whose names are wanted."""
        raise NotImplementedError

    def begin(self, network: str, needed: int) -> None:
        """Raise ValueError if the store has another or a damaged network, or is empty and too small for this one."""

    def resume(self, rule: Any) -> None:
        """Restore what a rule kept when the network was last used. Raises ValueError if it cannot resume from that."""

    def whole(self) -> str:
        """Return, as text, from where training can resume after a step that failed."""
        return "the beginning"

    def errors_named(self) -> Any:
        """Return the context in which the store reads and writes."""
        return nullcontext()

    def build(self, make: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
        """Return make() as blocks without data, whose values rest in the store.

        If the store has a network of this make(), its values are kept. Otherwise each block is initialised on its own,
        as make() would do it, with random numbers from (seed, block). `make` runs without data: only shapes are in
        memory. Raises ValueError if the store has another network or too little room, or if make() initialises a tensor
        in a way that cannot be repeated later.
        """
        check_int("seed", seed, 0, LARGEST_SEED)
        deferred = Deferred()
        model = deferred.make(make)
        deferred.check(model)
        return self._fill(as_blocks(model), lambda i, tensors: deferred.draw(tensors, mix(seed, i)))

    def load(self, make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Sequential:
        """Return make() as blocks without data, with the values of a state_dict of such a model in the store.

        The values are copied block by block; with torch.load(file, mmap=True) only one block is in memory at a time.
        Raises ValueError if the store has a network or too little room, or the state is of another model.
        """
        model = Deferred().make(make)
        check_attributes(model)
        if self.is_filled:
            raise ValueError(f"{self} holds a network already: resume it with build, or choose another folder")
        return self._fill(as_blocks(model), values_of(model, state))

    def state_dict(self) -> Mapping[str, Tensor]:
        """Return the network's weights and buffers by name; each is fetched when it is asked for."""
        return Saved(self._network().chain, lambda i, name: self.read(i, lambda other: other == name)()[name])

    def take(self, rule: Any) -> None:
        if not self.chain:
            if self.is_filled:
                raise ValueError(
                    f"{self} holds a network already: to resume it, give MemDFA what store.build(make) returns; "
                    "for this model, choose another folder"
                )
            self._fill(rule.blocks, lambda i, tensors: {k: t.detach() for k, t in tensors.items()}, state_bytes(rule))
        if self._network().rule is not None:
            raise ValueError(f"the network in {self} has a rule already: give each rule its own store")
        ours, theirs = ([id(t) for b in blocks for t in weights(0, b).values()] for blocks in (self.chain, rule.chain))
        if ours != theirs:
            raise ValueError("these are not the blocks that the store has: give MemDFA what build returned, unchanged")
        self.resume(rule)
        self.rule = rule

    @contextmanager
    def block(self, i: int, use: str = FORWARD) -> Iterator[None]:
        self._network()
        with self.errors_named():
            self._bring_in(i, use)
        try:
            with self._new_B_forgotten(i) if use == NORM else nullcontext():
                yield
        except BaseException:
            if use == TEACH:
                self._broken = (
                    f"a step was interrupted: make a new store and a new rule, which resume from {self.whole()}"
                )
            self._take_out(i)
            raise
        with self.errors_named():
            self._keep(i, use)
        self._take_out(i)

    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError(f"a rule whose network rests in {self} cannot be copied: make another rule, in memory")

    def _network(self) -> "Elsewhere":
        if self._broken:
            raise RuntimeError(self._broken)
        if not self.chain:
            raise RuntimeError(f"the store of {self} has no network yet: build one, or give MemDFA a model")
        return self

    def _fill(self, blocks: nn.Sequential, values: Values, more_bytes: int = 0) -> nn.Sequential:
        """Take over blocks, write these values if the store is empty, and return the blocks without data.

        The store must also have room for more_bytes.
        """
        if self.chain:
            raise ValueError(f"the store of {self} has a network already: make another store")
        for i, block in enumerate(blocks):
            check_block(i, block, self.device)
        network, is_new = described(blocks), not self.is_filled
        tensors = [tensor for block in blocks for tensor in weights(0, block).values()]
        self.begin(network, sum(tensor.numel() * tensor.itemsize for tensor in tensors) + more_bytes)
        if is_new:
            with self.errors_named():
                for i, block in enumerate(blocks):
                    self.write(i, values(i, weights(i, block)))
        self.chain, self.network = list(blocks), network
        if is_new:
            self.commit()
        for i in range(len(blocks)):
            self._take_out(i)
        return blocks

    def _bring_in(self, i: int, use: str) -> None:
        """Give block i's tensors the data that this use needs, and begin to read the blocks after it."""
        read_for, coming = self._coming.pop(i, (FORWARD, None))
        if coming is None or ORDER.index(read_for) < ORDER.index(use):
            coming = self._read_for(i, use)
        fetched = coming()
        for name, tensor in self._resting(i).items():
            if name in fetched:
                kind = "parameters" if isinstance(tensor, nn.Parameter) else "buffers"
                kind = KINDS.get(name.split(".")[0], kind)
                value = label(kind, fetched.pop(name))
                if value.stride() != tensor.stride():
                    value = label(kind, value.new_empty_strided(value.shape, tensor.stride()).copy_(value))
                tensor.data = value
        for j in range(i + 1, i + 1 + min(self.ahead, len(self.chain) - 1)):
            later, j = use if j < len(self.chain) else self._after(use), j % len(self.chain)
            if j not in self._coming or ORDER.index(self._coming[j][0]) < ORDER.index(later):
                self._coming[j] = later, self._read_for(j, later)

    def _read_for(self, i: int, use: str) -> Coming:
        def wanted(name: str) -> bool:
            kind = name.split(".")[0]
            return use == TEACH or kind not in KINDS or (use == NORM and (kind == FEEDBACK or name.endswith(".B")))

        return self.read(i, wanted)

    def _after(self, use: str) -> str:
        """Return the next use of the blocks, after all have been used for `use`."""
        if use == TEACH and not self.rule.sweeps:
            return FORWARD
        norm = self.rule is not None and self.rule.clip_global_norm is not None
        return NORM if norm and use == FORWARD else TEACH

    def _keep(self, i: int, use: str) -> None:
        """Write what this use has changed in block i."""
        if use == TEACH:
            self._coming.pop(i, None)
            values = tensors_of(i, self.chain[i], self.rule).items()
            self.write(i, {name: tensor.detach().contiguous() for name, tensor in values})
        fixed = use != FORWARD and isinstance(self.rule.feedback, Stored) and not self.rule.feedback.learns
        B = self.rule.feedback.matrices.get(("block", i)) if fixed else None
        if B is not None and self._stored.get(i) is not B:
            self.write(i, {FEEDBACK: B.detach()})
            self._stored[i] = B

    @contextmanager
    def _new_B_forgotten(self, i: int) -> Iterator[None]:
        """Forget a B that learns and is drawn here: it does not rest yet, and is drawn again to teach its block."""
        feedback, key = self.rule.feedback, ("block", i)
        is_new = feedback.learns and key not in feedback.matrices
        try:
            yield
        finally:
            if is_new:
                feedback.matrices.pop(key, None)

    def _resting(self, i: int) -> dict[str, Tensor]:
        """Return the tensors of block i that rest, by name."""
        fixed = {FEEDBACK: self._stored[i]} if i in self._stored else {}
        return tensors_of(i, self.chain[i], self.rule) | fixed

    def _take_out(self, i: int) -> None:
        """Remove block i's data from memory."""
        with unwatched():
            for tensor in self._resting(i).values():
                tensor.data = absent(tensor.shape, tensor.stride(), tensor.dtype, self.device, str(self))
