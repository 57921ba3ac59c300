"""What stores of resting blocks have in common: how a network gets into one, and how its blocks come and go."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import check_int, first_difference
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.store import FORWARD, TEACH, Store
from memdfa_lab.lab.deferred import Deferred, check_attributes
from memdfa_lab.lab.place import Place
from memdfa_lab.lab.resting import Resting, Saved, state_bytes

Values = Callable[[int, dict[str, Tensor]], Mapping[str, Tensor]]  # of a block's tensors, by its number


class Elsewhere(Store):
    """A store whose blocks rest in a `place`, `ahead` of which are brought in before they are needed."""

    offloads = True

    def __init__(self, place: Place, ahead: int):
        self.ahead = check_int("ahead", ahead, 0)
        self.place = place
        self._resting: Resting | None = None
        self._broken = ""  # why the store can no longer be used

    def build(self, make: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
        """Return make() as blocks without data, whose values rest in the store.

        A store that has a network keeps it, which must be one of this make(). Else each block is initialised by itself
        as make() would do it, with random numbers from (seed, block). `make` runs without data: nothing but its shapes
        is in memory. Raises ValueError if the store has another network or no room, or make() initialises a tensor in
        a way that cannot be done later.
        """
        check_int("seed", seed, 0, LARGEST_SEED)
        deferred = Deferred()
        model = deferred.make(make)
        deferred.check(model)
        return self._fill(as_blocks(model), lambda i, tensors: deferred.draw(tensors, mix(seed, i)))

    def load(self, make: Callable[[], nn.Module], state: Mapping[str, Tensor]) -> nn.Sequential:
        """Return make() as blocks without data, with the values of a state_dict of such a model in the store.

        They are taken block by block: of torch.load(file, mmap=True) no more is in memory at once. Raises ValueError if
        the store has a network or no room, or the state is of another model.
        """
        model = Deferred().make(make)
        check_attributes(model)
        if self.place.is_filled:
            raise ValueError(f"{self.place} holds a network already: go on with it by build, or take another folder")
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
        """Return the network's weights and buffers by name; each is fetched when it is asked for."""
        return Saved(self._network())

    def take(self, rule: Any) -> None:
        if self._resting is None:
            if self.place.is_filled:
                raise ValueError(
                    f"{self.place} holds a network already, with which store.build(make) goes on: give MemDFA what "
                    "that returns, or take another folder for this model"
                )

            def values(i: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
                return {name: tensor.detach() for name, tensor in tensors.items()}

            self._fill(rule.blocks, values, state_bytes(rule))
        resting = self._network()
        if resting.rule is not None:
            raise ValueError(f"{self.place} has the network of a rule already: give each rule a store of its own")
        if not resting.has(rule.chain):
            raise ValueError("these are not the blocks that the store has: give MemDFA what build returned, as it is")
        self.check_rule(rule, resting)
        resting.remember_state(rule)

    def check_rule(self, rule: Any, resting: Resting) -> None:
        """Raise ValueError if the network cannot go on with this rule."""

    @contextmanager
    def block(self, i: int, use: str = FORWARD) -> Iterator[None]:
        resting = self._network()
        with self.errors_named():
            resting.bring_in(i, use)
        try:
            yield
        except BaseException:
            if use == TEACH:
                self._broken = f"a step was cut short: make store and rule anew, which go on from {self.whole()}"
            resting.take_out(i)
            raise
        with self.errors_named():
            resting.leave(i, use)

    def whole(self) -> str:
        """Return where training can go on after a step that failed."""
        return "the beginning"

    def errors_named(self) -> Any:
        """Return the context in which the place is read and written."""
        return nullcontext()

    def filled(self) -> None:
        """Note that the place has a network now, which was not there before."""

    def check_space(self, sizes: int) -> None:
        """Raise ValueError if the place has no room for so many bytes."""

    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError(f"a rule whose network rests in {self.place} cannot be copied: make another, in memory")

    def _network(self) -> Resting:
        if self._broken:
            raise RuntimeError(self._broken)
        if self._resting is None:
            raise RuntimeError(f"the store of {self.place} has no network yet: build one, or give MemDFA a model")
        return self._resting

    def _fill(self, blocks: nn.Sequential, values: Values, more_bytes: int = 0) -> nn.Sequential:
        """Take over blocks, write these values unless the place has some, and return the blocks without data.

        There must be room for more_bytes besides.
        """
        if self._resting is not None:
            raise ValueError(f"the store of {self.place} has a network already: make another store")
        resting, is_new = Resting(list(blocks), self.place, self.ahead), not self.place.is_filled
        if is_new:
            tensors = [tensor for i in range(len(blocks)) for tensor in resting.tensors(i).values()]
            self.check_space(sum(tensor.numel() * tensor.itemsize for tensor in tensors) + more_bytes)
            with self.errors_named():
                for i in range(len(blocks)):
                    self.place.write(i, values(i, resting.tensors(i)), {})
        else:
            self.place.check(resting.network)
        self._resting = resting
        if is_new:
            self.filled()
        for i in range(len(blocks)):
            resting.take_out(i)
        return blocks
