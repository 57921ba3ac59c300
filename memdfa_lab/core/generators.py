"""The states of all generators that a block may draw from, taken and set together: torch's, Python's and numpy's."""

import copy
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.devices import module_of
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.core.watcher import unwatched

Access = tuple[Callable[[], Any], Callable[[Any], Any]]  # how to take a generator's state, and how to set it
WITHOUT = ("cpu", "meta")  # devices without a generator of their own


@contextmanager
def generators_restored(device: torch.device | str) -> Iterator[None]:
    """Restore the global generators of torch, the one of `device` with them, Python and numpy on leaving."""
    restore = hold(device)
    try:
        yield
    finally:
        restore()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator within, and restore it on leaving. Raises ValueError for what is no seed."""
    check_int("seed", seed, 0, LARGEST_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def generator_restored(generator: Any) -> Iterator[None]:
    """Restore a generator of torch, numpy or Python on leaving."""
    get, put = _state_of(generator)
    before = get()
    try:
        yield
    finally:
        put(before)


def _state_of(generator: Any) -> Access:
    """Return how to take and to set the state of a generator; for any other object both do nothing."""
    for get, put in (("get_state", "set_state"), ("getstate", "setstate")):  # of torch and numpy, of Python
        if hasattr(generator, get) and hasattr(generator, put):
            return getattr(generator, get), getattr(generator, put)
    if hasattr(generator, "bit_generator"):  # numpy's newer ones
        bits = generator.bit_generator
        return lambda: copy.deepcopy(bits.state), lambda state: setattr(bits, "state", state)
    return lambda: None, lambda state: None


def _generators(device: torch.device | str) -> list[Access]:
    """Return how to take and set the state of each global generator, for a network on this device or kind of one."""
    numpy, device = sys.modules.get("numpy"), torch.device(device)
    found = [_state_of(generator) for generator in (torch.default_generator, random, getattr(numpy, "random", None))]
    return found if device.type in WITHOUT else [*found, _of_accelerator(device)]


def of_torch(device: torch.device) -> dict[str, Access]:
    """Return how to take and set the states of torch's generators on the CPU and on this device, by kind of device."""
    found: dict[str, Access] = {"cpu": (torch.get_rng_state, torch.set_rng_state)}
    return found if device.type in WITHOUT else found | {device.type: _of_accelerator(device)}


def _of_accelerator(device: torch.device) -> Access:
    module = module_of(device)
    if not hasattr(module, "default_generators"):  # there is only one device of this kind, as with MPS
        return module.get_rng_state, module.set_rng_state
    return _state_of(module.default_generators[module.current_device() if device.index is None else device.index])


def states(device: torch.device | str) -> list[Any]:
    """Return the state of each global generator, for a network on this device."""
    return [get() for get, _ in _generators(device)]


def drawn(before: list[Any], after: list[Any]) -> set[int]:
    """Return the indices, in these lists of states, of the generators that were used in between."""
    with unwatched():
        return {k for k, pair in enumerate(zip(before, after, strict=True)) if not _same(*pair)}


def hold(device: torch.device | str, which: set[int] | None = None) -> Callable[[], None]:
    """Return a function that restores the present state of the generators: of all, or of those with these indices."""
    each = enumerate(_generators(device))
    held = [(put, get()) for k, (get, put) in each if which is None or k in which]

    def restore() -> None:
        for put, state in held:
            put(state)

    return restore


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else pickle.dumps(one) == pickle.dumps(other)
