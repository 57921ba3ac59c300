"""Where batches come from: tensors, arrays, a torch Dataset, a DataLoader or `Data`, all read by a DataLoader.

The random numbers for a batch, drawn by the items of a Dataset, by a DataLoader or by `augment`, depend only on (seed,
epoch, batch). The generators are seeded before each batch, and restored after it.
"""

import random
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from memdfa_lab.core.compat import shut_down_workers
from memdfa_lab.core.generators import generator_restored, generators_restored
from memdfa_lab.core.seeds import mix
from memdfa_lab.lab.datasets import batches_in, check_pair, order
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.terminal import loading

Pair = tuple[Tensor, Tensor]
Batches = Generator[Pair, None, None]
Augment = Callable[[Tensor], Tensor]
AT_ONCE = 1000  # examples in memory are evaluated in batches of this size
SOURCES = "(x, y), a Dataset with a length, a DataLoader, or data as ml.datasets.load returns it"
OTHER_BATCH = (
    "a batch differs from the one read before the checkpoint was written: the resumed run is not bit for bit the same "
    "as an uninterrupted one (the reference of ml.fit says what a batch may depend on)"
)


@dataclass
class Examples:
    """Examples (x, y) to train or to test on.

    `source`: a Dataset, which is read in an order given by (seed, epoch), or a DataLoader, which has its own order.
    `total`: the number of examples; None if it is known only at the end of an epoch. `len(examples)`: the number in one
    epoch. `facts` identify the examples, `last` identifies the last batch.
    """

    source: Any
    total: int | None
    batch_size: int
    seed: int = 0
    drop_last: bool = False
    augment: Augment | None = None
    facts: str = ""
    last: str = ""
    ctrl_c: Sequence[int] = ()  # not empty once Ctrl-C was pressed

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("this DataLoader does not know how many examples an epoch has")
        return self.total - (self.total % self.batch_size if self.drop_last else 0)

    @property
    def in_memory(self) -> bool:
        return type(self.source) is TensorDataset

    @property
    def batches_in_epoch(self) -> int | None:
        return None if self.total is None else batches_in(self.total, self.batch_size, self.drop_last)

    @property
    def sizes(self) -> tuple[int, int]:
        """The sizes of the first and of the last batch of an epoch."""
        n = self.total or self.batch_size
        first = min(self.batch_size, n)
        return first, first if self.drop_last else n % first or first

    def batches(self, epoch: int, first: int = 0) -> Batches:
        """Yield the batches (x, y) of an epoch, counted from 0, from batch `first` on.

        Unless all examples are in memory, the batch before `first` is read again. A warning is given if it has changed.
        """
        n, again = self.total, first > 0 and not self.in_memory
        ours: tuple[Tensor, ...] = ()
        if n is not None and not isinstance(self.source, DataLoader):
            ours = order(n, self.seed, epoch).split(self.batch_size)
        chosen = ours[: self.batches_in_epoch]
        for k, x, y in self._read(chosen, epoch, first - again, self.augment):
            if not self.in_memory:
                taken = digest(x[:1], y[:1])
                if k < first and taken != self.last:
                    warnings.warn(OTHER_BATCH, stacklevel=2)
                self.last = taken
            if k >= first:
                yield x, y

    def first(self, n: int | None = None) -> Batches:
        """Yield the first n examples (None: all) in batches, not augmented; generators are restored."""
        chosen = torch.arange(self.total or 0)[:n]
        parts = -(-len(chosen) // (AT_ONCE if self.in_memory else self.batch_size)) or 1  # of nearly equal size
        with closing(self._read(chosen.tensor_split(parts) if self.total != 0 else (), 0, 0, None)) as batches:
            for _, x, y in batches:
                yield x[:n], y[:n]
                n = None if n is None else n - len(x)
                if n is not None and n <= 0:
                    return

    def known(self) -> Pair:
        """Return the examples to check: all of them if they are in memory, else the first batch."""
        if self.in_memory:
            x, y = self.source.tensors
            return x, y
        with closing(self.first()) as batches:
            return next(batches, None) or (torch.empty(0), torch.empty(0))

    def _read(
        self, chosen: tuple[Tensor, ...], epoch: int, first: int, augment: Augment | None
    ) -> Generator[tuple[int, Tensor, Tensor], None, None]:
        """Yield (number, x, y) of each batch from `first` on; `chosen` has the indices of a Dataset's batches."""
        loader = self.source
        if not isinstance(loader, DataLoader):
            how: dict[str, Any] = {"batch_sampler": map(Tensor.tolist, chosen[first:])}
            if self.in_memory:  # index all examples of a batch at once
                how = {"sampler": chosen[first:], "batch_size": None}
            loader = DataLoader(loader, generator=torch.Generator(), **how)
        k = 0 if loader is self.source else first
        with self._drawn(epoch, k), loading(self.ctrl_c):  # workers load as soon as they start
            batches = iter(loader)
        try:
            while True:
                with self._drawn(epoch, k):
                    with loading(self.ctrl_c):
                        batch = next(batches, None)
                    if batch is None:
                        return
                    if k >= first:
                        batch = augmented(augment, *pair_of(batch))
                if k >= first:
                    yield k, *batch
                k += 1
        finally:
            if not loader.persistent_workers:
                shut_down_workers(batches)  # else the traceback of an error would keep them alive

    @contextmanager
    def _drawn(self, epoch: int, batch: int) -> Iterator[None]:
        """Seed the generators from which a batch may draw, and restore them on leaving."""
        if self.in_memory and self.augment is None:
            yield
            return
        parts = [self.source, *(getattr(self.source, name, None) for name in ("sampler", "batch_sampler"))]
        parts.append(getattr(parts[-1], "sampler", None))
        own = {id(g): g for g in (getattr(part, "generator", None) for part in parts) if g is not None}
        with generators_restored("cpu"), ExitStack() as restored:
            number = mix(mix(self.seed, epoch), batch, 1)
            torch.default_generator.manual_seed(number)
            np.random.seed(number)  # noqa: NPY002 (the one that items draw from)
            random.seed(number)
            for generator in own.values():  # of a DataLoader
                restored.enter_context(generator_restored(generator))
                generator.manual_seed(mix(number, generator.initial_seed()))
            yield


def examples_of(
    data: Any,
    batch_size: int | None = None,
    seed: int = 0,
    drop_last: bool = False,
    augment: Augment | None = None,
    part: str = "train",
) -> Examples:
    """Return the examples of any data that `fit` takes; `part` selects the training or test examples of `Data`.

    Raises TypeError for any other data, and what `fit` raises for data that cannot be right.
    """
    name, kind = "data" if part == "train" else "test", type(data).__name__
    pair: Any = None
    if hasattr(data, "x_train"):
        kind, pair = data.name, (getattr(data, f"x_{part}"), getattr(data, f"y_{part}"))
    elif type(data) is TensorDataset and len(data.tensors) == 2:
        kind, pair = "tensors", data.tensors
    elif isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(z, Tensor | np.ndarray) for z in data):
        kind, pair = "tensors", data
    elif isinstance(data, DataLoader):
        if part == "train" and (batch_size is not None or drop_last):
            raise ValueError("batch_size and drop_last are the DataLoader's own: set them there, and not here as well")
        kind, batch_size, drop_last = f"DataLoader of {type(data.dataset).__name__}", data.batch_size, data.drop_last
    elif isinstance(data, Iterator):
        raise TypeError(f"{name} is a {kind}, which can be read only once, and each epoch reads it: give {SOURCES}")
    elif isinstance(data, IterableDataset) or not isinstance(data, Dataset) or not hasattr(data, "__len__"):
        hint = ": put it into a DataLoader" if isinstance(data, IterableDataset) else ""
        raise TypeError(f"{name} must be {SOURCES}, not a {kind}{hint}")
    if pair is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that an array is read-only
            x, y = (torch.as_tensor(item) if isinstance(item, np.ndarray) else item for item in pair)
        check_pair(f"x_{part}", x, f"y_{part}", y)
        data = TensorDataset(x, y)
    examples = Examples(data, _total(data), batch_size or 100, seed, drop_last, augment)
    x, y = examples.known()
    if pair is None:
        check_pair(f"x_{part}", x, f"y_{part}", y)
        examples.batch_size = batch_size or len(x)
    n = "?" if examples.total is None else examples.total
    examples.facts = f"{kind}, {n} examples of shape {tuple(x.shape[1:])}"
    if not isinstance(data, DataLoader):  # its first batch may differ each time
        examples.facts += f", digest {digest(x[:: max(1, len(x) // 100)], y)}"
    return examples


def _total(data: Any) -> int | None:
    if isinstance(data, DataLoader):
        if data.batch_size is None:  # a batch_sampler, or a Dataset of batches
            return None
        data = data.dataset if isinstance(data.dataset, IterableDataset) else data.sampler
    try:
        return len(data)
    except TypeError:
        return None


def pair_of(batch: Any) -> Pair:
    """Return a batch as two tensors, x and y. Raises TypeError if it is not a pair of tensors or arrays."""
    pair = tuple(batch) if isinstance(batch, tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(item, Tensor | np.ndarray) for item in pair):
        parts = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f" of {len(pair)}" * bool(pair)
        raise TypeError(
            f"batches must be pairs (x, y) of tensors, got a {type(batch).__name__}{parts}: let the items be pairs, or "
            "give a DataLoader with a collate_fn that makes pairs"
        )
    return torch.as_tensor(pair[0]), torch.as_tensor(pair[1])


def augmented(augment: Augment | None, x: Tensor, y: Tensor) -> Pair:
    """Return augment(x) and y. Raises TypeError if augment(x) is not a batch of equally many examples."""
    if augment is None:
        return x, y
    n, x = len(x), augment(x)
    if not isinstance(x, Tensor) or x.shape[:1] != (n,):
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise TypeError(f"augment must take a batch x ({n}, ...) and return one of equally many examples, got {given}")
    return x, y
