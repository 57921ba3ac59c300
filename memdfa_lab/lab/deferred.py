"""A model that is built without memory for its tensors; their initial values are drawn later, some at a time.

While the model is made, everything that gives values to tensors is recorded: operations, and functions of
torch.nn.init. Later the recorded calls on which some tensors depend run in the same order, with memory.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from memdfa_lab.core.compat import TRUTH_VALUE, storage_id, tree_map_only
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.generators import seeded
from memdfa_lab.core.watcher import has_data
from memdfa_lab.memory.shapes import ShapesAlone

INITIALISERS = {name: function for name, function in vars(nn.init).items() if name[0] != "_" and name[-1] == "_"}
USE_LOAD = "make the model in memory, save its state_dict, and pass it to store.load(make, state)"
Storages = dict[int, torch.UntypedStorage]  # those with data, by the id of the one without


class Deferred(ShapesAlone):
    """Within `make` tensors have no data. `draw` gives them the values that they would have had."""

    def __init__(self) -> None:
        super().__init__(truth=0)
        self._noted: list[tuple[Any, Any, list[Tensor]]] = []  # functions, their arguments and outputs
        self._writers: dict[int, list[int]] = {}  # storage id -> which of these calls write to it

    def make(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return make(), without data. Raises ValueError if it needs data."""
        if not callable(make) or isinstance(make, nn.Module):
            raise TypeError(
                f"make must be a function that makes the model, such as lambda: Net(), not a {type(make).__name__}"
            )
        try:
            with self, ExitStack() as stack:
                for name, function in INITIALISERS.items():  # which may ask for values
                    stack.enter_context(patch.object(nn.init, name, self._noting(function)))
                return make()
        except (RuntimeError, NotImplementedError) as problem:
            raise ValueError(
                f"make() does not run without data ({' '.join(str(problem).split())}): make the model in memory, and "
                "pass it to MemDFA with offload"
            ) from problem

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        given = tensors_in([args, kwargs])
        if given and all(map(has_data, given)):
            return operation(*args, **kwargs)
        if operation is TRUTH_VALUE:
            raise RuntimeError("it asks for a value")
        before = tree_map_only(Tensor, Tensor.detach, (args, kwargs))  # the operation may change shapes
        out = super().watch(operation, args, kwargs)
        if not operation.is_view and "empty" not in operation.name():
            self._note(operation, before, tensors_in(out))
        return out

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if the recorded calls do not tell how a tensor of the model gets its value."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if self._needed([tensor]) is None:
                raise ValueError(f"it is not known how make() initialises {name}: {USE_LOAD}")
        check_attributes(model)

    def draw(self, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the values of these tensors, with random numbers from this seed; torch's generator is as before."""
        storages: Storages = {}
        with seeded(seed), torch.no_grad():
            for k in self._needed(tensors.values()) or ():
                function, given, out = self._noted[k]
                args, kwargs = tree_map_only(Tensor, lambda tensor: _with_data(tensor, storages), given)
                for tensor, made in zip(out, tensors_in(function(*args, **kwargs)), strict=True):
                    if storage_id(tensor) not in storages and made.stride() == tensor.stride():
                        storages[storage_id(tensor)] = made.untyped_storage()
                    elif made.data_ptr() != (kept := _with_data(tensor, storages)).data_ptr():
                        kept.copy_(made)
        return {name: _with_data(tensor.detach(), storages) for name, tensor in tensors.items()}

    def _noting(self, initialise: Any) -> Any:
        @wraps(initialise)
        def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if has_data(tensor):
                initialise(tensor, *args, **kwargs)
            else:
                self._note(initialise, ((tensor.detach(), *args), kwargs), [tensor])
            return tensor

        return note

    def _note(self, function: Any, given: Any, out: list[Tensor]) -> None:
        for tensor in out:
            if has_data(tensor):
                raise RuntimeError("it copies a tensor without data into one with data")
            self._writers.setdefault(storage_id(tensor), []).append(len(self._noted))
        self._noted.append((function, given, [tensor.detach() for tensor in out]))

    def _needed(self, tensors: Iterable[Tensor]) -> list[int] | None:
        """Return the numbers of the recorded calls that these tensors depend on.

        None if one of the tensors has no value, or depends on a generator of its own.
        """
        waiting = [*tensors]
        needed: set[int] = set()
        while waiting:
            tensor = waiting.pop()
            if has_data(tensor) or not tensor.numel():
                continue
            if storage_id(tensor) not in self._writers:
                return None
            for k in {*self._writers[storage_id(tensor)]} - needed:
                needed.add(k)
                args, kwargs = self._noted[k][1]
                if any(isinstance(value, torch.Generator) for value in [*args, *kwargs.values()]):
                    return None
                waiting += tensors_in([args, kwargs])
        return sorted(needed)


def check_attributes(model: nn.Module) -> None:
    """Raise ValueError if a module has a tensor without data that is neither a parameter nor a buffer."""
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not has_data(value):
                where = ".".join(filter(None, [path, name]))
                raise ValueError(f"{where} is neither a parameter nor a buffer, and would have no data: register it")


def _with_data(tensor: Tensor, storages: Storages) -> Tensor:
    """Return the tensor with the data of its storage, which is allocated if there is none yet."""
    if has_data(tensor):
        return tensor
    key, offset = storage_id(tensor), tensor.storage_offset()
    if key not in storages:
        storages[key] = torch.UntypedStorage(tensor.untyped_storage().nbytes())
    return torch.empty(0, dtype=tensor.dtype).set_(storages[key], offset, tensor.shape, tensor.stride())
