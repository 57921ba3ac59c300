"""The fixed random matrices B that carry the error to a block in place of the transposed weights.

DFA and MEM-DFA (Nøkland 2016; Chu et al. 2020): B_i has shape (C, n_i), where C is the size of the error and n_i that
of the block's output, both flattened in logical order; the signal is e B_i, (N, C) @ (C, n_i). Where e and the output
have the same positions, such as words (N, T, V) and (N, T, d) or pixels (N, V, H, W) and (N, d, H, W), B_i is (V, d)
and the same at all positions. FA (Lillicrap et al. 2016): one B for each weight, of the weight's own shape.

A matrix depends only on the seed and its key. It is drawn in float32 on the CPU by a generator of its own, then moved.
It is therefore the same for every rule, kind of feedback and device, whatever the state of the global generator.
"""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, check_number, lookup
from memdfa_lab.core.distributions import BEGINNINGS, seconds_a_number
from memdfa_lab.core.group import Group
from memdfa_lab.core.phases import label
from memdfa_lab.core.seeds import LARGEST_SEED, mix

Key = tuple[str, int]  # ("block", i) for DFA and MEM-DFA, ("weight", j) for FA
KEY_NUMBERS = {"block": 0, "weight": 1}
POSITIONS = ("shared", "classes first", "classes last", "dense")
LARGE_BYTES = 2**30  # a warning is given for a larger B


class Feedback(ABC):
    """A family of fixed random matrices.

    `seed` determines them; `distribution` is one of DISTRIBUTIONS, or "zero" for matrices that learn; `scale`
    multiplies them. Subclasses differ in what they keep between uses, not in the matrices (except for `Shared`).

    `positions`: with "shared", B_i is (V, d) where the positions of the logits and of the block's output agree. The
    logits are then (N, V, ...) and the output (N, d, ...), with equal dimensions from 2 on, or (N, ..., V) and
    (N, ..., d), with equal dimensions up to the last. "classes first" and "classes last" allow only the first or only
    the second, for networks whose shapes allow both. Other blocks have a dense B_i, (C, n_i); with "dense", all have.

    `grid`: a dense B_i has fewer columns. The signal is formed on a grid of this many positions along each dimension,
    and interpolated: B_i is (C, d grid grid) for images (N, d, H, W), and (C, d grid) for words (N, T, d). With 1 the
    signal is the same at all positions. "classes first" and "classes last" also say where d is. A block that ends in
    nn.Flatten has no positions.

    Raises ValueError for an unknown distribution or name of positions, a seed that is not a whole number from 0 to
    2**64 - 1, a scale that is not a finite positive number, or a grid below 1.
    """

    slices: ClassVar[bool] = False  # whether a block's matrix is a slice of a larger one
    keeps: ClassVar[bool] = True  # whether matrices stay in memory between uses
    learns: ClassVar[bool] = False  # whether they change from step to step

    def __init__(
        self,
        seed: int = 0,
        distribution: str = "he_normal",
        scale: float = 1.0,
        positions: str = POSITIONS[0],
        grid: int | None = None,
    ):
        lookup("distribution", distribution, BEGINNINGS)
        if distribution == "zero" and not self.learns:
            raise ValueError("a B that is zero and does not learn teaches nothing: take Learned, or a random one")
        if self.slices and distribution == "orthogonal":
            raise ValueError("a slice of an orthogonal matrix is not orthogonal: use Stored or Regenerated")
        lookup("positions", positions, dict.fromkeys(POSITIONS))
        check_number("scale", scale, or_more=False)
        self.seed, self.distribution, self.scale = check_int("seed", seed, 0, LARGEST_SEED), distribution, float(scale)
        self.positions, self.grid = positions, grid if grid is None else check_int("grid", grid)
        self.matrices: dict[Key, Tensor] = {}

    def class_dim(self, logits: Sequence[int], *outputs: Sequence[int]) -> int | None:
        """Return the dimension of the classes in the logits, 1 or -1, if a block's output has the same positions.

        The arguments are the shape of the logits and those of one output or more. Returns None if no output has the
        same positions, or B is dense. Raises ValueError if the classes may be in either dimension.
        """
        if self.positions == "dense" or len(logits) < 3:
            return None
        alike = [output for output in outputs if len(output) == len(logits)]
        first = self.positions != "classes last" and any(output[2:] == logits[2:] for output in alike)
        last = self.positions != "classes first" and any(output[1:-1] == logits[1:-1] for output in alike)
        if first and last:
            shapes = " and ".join(str(tuple(output)) for output in alike)
            raise ValueError(
                f"beside the outputs {shapes} of blocks, the classes may be dimension 1 of the logits {tuple(logits)}, "
                "or the last: say which, as in "
                'feedback=ml.feedback.Stored(positions="classes first") or "classes last"; no weight was changed'
            )
        return 1 if first else -1 if last else None

    def on_grid(self, output: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the dimension of the units in a block's output, and B_i's number of positions along each other one."""
        if self.grid is None or not 2 < len(output) < 6:
            return 1, tuple(output[2:])
        last = self.positions == "classes last" or (len(output) == 3 and self.positions != "classes first")
        return -1 if last else 1, tuple(min(self.grid, size) for size in (output[1:-1] if last else output[2:]))

    def matrix_shapes(self, logits: Sequence[int], *outputs: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shapes of the matrices for blocks with these outputs, without drawing one."""
        shapes = []
        for out in outputs:
            dim, (units, positions) = self.class_dim(logits, out), self.on_grid(out)
            dense = math.prod(logits[1:]), math.prod([out[units] if len(out) > 1 else 1, *positions])
            shapes.append(dense if dim is None else (logits[dim], out[dim]))
        return shapes

    def check(self, logits: Sequence[int], *outputs: Sequence[int]) -> None:
        """Warn if the matrices for these outputs will take more than 1 GiB. Raises ValueError as `class_dim` does."""
        self.class_dim(logits, *outputs)
        coarse, again = copy.copy(self), not self.keeps
        coarse.grid = min(4, self.grid or 4)
        numbers, fewer = (sum(map(math.prod, one.matrix_shapes(logits, *outputs))) for one in (self, coarse))
        if self.matrices or 4 * numbers <= LARGE_BYTES:
            return
        second = seconds_a_number(self.distribution, min(math.prod(logits[1:]), 1000))
        size, less = (f"{n:,} numbers ({n / 2**28:.2f} GiB, about {n * second:.2g} s here)" for n in (numbers, fewer))
        ways = [f"feedback with grid=4 has {less}"] if fewer < numbers and not self.learns else []
        ways += ['positions="shared" has fewer where logits have positions'] if self.positions == "dense" else []
        ways += ["Stored draws it once" if again else "Regenerated keeps none of it, and draws it in every step"]
        kept = "draws in every step" if again else "draws once and keeps"
        warnings.warn(f"B has {size}, which {type(self).__name__} {kept}: {'; '.join(ways)}", stacklevel=2)

    def dense(self, i: int, error_size: int, output_size: int, like: Tensor) -> Tensor:
        """Return B_i of DFA and MEM-DFA, shape (error_size, output_size), in the dtype and on the device of `like`.

        The sizes are those of the whole error and output, or those at one position.
        """
        # Drawn transposed, one row an output, so that consecutive outputs are consecutive numbers of the generator.
        return self._matrix(("block", i), (output_size, error_size), self._factor(error_size, output_size), like).t()

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part], shape (error_size, outputs of the part), for parts that follow one another."""
        B = self.dense(i, error_size, output_size, like)
        for part in parts:
            yield B[:, part]

    def weight(self, j: int, weight: Tensor) -> Tensor:
        """Return FA's B for the network's j-th parameter, of its shape and dtype, on its device."""
        fans = weight[0].numel(), weight.shape[0]
        if weight.dim() == 2:  # dense: B stands for W^T, whose first dimension is He's fan_in, as in the authors' code
            fans = fans[1], fans[0]
        return self._matrix(("weight", j), tuple(weight.shape), self._factor(*fans), weight)

    def reusable(self) -> "Feedback":
        """Return a family of the same matrices that draws each only once, for a matrix that is used several times."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the settings that define this feedback, without its matrices."""
        names = ("seed", "distribution", "scale", "positions", "grid")
        return {"kind": type(self).__name__, **{name: getattr(self, name) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the matrices, for `load_state_dict`; nothing is copied."""
        return {**self.settings(), "matrices": dict(self.matrices)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the settings and copies of the matrices. Raises ValueError if the state is of another kind."""
        kind, own = state["kind"], type(self).__name__
        if kind != own:
            raise ValueError(f"this state has {kind} feedback, not {own}: give the rule feedback=ml.feedback.{kind}()")
        self.seed, self.distribution, self.scale = state["seed"], state["distribution"], state["scale"]
        self.positions, self.grid = state.get("positions", "dense"), state.get("grid")  # the defaults of older states
        self.matrices = {key: B.clone() for key, B in state["matrices"].items()}

    def __repr__(self) -> str:
        positions = "" if self.positions == POSITIONS[0] else f", positions={self.positions!r}"
        positions += "" if self.grid is None else f", grid={self.grid}"
        settings = f"seed={self.seed}, distribution={self.distribution!r}, scale={self.scale}{positions}"
        return f"{type(self).__name__}({settings})"

    def learn(self, i: int, e: Tensor, h: Tensor, group: Group, taught: bool = True) -> None:
        """Let B_i learn from the error e (N, C) and block i's output h (N, ...), if `learns`.

        `taught`: whether this process has taught the block in this step.
        """
        raise NotImplementedError

    def tensors(self) -> list[Tensor]:
        """Return what is in memory between steps."""
        return list(self.matrices.values())

    @abstractmethod
    def _matrix(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        """Return the matrix of this key: one of unit scale, times `factor`."""

    def _factor(self, fan_in: int, fan_out: int) -> float:
        return self.scale * BEGINNINGS[self.distribution][1](fan_in, fan_out)

    def _generator(self, key: Key) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(mix(self.seed, KEY_NUMBERS[key[0]], key[1]))

    def _draw(self, generator: torch.Generator, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        unit = BEGINNINGS[self.distribution][0]
        B = unit(label("feedback", torch.empty(shape, dtype=torch.float32, device="cpu")), generator).mul_(factor)
        return label("feedback", B.to(dtype=like.dtype, device=like.device))
