"""A model that is made without memory, and its initial values, drawn later, some tensors at a time.

While it is made, what gives each tensor its value is noted: how it was created, and what the functions of torch.nn.init
and operations of one tensor did to it. Later the same is done with memory.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from memdfa_lab.core.compat import TRUTH_VALUE, aten, storage_id
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.watcher import has_data
from memdfa_lab.memory.shapes import ShapesAlone

Step = Callable[[Tensor], Tensor]  # the value of a tensor from what it was before
OVERWRITES = (
    aten.bernoulli_.float,
    aten.exponential_.default,
    aten.fill_.Scalar,
    aten.log_normal_.default,
    aten.normal_.default,
    aten.random_.default,
    aten.uniform_.default,
    aten.zero_.default,
)
INITIALISERS = {name: function for name, function in vars(nn.init).items() if name[0] != "_" and name[-1] == "_"}
USE_LOAD = "make the model in memory, save its state_dict, and give store.load(make, state) that"


class Deferred(ShapesAlone):
    """Within `make` tensors have no data. `draw` gives them the values that they would have had."""

    def __init__(self) -> None:
        super().__init__(truth=0)
        self._steps: dict[int, list[Step] | None] = {}  # by storage; None if they are not known
        self._alive: list[Tensor] = []  # so that no two storages have one number

    def make(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return make(), without data. Raises ValueError if it needs data."""
        if not callable(make) or isinstance(make, nn.Module):
            raise TypeError(
                f"make must be a function that makes the model, such as lambda: Net(), not a {type(make).__name__}"
            )
        try:
            with self, ExitStack() as stack:
                for name, function in INITIALISERS.items():
                    stack.enter_context(patch.object(nn.init, name, self._noting(function)))
                return make()
        except (RuntimeError, NotImplementedError) as problem:
            raise ValueError(
                f"make() does not run without data ({' '.join(str(problem).split())}): make the model in memory, and "
                "give MemDFA that with offload"
            ) from problem

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        if operation is TRUTH_VALUE and not has_data(args[0]):
            raise RuntimeError("it asks for a value")
        given = tensors_in([args, kwargs])
        out = super().watch(operation, args, kwargs)
        for made in () if operation.is_view else tensors_in(out):
            self._note(made, self._history(operation, args, kwargs, given, made))
        return out

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if it is not known how a tensor of the model gets its value."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not has_data(tensor) and self._steps.get(storage_id(tensor)) is None:
                raise ValueError(f"it is not known how make() initialises {name}: {USE_LOAD}")
        check_attributes(model)

    def draw(self, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the values of these tensors, with random numbers from this seed; torch's generator is as before."""
        values = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for name, tensor in tensors.items():
                value = tensor.detach()
                for step in self._steps.get(storage_id(tensor)) or ():
                    value = step(value)
                values[name] = value
        return values

    def _noting(self, initialise: Any) -> Any:
        @wraps(initialise)
        def note(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if has_data(tensor):
                initialise(tensor, *args, **kwargs)
            else:
                known = _is_whole(tensor) and not _generators(args, kwargs)
                self._note(tensor, [_over(tensor, initialise, args, kwargs)] if known else None)
            return tensor

        return note

    def _note(self, tensor: Tensor, steps: list[Step] | None) -> None:
        self._alive.append(tensor)
        self._steps[storage_id(tensor)] = steps

    def _history(self, operation: Any, args: Any, kwargs: Any, given: list[Tensor], made: Tensor) -> list[Step] | None:
        """Return the steps of what an operation has made, or changed in place."""
        if _generators(args, kwargs):
            return None
        if not given:
            return None if "empty" in operation.name() else [lambda value: operation(*args, **kwargs)]
        before = args[0] if args else None
        if len(given) > 1 or given[0] is not before or not _is_whole(before) or not _is_whole(made):
            return None
        if operation in OVERWRITES:
            return [_over(made, operation, args[1:], kwargs)]
        steps = self._steps.get(storage_id(before))
        return None if steps is None else [*steps, lambda value: operation(value, *args[1:], **kwargs)]


def check_attributes(model: nn.Module) -> None:
    """Raise ValueError if a module has a tensor without data that is neither a parameter nor a buffer."""
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not has_data(value):
                where = ".".join(filter(None, [path, name]))
                raise ValueError(f"{where} is neither a parameter nor a buffer, and would have no data: register it")


def _is_whole(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()


def _generators(args: Any, kwargs: Any) -> bool:
    return any(isinstance(value, torch.Generator) for value in [*args, *kwargs.values()])


def _over(like: Tensor, fill: Any, args: Any, kwargs: Any) -> Step:
    """Return the step that fills a new tensor of this shape, whatever it was before."""
    shape, dtype = like.shape, like.dtype

    def step(value: Tensor) -> Tensor:
        new = torch.empty(shape, dtype=dtype)
        fill(new, *args, **kwargs)
        return new

    return step
