"""The tensors of a network's blocks that rest in a store: their names there, and checks that they can rest.

A resting tensor is the same object, with its shape but without its data.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import first_difference
from memdfa_lab.core.compat import storage_id, tree_map_only
from memdfa_lab.core.state import optimizer_tensors
from memdfa_lab.core.watcher import empty_of_shape
from memdfa_lab.lab.checkpoints import without_addresses
from memdfa_lab.lab.tensor_files import NAMES
from memdfa_lab.memory.shapes import ShapesAlone

OPTIMIZER, LEARNED = "optimizer", "learned"  # prefixes of the names of optimizer state, and of a B that learns
FEEDBACK = "feedback"  # the name of a B that does not change
KINDS = {OPTIMIZER: "optimizer state", LEARNED: "feedback", FEEDBACK: "feedback"}  # of other names: weights or buffers
WHERE = "this tensor rests in {}: use it through the rule, MemDFA(..., offload=store), which loads it"


class Saved(Mapping[str, Tensor]):
    """The state_dict of resting blocks, which calls `read(i, name)` for a tensor when it is accessed."""

    def __init__(self, chain: Iterable[nn.Module], read: Callable[[int, str], Tensor]):
        self._read = read
        self._where: dict[str, tuple[int, str | None, Tensor]] = {}
        for i, block in enumerate(chain):
            names = {id(tensor): name for name, tensor in weights(i, block).items()}
            for name, value in block.state_dict(keep_vars=True).items():
                if isinstance(value, Tensor):
                    self._where[f"{i}.{name}"] = i, names.get(id(value)), value

    def __getitem__(self, name: str) -> Tensor:
        i, resting, tensor = self._where[name]
        return tensor.detach() if resting is None else self._read(i, resting)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def weights(i: int, block: nn.Module) -> dict[str, Tensor]:
    """Return block i's parameters and buffers by their names in the network, except those without numbers."""
    named = [*block.named_parameters(), *block.named_buffers()]
    return {f"{i}.{name}": tensor for name, tensor in named if tensor.numel() and 0 not in tensor.stride()}


def learning(i: int, block: nn.Module, rule: Any) -> Iterator[tuple[str, Tensor, dict[Tensor, dict[str, Any]]]]:
    """Yield the tensors of block i that optimizers update, with the prefix of their state's names, and the state."""
    optimizer, key = rule and rule.optimizers[i], ("block", i)
    for k, parameter in enumerate(block.parameters()) if optimizer is not None else ():
        yield f"{OPTIMIZER}.{i}.{k}.", parameter, optimizer.state
    if rule is not None and rule.feedback.learns and key in rule.feedback.matrices:
        yield f"{LEARNED}.{i}.", rule.feedback.matrices[key], rule.feedback.optimizer_of(key).state


def kept_of(i: int, block: nn.Module, rule: Any) -> dict[str, Any]:
    """Return the optimizers' state of block i, and its B if that learns, by name."""
    found: dict[str, Any] = {}
    for begin, tensor, states in learning(i, block, rule):
        found |= {f"{begin}B": tensor} if begin.startswith(LEARNED) else {}
        found |= {f"{begin}{key}": value for key, value in states.get(tensor, {}).items()}
    return found


def tensors_of(i: int, block: nn.Module, rule: Any) -> dict[str, Tensor]:
    """Return the tensors of block i that change: weights, buffers, optimizer state, and a B that learns."""
    kept = kept_of(i, block, rule).items()
    return weights(i, block) | {name: value for name, value in kept if isinstance(value, Tensor)}


def give_back(i: int, block: nn.Module, rule: Any, kept: dict[str, Any], where: str) -> None:
    """Give block i's optimizers the state of `kept_of`, as tensors without data that rest in the place `where`."""
    kept = tree_map_only(Tensor, lambda t: absent(t.shape, t.stride(), t.dtype, "cpu", where), kept)
    B = kept.pop(f"{LEARNED}.{i}.B", None)
    if B is not None:
        rule.feedback.matrices["block", i] = B
    for begin, tensor, states in learning(i, block, rule):
        state = {name.removeprefix(begin): value for name, value in kept.items() if name.startswith(begin)}
        if state:
            states[tensor].update(state)


def absent(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: str, where: str) -> Tensor:
    """Return a tensor without data for `device`; its data rests in the place `where`."""
    if device != "cpu":
        tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        tensor.untyped_storage().resize_(0)
        return tensor
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    return empty_of_shape(shape, stride, dtype, size * dtype.itemsize, WHERE.format(where))


def described(chain: Iterable[nn.Module]) -> str:
    """Return a description of the network, by which a different one is recognised."""
    lines = []
    for i, block in enumerate(chain):
        lines.append(without_addresses(block))
        lines += [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in weights(i, block).items()]
    return "\n".join(lines)


def values_of(model: nn.Module, state: Mapping[str, Tensor]) -> Callable[[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function that looks up a block's tensors in a state_dict. Raises ValueError if it is another model's."""
    named = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    ours, theirs = ("\n".join(f"{k} {tuple(v.shape)}" for k, v in each.items()) for each in (named, state))
    if ours != theirs:
        ours, theirs = first_difference(ours, theirs)
        raise ValueError(f"this state is of another model: it has {theirs!r}, make() has {ours!r}")
    names = {id(tensor): name for name, tensor in named.items()}

    def values(i: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        unsaved = [name for name, tensor in tensors.items() if id(tensor) not in names]
        if unsaved:
            raise ValueError(f"{unsaved[0]} is a buffer that no state_dict has: register it as persistent")
        return {name: state[names[id(t)]].detach().to("cpu", t.dtype) for name, t in tensors.items()}

    return values


def state_bytes(rule: Any) -> int:
    """Return how many bytes the rule's optimizers will keep, found by a step of each without data."""
    total = 0
    for parameters in filter(None, rule.parameters):
        with ShapesAlone(), suppress(RuntimeError, NotImplementedError):  # a step may ask for values
            alike = [nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype)) for p in parameters]
            for parameter in alike:
                parameter.grad = torch.empty_like(parameter)
            optimizer = rule._make_optimizer(alike)
            optimizer.step()
            total += sum(tensor.numel() * tensor.itemsize for tensor in optimizer_tensors([optimizer]))
    return total


def check_block(i: int, block: nn.Module, device: str) -> None:
    """Raise ValueError if a tensor of the block cannot be written and read back, or others share its memory."""
    held: dict[int, str] = {}
    for name, tensor in weights(i, block).items():
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in NAMES
        if not plain or tensor.device.type not in ("cpu", torch.device(device).type):
            kind = f"a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
            raise ValueError(
                f"{name} is {kind}, but only plain tensors on the CPU can rest in a store: leave offload out"
            )
        if held.setdefault(storage_id(tensor), name) != name:
            raise ValueError(
                f"{held[storage_id(tensor)]} and {name} share memory, which a store separates: make them one tensor"
            )
    for part in block.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and storage_id(value) in held:
                raise ValueError(
                    f"{name} of {type(part).__name__} is a view of {held[storage_id(value)]}, and would not follow "
                    "its changes: make it in forward"
                )
