"""Where batches come from: tensors, arrays, a torch Dataset, a DataLoader or `Data`, all read in one way.

What is drawn at random for a batch, by a Dataset's items, a DataLoader or `augment`, depends on (seed, epoch, batch)
alone: the global generators of torch, numpy and Python are seeded for it, and put back.
"""

import random
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from memdfa_lab.core.checks import check_finite
from memdfa_lab.core.compat import shut_down_workers
from memdfa_lab.core.recompute import generators_restored, other_generators_restored
from memdfa_lab.core.seeds import mix
from memdfa_lab.lab.datasets import batches_in, check_data, check_part, order
from memdfa_lab.lab.distributed import digest

Pair = tuple[Tensor, Tensor]
Batches = Generator[Pair, None, None]
AT_ONCE = 1000  # this many examples in memory are looked at together
COLLATE = "let its items be pairs (x, y) of one shape, or give a DataLoader with a collate_fn that makes pairs"
SOURCES = "(x, y), a Dataset, a DataLoader, or data as ml.datasets.load returns it"


@dataclass
class Examples:
    """Examples (x, y) of a Dataset to train or to test on; their order in an epoch depends on (seed, epoch) alone.

    `len(examples)`: how many an epoch has.
    """

    source: Any
    batch_size: int
    seed: int = 0
    drop_last: bool = False
    augment: Callable[[Tensor], Tensor] | None = None
    facts: str = ""  # what tells these examples from others

    draws = True  # whether taking items may draw random numbers
    states: tuple[Tensor, ...] = ()  # of a DataLoader's own generators, where the epoch began

    def __len__(self) -> int:
        return self.total - (self.total % self.batch_size if self.drop_last else 0)

    @property
    def total(self) -> int:
        return len(self.source)

    @property
    def batches_in_epoch(self) -> int | None:
        """None where only the end of an epoch tells."""
        return batches_in(self.total, self.batch_size, self.drop_last)

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the first and of the last batch of an epoch."""
        n = self.total
        first = min(self.batch_size, n)
        return first, first if self.drop_last else n % first or first

    def batches(self, epoch: int, first: int = 0) -> Batches:
        """Yield the batches (x, y) of an epoch, counted from 0, from batch `first` on."""
        chosen = order(self.total, self.seed, epoch).split(self.batch_size)[: self.batches_in_epoch]
        for k in range(first, len(chosen)):
            yield self._batch(chosen[k], self.augment, epoch, k)

    def first(self, n: int | None = None) -> Batches:
        """Yield the first n examples (None: all) in batches, not augmented, and disturb nothing."""
        for k, indices in enumerate(torch.arange(self.total)[:n].split(self.batch_size)):
            yield self._batch(indices, None, 0, k)

    def sample(self, n: int) -> Pair:
        """Return the first n examples as one batch, not augmented, and disturb nothing."""
        x, y = zip(*self.first(n), strict=True)
        return torch.cat(x), torch.cat(y)

    def known(self) -> Pair:
        """Return what is cheap to look at: all that is in memory, or else the first batch."""
        with closing(self.first(self.batch_size or None)) as batches:
            return next(batches, None) or (torch.empty(0), torch.empty(0))

    def states_now(self) -> tuple[Tensor, ...]:
        return ()

    def put_states(self, states: tuple[Tensor, ...]) -> None:
        """Begin the next epoch where a DataLoader's own generators had these states."""

    def _take(self, indices: Tensor) -> Pair:
        items = [self.source[i] for i in indices.tolist()]
        try:
            return pair_of(default_collate(items))
        except (RuntimeError, TypeError) as problem:
            why = " ".join(str(problem).split())
            raise ValueError(f"these items of the Dataset make no batch of tensors ({why}): {COLLATE}") from problem

    def _batch(self, indices: Tensor, augment: Callable[[Tensor], Tensor] | None, *numbers: int) -> Pair:
        if not self.draws and augment is None:
            return self._take(indices)
        with drawn(self.seed, *numbers):
            return augmented(augment, *self._take(indices))


class InMemory(Examples):
    """Examples of tensors x (N, ...) and y (N, ...)."""

    draws = False

    @property
    def total(self) -> int:
        return len(self.source[0])

    def first(self, n: int | None = None) -> Batches:
        yield from zip(*(tensor[:n].split(AT_ONCE) for tensor in self.source), strict=True)

    def sample(self, n: int) -> Pair:
        x, y = self.source
        return x[:n], y[:n]

    def known(self) -> Pair:
        x, y = self.source
        return x, y

    def _take(self, indices: Tensor) -> Pair:
        x, y = self.source
        return x[indices], y[indices]


class Loaded(Examples):
    """Examples of a DataLoader, in the order that it gives."""

    @property
    def total(self) -> int:
        """Raises TypeError if the DataLoader cannot tell."""
        if self.source.batch_size is None or self.batches_in_epoch is None:
            raise TypeError("this DataLoader does not tell how many examples an epoch has")
        data: Any = self.source.dataset
        return len(data if isinstance(self.source.dataset, IterableDataset) else self.source.sampler)

    @property
    def sizes(self) -> tuple[int, int]:
        try:
            return super().sizes
        except TypeError:
            return self.batch_size, self.batch_size

    @property
    def batches_in_epoch(self) -> int | None:
        try:
            return len(self.source)
        except TypeError:
            return None

    @property
    def generators(self) -> list[torch.Generator]:
        """The loader's own generators, which give the order of the epochs one after another."""
        samplers = [self.source, self.source.sampler, getattr(self.source.batch_sampler, "sampler", None)]
        return list(dict.fromkeys(g for g in (getattr(it, "generator", None) for it in samplers) if g is not None))

    def states_now(self) -> tuple[Tensor, ...]:
        return tuple(generator.get_state() for generator in self.generators)

    def put_states(self, states: tuple[Tensor, ...]) -> None:
        for generator, state in zip(self.generators, states, strict=False):
            generator.set_state(state)

    def batches(self, epoch: int, first: int = 0) -> Batches:
        self.states = self.states_now()
        yield from self._read(self.augment, epoch, first)

    def first(self, n: int | None = None) -> Batches:
        states = self.states_now()
        try:
            with closing(self._read(None, 0, 0)) as batches:
                for x, y in batches:
                    yield x[:n], y[:n]
                    n = None if n is None else n - len(x)
                    if n is not None and n <= 0:
                        break
        finally:
            self.put_states(states)

    def _read(self, augment: Callable[[Tensor], Tensor] | None, epoch: int, first: int) -> Batches:
        with drawn(self.seed, epoch, 0), ctrl_c_kept_from_children():
            batches = iter(self.source)
        try:
            for k in count():
                with drawn(self.seed, epoch, k):
                    taken: list[Any] = [next(batches, None)]
                    if taken[0] is None:
                        return
                    if k >= first:
                        taken = [augmented(augment, *pair_of(taken[0]))]
                if k >= first:
                    yield taken.pop()  # nothing of it is held here while it is trained on
        finally:
            if not self.source.persistent_workers:
                shut_down_workers(batches)  # an error's traceback would keep them


def examples_of(
    data: Any,
    batch_size: int | None = None,
    seed: int = 0,
    drop_last: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    part: str = "train",
) -> Examples:
    """Return the examples of whatever `fit` takes; of `Data`, those of the part, train or test.

    Raises TypeError for what is none of these, and what `fit` raises for data that cannot be right.
    """
    name = "data" if part == "train" else "test"
    settings = (batch_size or 100, seed, drop_last, augment)
    if isinstance(data, DataLoader):
        if part == "train" and (batch_size is not None or drop_last):
            raise ValueError("batch_size and drop_last are the DataLoader's own: set them there, and not here as well")
        kind = f"{type(data).__name__} of {type(data.dataset).__name__}"
        return _described(Loaded(data, data.batch_size or 0, seed, data.drop_last, augment), kind, name)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(it, Tensor | np.ndarray) for it in data):
        data = tuple(torch.as_tensor(item) for item in data)
        check_part(part, *data)
        return _described(InMemory(data, *settings), "tensors", name)
    if hasattr(data, "x_train"):
        check_data("fit", data)
        pair = getattr(data, f"x_{part}"), getattr(data, f"y_{part}")
        return _described(InMemory(pair, *settings), data.name, name)
    if isinstance(data, IterableDataset):
        raise TypeError(f"{name} is an IterableDataset, which has no order of ours: put it into a DataLoader")
    if isinstance(data, Iterator):
        raise TypeError(f"{name} is a {type(data).__name__}, which can be read once, not in each epoch: give {SOURCES}")
    plain = isinstance(data, tuple | list | str | Mapping | Tensor | np.ndarray)
    if plain or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(f"{name} must be {SOURCES}, not a {type(data).__name__}")
    if not len(data):
        raise ValueError(f"{name} has no example")
    return _described(Examples(data, *settings), type(data).__name__, name)


def _described(examples: Examples, kind: str, name: str) -> Examples:
    """Look at the first examples, and return all with the facts that tell them from others."""
    x, y = examples.known()
    if not isinstance(examples, InMemory):
        sizes = [len(tensor) if tensor.dim() else 0 for tensor in (x, y)]
        if sizes[0] != sizes[1] or not sizes[0]:
            raise ValueError(
                f"the first batch of {name} must have a y for each x, one or more, got {sizes[0]} and {sizes[1]}"
            )
        for tensor in (x, y):
            if tensor.is_floating_point():
                check_finite(f"the first batch of {name} holds NaN or inf", tensor)
    examples.batch_size = examples.batch_size or len(x)
    n = f"{examples.batches_in_epoch} batches" if isinstance(examples, Loaded) else f"{examples.total} examples"
    examples.facts = f"{kind}, {n} of shape {tuple(x.shape[1:])}"
    if not isinstance(examples, Loaded):  # whose first batch may be another each time
        examples.facts += f", digest {digest(x[:: max(1, len(x) // 100)], y)}"
    return examples


def pair_of(batch: Any) -> Pair:
    """Return a batch as two tensors, x and y. Raises TypeError if it is none."""
    pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(item, Tensor | np.ndarray) for item in pair):
        parts = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f" of {len(pair)}" * bool(pair)
        raise TypeError(f"batches must be pairs (x, y) of tensors, got a {type(batch).__name__}{parts}: {COLLATE}")
    return torch.as_tensor(pair[0]), torch.as_tensor(pair[1])


def augmented(augment: Callable[[Tensor], Tensor] | None, x: Tensor, y: Tensor) -> Pair:
    """Return x augmented, and y. Raises TypeError if that is not a batch of as many examples."""
    if augment is None:
        return x, y
    n, x = len(x), augment(x)
    if not isinstance(x, Tensor) or x.shape[:1] != (n,):
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"augment must take a batch x ({n}, ...) and return one of as many examples, got {given}")
    return x, y


@contextmanager
def drawn(seed: int, epoch: int, batch: int) -> Iterator[None]:
    """Draw from the global generators of torch, numpy and Python as (seed, epoch, batch) says, and put them back."""
    number = mix(mix(seed, epoch), batch, 1)
    with generators_restored(torch.device("cpu")), other_generators_restored():
        torch.default_generator.manual_seed(number)
        np.random.seed(number)  # noqa: NPY002 (what items draw from is the global one)
        random.seed(number)
        yield


@contextmanager
def ctrl_c_kept_from_children() -> Iterator[None]:
    """Let processes that start within not hear Ctrl-C: who started them ends them, once the running step is done."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
