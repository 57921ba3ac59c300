"""The kinds of feedback: matrices B that are stored, regenerated at each use, shared by all blocks, or learned."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_number, check_type
from memdfa_lab.core.distributions import DISTRIBUTIONS as DISTRIBUTIONS
from memdfa_lab.core.group import Group
from memdfa_lab.core.matrices import POSITIONS as POSITIONS
from memdfa_lab.core.matrices import Feedback as Feedback
from memdfa_lab.core.matrices import Key
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.state import described, make_optimizer, optimizer_tensors


class Stored(Feedback):
    """Draw each matrix at its first use and keep it: for DFA and MEM-DFA, C n_i numbers a block stay in memory."""

    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        B = self.matrices.get(key)
        if B is None or tuple(B.shape) != shape or _would_lose_bits(B, like):
            B = self._draw(self._generator(key), shape, factor, like)
        self.matrices[key] = B.to(device=like.device)
        return self.matrices[key].to(dtype=like.dtype)


class Learned(Stored):
    """Stored matrices that learn as the weights do: direct Kolen-Pollack.

    After block i has been taught, an optimizer of its own updates B_i with the gradient e^T h_i, (C, N) @ (N, n_i). If
    the blocks above were one linear layer h_i W^T, this would also be the gradient of W. Both would then receive the
    same updates, `decay` would remove their initial values, and B_i and W would come to agree (Kolen and Pollack 1994;
    Akrout et al. 2019 for one weight a layer). Only DFA and MEM-DFA can use it. Between steps B and its optimizer's
    state stay in memory, in the weights' dtype, or in float32 if that is wider.

    `distribution`: with "zero", B starts at 0, and all blocks but the last start to learn in the second step. `lr` is
    B's learning rate; `optimizer` makes an optimizer from (parameters, lr=, weight_decay=), Adam if not given; `decay`
    is its weight decay. A scheduler of `ml.fit` changes the weights' learning rate; B keeps its own.

    Raises ValueError for a grid, whose signal is interpolated, and what `Feedback` raises; TypeError if `optimizer`
    makes no optimizer; later, ValueError for a block whose output has changed its size.
    """

    learns = True

    def __init__(
        self,
        seed: int = 0,
        distribution: str = "he_normal",
        scale: float = 1.0,
        positions: str = POSITIONS[0],
        grid: int | None = None,
        *,
        lr: float,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        decay: float = 0.0,
    ):
        super().__init__(seed, distribution, scale, positions, grid)
        if grid is not None:
            raise ValueError("a signal on a grid is interpolated, and B on it is not learned: leave grid out")
        check_number("lr", lr, or_more=False)
        check_number("decay", decay)
        check_type("optimizer", optimizer, Callable, "a class of optimizers, such as torch.optim.Adam")
        self.lr, self.decay, self._make = lr, decay, optimizer
        self.optimizers: dict[Key, torch.optim.Optimizer] = {}
        make_optimizer(self._made, [nn.Parameter(torch.zeros(1))])

    def check(self, logits: Sequence[int], *outputs: Sequence[int]) -> None:
        """Do what `Feedback.check` does. Raises ValueError for outputs of another size than B has learned for."""
        super().check(logits, *outputs)
        for i, shape in enumerate(self.matrix_shapes(logits, *outputs)):
            self._check_shape(("block", i), shape[::-1])

    def learn(self, i: int, e: Tensor, h: Tensor, group: Group, taught: bool = True) -> None:
        """Move B_i along e^T h_i, from the error e (N, C) and block i's output h (N, ...), over all ranks.

        The sum is over the ranks that have taught the block; if none has, B_i stays as it is.
        """
        key = ("block", i)
        with phase("learn B", i), torch.no_grad():
            if not taught:
                if group.size == 1:
                    return
                self.dense(i, *self.matrix_shapes(e.shape, h.shape)[0], like=h)  # another rank may have taught it
            B = self.matrices[key]
            optimizer = self.optimizer_of(key)
            if taught:
                self._leave_gradient(B, e, h)
            group.sum([B])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """Return B and what its optimizers keep."""
        return [*super().tensors(), *optimizer_tensors([*self.optimizers.values()])]

    def settings(self) -> dict[str, Any]:
        """Return the settings that define this feedback, without its matrices."""
        made = self._made([nn.Parameter(torch.zeros(1))])
        return {**super().settings(), "lr": self.lr, "decay": self.decay, "optimizer": described(made)}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, matrices and optimizers' state, to go on from; tensors are not copied."""
        states = {key: optimizer.state_dict()["state"] for key, optimizer in self.optimizers.items()}
        return {**super().state_dict(), "states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load copies of the matrices and of their optimizers' state. Raises ValueError for another optimizer."""
        ours = self.settings()["optimizer"]
        theirs = state.get("optimizer", ours)  # other kinds have none
        if theirs != ours:
            raise ValueError(f"this state's B learns by {theirs}, this feedback's by {ours}: make that one")
        super().load_state_dict(state)
        self.optimizers = {}
        for key, saved in state["states"].items():
            optimizer = self.optimizer_of(key)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(saved)})

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, lr={self.lr}, decay={self.decay}, optimizer={self.settings()['optimizer']})"

    def optimizer_of(self, key: Key) -> torch.optim.Optimizer:
        """Return the optimizer of a matrix that has been drawn; made anew if the matrix has moved to another device."""
        B, before = self.matrices[key], self.optimizers.get(key)
        if before is None or before.param_groups[0]["params"][0] is not B:
            self.optimizers[key] = self._made([B])
            if before is not None:
                self.optimizers[key].load_state_dict(before.state_dict())
        return self.optimizers[key]

    def _made(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return self._make(parameters, lr=self.lr, weight_decay=self.decay)

    def _leave_gradient(self, B: Tensor, e: Tensor, h: Tensor) -> None:
        B.grad = label("feedback", torch.empty_like(B))
        dim = self.class_dim(e.shape, h.shape)
        if dim is not None:  # each position is an example
            e, h = e.movedim(dim, -1).flatten(0, -2), h.movedim(dim, -1).flatten(0, -2)
        e = e.reshape(len(e), -1).to(B.dtype)
        units = B.grad.view(h.shape[1] if h.dim() > 1 else 1, -1, B.shape[1])  # the rest are positions
        for start in range(0, len(units), max(1, len(units) // 4)):
            part = slice(start, start + max(1, len(units) // 4))
            some = h[:, part].reshape(len(h), -1).to(B.dtype) if h.dim() > 1 else h[:, None].to(B.dtype)
            torch.mm(some.t(), e, out=units[part].view(-1, B.shape[1]))
            del some

    def _check_shape(self, key: Key, shape: tuple[int, ...]) -> None:
        B = self.matrices.get(key)
        if B is not None and tuple(B.shape) != shape:
            raise ValueError(
                f"B of block {key[1]} has learned for {B.shape[0]} outputs, and there are {shape[0]} now: keep to one "
                "size of x, or take Stored feedback; no weight was changed"
            )

    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        self._check_shape(key, shape)
        B = self.matrices.get(key)
        if B is None:  # updates that are small beside B would be lost in half precision
            wide = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
            B = self._draw(self._generator(key), shape, factor, wide)
        self.matrices[key] = B.to(device=like.device)
        return self.matrices[key].to(dtype=like.dtype)


class Regenerated(Feedback):
    """Draw each matrix anew at every use, some columns at a time: the matrices of `Stored`, but none kept in memory."""

    keeps = False

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part] as `Feedback.columns` does, without making all of B_i (except for orthogonal ones)."""
        if self.distribution == "orthogonal":
            yield from super().columns(i, parts, error_size, output_size, like)
            return
        generator, factor = self._generator(("block", i)), self._factor(error_size, output_size)
        for part in parts:
            yield self._draw(generator, (part.stop - part.start, error_size), factor, like).t()

    def reusable(self) -> Feedback:
        """Return `Stored` feedback of the same matrices, each drawn at its first use."""
        return Stored(self.seed, self.distribution, self.scale, self.positions, self.grid)

    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        return self._draw(self._generator(key), shape, factor, like)


class Shared(Feedback):
    """Keep one matrix, as large as the largest that was needed so far, and give each block a slice of it.

    B_i is its first n_i columns, scaled for block i. Raises ValueError for the orthogonal distribution: a slice of an
    orthogonal matrix is not orthogonal.
    """

    slices = True

    def matrix_shapes(self, logits: Sequence[int], *outputs: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shape of the matrix that the blocks share, one for each size of the error."""
        return list(dict(sorted(super().matrix_shapes(logits, *outputs))).items())

    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        columns = shape[1] if key[0] == "block" else 1
        rows, shared_key = math.prod(shape) // columns, (key[0], columns)
        shared = self.matrices.get(shared_key)
        if shared is None or shared.shape[0] < rows or _would_lose_bits(shared, like):
            shared = self._draw(self._generator(shared_key), (rows, columns), 1.0, like)  # begins as the smaller one
        self.matrices[shared_key] = shared = shared.to(device=like.device)
        B = label("feedback", shared[:rows].view(shape) * factor)
        return label("feedback", B.to(dtype=like.dtype))


KINDS: dict[str, type[Feedback]] = {"stored": Stored, "regenerated": Regenerated, "shared": Shared}


def _would_lose_bits(kept: Tensor, like: Tensor) -> bool:
    return torch.promote_types(kept.dtype, like.dtype) != kept.dtype
