"""A model that is made without memory, and its initial values, drawn later, some tensors at a time.

While it is made, what is done to each tensor is noted: how it was created, and what the functions of torch.nn.init and
others of one tensor did to it. Later the same is done again, with memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.compat import aten, storage_id
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.watcher import has_data
from memdfa_lab.memory.shapes import ShapesAlone

Step = Callable[[Tensor], Tensor]
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


class Deferred(ShapesAlone):
    """Within it tensors have no data. `draw` gives them the values that they would have had."""

    def __init__(self) -> None:
        self._steps: dict[int, list[Step] | None] = {}  # by storage: what makes its value; None if that is not known
        self._alive: list[Tensor] = []  # so that no two storages have one number

    def make(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return make(), without data. Raises ValueError if it needs data."""
        if not callable(make) or isinstance(make, nn.Module):
            raise TypeError(
                f"make must be a function that makes the model, such as lambda: MyModel(), not a {type(make).__name__}"
            )
        try:
            with self:
                return make()
        except RuntimeError as problem:
            if "no data" not in str(problem):
                raise
            raise ValueError(f"make() reads values of tensors that it has made: {USE_LOAD}") from problem

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        given = tensors_in([args, kwargs])
        out = super().watch(operation, args, kwargs)
        if operation.is_view:
            return out
        for made in tensors_in(out):
            self._alive.append(made)
            self._steps[storage_id(made)] = self._history(operation, args, kwargs, given, made)
        return out

    def _history(self, operation: Any, args: Any, kwargs: Any, given: list[Tensor], made: Tensor) -> list[Step] | None:
        if any(isinstance(value, torch.Generator) for value in [*args, *kwargs.values()]):
            return None
        if not given:
            return None if "empty" in operation.name() else [lambda value: operation(*args, **kwargs)]
        whole = made.numel() * made.itemsize == made.untyped_storage().nbytes() and made.is_contiguous()
        if given != [args[0]] if len(given) > 1 or not args else given[0] is not args[0]:
            return None
        if operation in OVERWRITES and whole:
            like = args[0]
            shape, stride, dtype = like.shape, like.stride(), like.dtype
            return [lambda value: operation(torch.empty_strided(shape, stride, dtype=dtype), *args[1:], **kwargs)]
        before = self._steps.get(storage_id(args[0]))
        same = made.shape == args[0].shape and args[0].numel() * args[0].itemsize == args[0].untyped_storage().nbytes()
        if before is None or not whole or not same:
            return None
        return [*before, lambda value: operation(value, *args[1:], **kwargs)]

    def check(self, model: nn.Module) -> None:
        """Raise ValueError if it is not known how a tensor of the model, by name, gets its value."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not has_data(tensor) and self._steps.get(storage_id(tensor)) is None:
                raise ValueError(f"it is not known how make() initialises {name}: {USE_LOAD}")
        check_attributes(model)

    def draw(self, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Return the values of these tensors, drawn by torch's generator from this seed, which is then as before."""
        values = {}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for name, tensor in tensors.items():
                value = tensor.detach() if has_data(tensor) else torch.empty(0)
                for step in self._steps.get(storage_id(tensor)) or ():
                    value = step(value)
                values[name] = value
        return values


USE_LOAD = "make the model in memory, save its state_dict, and give store.load(make, state) that"


def check_attributes(model: nn.Module) -> None:
    """Raise ValueError if a module has a tensor that is neither a parameter nor a buffer, and has no data."""
    for path, part in model.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and not has_data(value):
                where = ".".join(filter(None, [path, name]))
                raise ValueError(f"{where} is neither a parameter nor a buffer, and would have no data: register it")
