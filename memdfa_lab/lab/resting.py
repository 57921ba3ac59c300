"""The blocks of a network whose tensors rest elsewhere, and how they come into memory and go out again.

A tensor that rests is the same object, of the same shape, and has no data.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.compat import storage_id
from memdfa_lab.core.feedback import Stored
from memdfa_lab.core.phases import label
from memdfa_lab.core.state import optimizer_tensors
from memdfa_lab.core.store import FORWARD, NORM, TEACH
from memdfa_lab.core.watcher import empty_of_shape, unwatched
from memdfa_lab.lab.checkpoints import without_addresses
from memdfa_lab.lab.place import FEEDBACK, Coming, Place
from memdfa_lab.lab.tensor_files import DTYPES, NAMES
from memdfa_lab.memory.shapes import ShapesAlone

WHERE = "this tensor rests in {}: only MemDFA(..., offload=store) and what is given that rule bring it in"
OPTIMIZER = "optimizer."  # how the names of its state begin
LEARNED = "learned."  # how the names of one that does begin, and of its optimizer's state
KINDS = {OPTIMIZER: "optimizer state", LEARNED: "feedback"}
ORDER = (FORWARD, NORM, TEACH)


class Resting:
    """The blocks of `chain`, whose tensors are in `place`. `ahead`: so many blocks are read before they are needed.

    Attributes:
        network: What the network is, in words, by which another one is told apart.

    Raises ValueError for tensors that cannot be written and read back as they are.
    """

    def __init__(self, chain: Sequence[nn.Module], place: Place, ahead: int):
        self.chain, self.place, self.ahead = list(chain), place, min(ahead, len(chain) - 1)
        self.rule: Any = None
        self._coming: dict[int, tuple[str, Coming]] = {}  # what is read ahead, by block
        self._stored: dict[int, Tensor] = {}  # the B that rests there, by block
        lines = []
        for i, block in enumerate(self.chain):
            _check(i, block, place.device)
            lines.append(without_addresses(block))
            lines += [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in weights(i, block).items()]
        self.network = "\n".join(lines)

    def has(self, chain: Sequence[nn.Module]) -> bool:
        """Tell whether these blocks are of the same tensors, which may be of other modules around them."""
        ours, theirs = (
            [list(map(id, weights(0, block).values())) for block in blocks] for blocks in (self.chain, chain)
        )
        return ours == theirs

    def tensors(self, i: int) -> dict[str, Tensor]:
        """Return what block i's file has: weights and buffers, and then what its optimizer keeps."""
        found = weights(i, self.chain[i])
        for k, state in self._states(i).items():
            found |= {f"{OPTIMIZER}{i}.{k}.{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        key = "block", i
        if self.rule is not None and self.rule.feedback.learns and key in self.rule.feedback.matrices:
            B = self.rule.feedback.matrices[key]
            found[f"{LEARNED}{i}.B"] = B
            kept = self.rule.feedback.optimizer_of(key).state.get(B, {})
            found |= {f"{LEARNED}{i}.{name}": value for name, value in kept.items() if isinstance(value, Tensor)}
        return found

    def remember_state(self, rule: Any) -> None:
        """Take over a rule, and give its optimizers the state that is in the files, without data."""
        self.rule = rule
        for i, optimizer in enumerate(rule.optimizers):
            entries, texts = self.place.header(i)
            parameters = list(self.chain[i].parameters())
            for k, values in json.loads(texts.get(OPTIMIZER, "{}")).items() if optimizer is not None else ():
                optimizer.state[parameters[int(k)]].update(values)
            for name, entry in entries.items():
                if name.startswith(OPTIMIZER) and optimizer is not None:
                    k, key = name.removeprefix(f"{OPTIMIZER}{i}.").split(".", 1)
                    optimizer.state[parameters[int(k)]][key] = self._absent_as(entry, parameters[int(k)])
            if f"{LEARNED}{i}.B" in entries:
                learned = {
                    name.removeprefix(f"{LEARNED}{i}."): entry
                    for name, entry in entries.items()
                    if name.startswith(LEARNED)
                }
                B = rule.feedback.matrices["block", i] = self._absent_as(learned.pop("B"))
                rule.feedback.optimizer_of(("block", i)).state[B].update(
                    {name: self._absent_as(entry, B) for name, entry in learned.items()}
                )

    def bring_in(self, i: int, use: str) -> None:
        """Give block i's tensors the data that this use needs, and begin to read the blocks after it."""
        read_for, coming = self._coming.pop(i, (FORWARD, None))
        if coming is None or ORDER.index(read_for) < ORDER.index(use):
            coming = self._read(i, use)
        fetched = coming.result()
        for name, tensor in self.tensors(i).items():
            if name in fetched:
                kind = next((kind for begin, kind in KINDS.items() if name.startswith(begin)), "buffers")
                kind = "parameters" if isinstance(tensor, nn.Parameter) else kind
                value = label(kind, fetched.pop(name))
                if value.stride() != tensor.stride():
                    value = label(kind, value.new_empty_strided(value.shape, tensor.stride()).copy_(value))
                tensor.data = value
        if FEEDBACK in fetched:
            self._stored[i].data = label("feedback", fetched[FEEDBACK])
        for j in range(i + 1, i + 1 + self.ahead):
            later, j = use if j < len(self.chain) else self._after(use), j % len(self.chain)
            if j not in self._coming or ORDER.index(self._coming[j][0]) < ORDER.index(later):
                self._coming[j] = later, self._read(j, later)

    def leave(self, i: int, use: str) -> None:
        """Write what this use has changed in block i, and take its data out of memory."""
        fixed = use != FORWARD and isinstance(self.rule.feedback, Stored) and not self.rule.feedback.learns
        matrices = self.rule.feedback.matrices if fixed else {}
        B = matrices.get(("block", i))
        if use == TEACH:
            plain = {
                k: {name: value for name, value in state.items() if not isinstance(value, Tensor)}
                for k, state in self._states(i).items()
            }
            values = {name: tensor.detach().contiguous() for name, tensor in self.tensors(i).items()}
            self._coming.pop(i, None)
            self.place.write(i, values, {OPTIMIZER: json.dumps(plain)})
        if B is not None and self._stored.get(i) is not B:
            self.place.write_feedback(i, B.detach())
            self._stored[i] = B
        self.take_out(i)

    def take_out(self, i: int) -> None:
        """Take block i's data out of memory."""
        stored = [self._stored[i]] if i in self._stored else []
        with unwatched():
            for tensor in [*self.tensors(i).values(), *stored]:
                tensor.data = self._absent(tensor.shape, tensor.stride(), tensor.dtype)

    def _states(self, i: int) -> dict[int, dict[str, Any]]:
        """Return what block i's optimizer keeps of each of its parameters, by their numbers in the block."""
        optimizer = self.rule and self.rule.optimizers[i]
        numbered = enumerate(self.chain[i].parameters()) if optimizer is not None else ()
        return {k: optimizer.state[parameter] for k, parameter in numbered if parameter in optimizer.state}

    def _after(self, use: str) -> str:
        """Return for what blocks are used once all have been used for `use`."""
        if use == TEACH and not self.rule.sweeps:
            return FORWARD
        norm = self.rule is not None and self.rule.clip_global_norm is not None
        return NORM if norm and use == FORWARD else TEACH

    def _read(self, i: int, use: str) -> Coming:
        def wanted(name: str) -> bool:
            return use == TEACH or not name.startswith((OPTIMIZER, LEARNED)) or (use == NORM and name.endswith(".B"))

        return self.place.read(i, wanted, feedback=use != FORWARD and i in self._stored)

    def _absent_as(self, entry: Mapping[str, Any], like: Tensor | None = None) -> Tensor:
        """Return a tensor without data as a file says, laid out as one of the same shape."""
        shape = torch.Size(entry["shape"])
        alike = like if like is not None and like.shape == shape else torch.empty(shape, device="meta")
        return self._absent(shape, alike.stride(), DTYPES[entry["dtype"]])

    def _absent(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.place.device != "cpu":
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=self.place.device)
            tensor.untyped_storage().resize_(0)
            return tensor
        size = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        return empty_of_shape(shape, stride, dtype, size * dtype.itemsize, WHERE.format(self.place))


class Saved(Mapping[str, Tensor]):
    """The state_dict of resting blocks; each tensor is read when it is asked for."""

    def __init__(self, resting: Resting):
        self._place = resting.place
        self._where: dict[str, tuple[int, str | None, Tensor]] = {}
        for i, block in enumerate(resting.chain):
            names = {id(tensor): name for name, tensor in weights(i, block).items()}
            for name, value in block.state_dict(keep_vars=True).items():
                if isinstance(value, Tensor):
                    self._where[f"{i}.{name}"] = i, names.get(id(value)), value

    def __getitem__(self, name: str) -> Tensor:
        i, stored, tensor = self._where[name]
        if stored is None:
            return tensor.detach()
        return self._place.read(i, lambda other: other == stored).result()[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def state_bytes(rule: Any) -> int:
    """Return how many bytes the rule's optimizers will keep, by steps of theirs on shapes alone."""
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


def weights(i: int, block: nn.Module) -> dict[str, Tensor]:
    """Return block i's parameters and buffers, by their names in the network, without what holds no numbers."""
    named = [*block.named_parameters(), *block.named_buffers()]
    return {f"{i}.{name}": tensor for name, tensor in named if tensor.numel() and 0 not in tensor.stride()}


def _check(i: int, block: nn.Module, device: str) -> None:
    """Raise ValueError if a tensor of the block cannot be written and read back, or others share its memory."""
    held: dict[int, str] = {}
    for name, tensor in weights(i, block).items():
        if (
            tensor.device.type not in ("cpu", device)
            or tensor.dtype not in NAMES
            or type(tensor) not in (Tensor, nn.Parameter)
        ):
            kind = f"a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name} is {kind}, but plain tensors on the CPU alone rest in a store: leave offload out")
        if held.setdefault(storage_id(tensor), name) != name:
            raise ValueError(
                f"{held[storage_id(tensor)]} and {name} share memory, which they do not in a store: make them one"
            )
    for part in block.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) and storage_id(value) in held:
                raise ValueError(
                    f"{name} of {type(part).__name__} is a view of {held[storage_id(value)]}, and would stay as it is "
                    "now: make it in forward"
                )
