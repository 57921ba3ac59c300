"""The fixed random matrices B that carry the error to a block in place of the transposed weights.

DFA and MEM-DFA (Nøkland 2016; Chu et al. 2020): B_i has shape (C, n_i), C the size of the error and n_i that of the
block's output, both flattened in logical order; the signal is e B_i, (N, C) @ (C, n_i). FA (Lillicrap et al. 2016): one
B a weight, of the weight's own shape.

A matrix depends on (seed, key) alone: it is drawn in float32 on the CPU by a generator of its own, then moved, so it is
the same for every rule, storage and device, and whatever the global generator has done before.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memdfa_lab.core.checks import known, number, whole
from memdfa_lab.core.phases import label

SMALL_BYTES = 2**16  # where calling torch takes about as long as the work
Key = tuple[str, int]  # ("block", i) for DFA and MEM-DFA, ("weight", j) for FA


def _unit_he_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    # By the inverse of the distribution function, one uniform number an entry: a larger draw then begins with the
    # smaller one. (torch's trunc_normal_ draws what falls outside again, at the end.) A normal cut at two standard
    # deviations has a standard deviation of 0.8796: divide, so that it is 1 again.
    inside = math.erf(math.sqrt(2))  # how much of a normal lies within two standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2) / 0.87962566103423978)


def _unit_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    inside = 1 - 2**-24  # the inverse is infinite at 1; this cuts the normal at 5.4 standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2))


def _unit_uniform(B: Tensor, generator: torch.Generator) -> Tensor:
    return B.uniform_(-1.0, 1.0, generator=generator)


def _orthogonal(B: Tensor, generator: torch.Generator) -> Tensor:
    # As torch.nn.init.orthogonal_, which draws nothing where there is no data: memory could not be predicted.
    flat = torch.empty_like(B).flatten(1).normal_(generator=generator)
    wide = flat.shape[0] < flat.shape[1]
    q, r = torch.linalg.qr(flat.t() if wide else flat)
    q *= r.diagonal().sign()
    q = q.t() if wide else q
    B.view(q.shape).copy_(q)
    return B


# name -> (draw with unit scale, scale from fan_in and fan_out of B seen as a layer)
DISTRIBUTIONS: dict[str, tuple[Callable[[Tensor, torch.Generator], Tensor], Callable[[int, int], float]]] = {
    "he_normal": (_unit_he_normal, lambda fan_in, fan_out: math.sqrt(2 / fan_in)),  # the authors' (truncated)
    "normal": (_unit_normal, lambda fan_in, fan_out: math.sqrt(1 / fan_in)),
    "uniform": (_unit_uniform, lambda fan_in, fan_out: math.sqrt(1 / fan_out)),  # Nøkland's bounds
    "orthogonal": (_orthogonal, lambda fan_in, fan_out: 1.0),  # singular values all equal
}


class Feedback(ABC):
    """A family of fixed random matrices.

    `seed` gives the matrices, `distribution` is one of DISTRIBUTIONS, `scale` multiplies them. Subclasses differ in
    what they keep between uses, not in the matrices (but for `Shared`). Raises ValueError for an unknown distribution,
    a seed that is not a whole number from 0 on, or a scale that is not a finite positive number.
    """

    def __init__(self, seed: int = 0, distribution: str = "he_normal", scale: float = 1.0):
        known("distribution", distribution, DISTRIBUTIONS)
        number("scale", scale, or_more=False)
        self.seed, self.distribution, self.scale = whole("seed", seed, 0), distribution, float(scale)
        self.matrices: dict[Key, Tensor] = {}

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part], shape (error_size, outputs of the part), for parts that follow one another."""
        B = self.dense(i, error_size, output_size, like)
        for part in parts:
            yield B[:, part]

    def dense(self, i: int, error_size: int, output_size: int, like: Tensor) -> Tensor:
        """Return B_i of DFA and MEM-DFA, shape (error_size, output_size), dtype and device of `like`."""
        # Drawn transposed, one row an output: a slice of the outputs is then a run of the generator.
        return self._matrix(("block", i), (output_size, error_size), error_size, output_size, like).t()

    def weight(self, j: int, weight: Tensor) -> Tensor:
        """Return FA's B for the network's j-th parameter: its shape, dtype and device."""
        out_features, receptive_field = weight.shape[0], weight[0].numel()
        if weight.dim() == 2:  # dense: He's fan_in is the first dimension of W^T's stand-in, as in the authors' code
            return self._matrix(("weight", j), tuple(weight.shape), out_features, receptive_field, weight)
        return self._matrix(("weight", j), tuple(weight.shape), receptive_field, out_features, weight)

    @abstractmethod
    def _matrix(self, key: Key, shape: tuple[int, ...], fan_in: int, fan_out: int, like: Tensor) -> Tensor:
        """Return the matrix of this key."""

    def _draw(self, key: Key, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        return self._drawn(self._generator(key), shape, factor, like)

    def _generator(self, key: Key) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(_mix(self.seed, key))

    def _drawn(self, generator: torch.Generator, shape: tuple[int, ...], factor: float, like: Tensor) -> Tensor:
        unit = DISTRIBUTIONS[self.distribution][0]
        B = unit(label("feedback", torch.empty(shape, dtype=torch.float32, device="cpu")), generator).mul_(factor)
        return label("feedback", B.to(dtype=like.dtype, device=like.device))

    def _factor(self, fan_in: int, fan_out: int) -> float:
        return self.scale * DISTRIBUTIONS[self.distribution][1](fan_in, fan_out)

    def held(self) -> "Feedback":
        """Return the same matrices for several uses of one."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what it takes to have the same matrices elsewhere."""
        settings = {"seed": self.seed, "distribution": self.distribution, "scale": self.scale}
        matrices = {f"{kind} {index}": B for (kind, index), B in self.matrices.items()}
        return {"kind": type(self).__name__, **settings, "matrices": matrices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the settings and matrices of `state`. Raises ValueError if it is of another kind."""
        if state["kind"] != type(self).__name__:
            raise ValueError(
                f"this state has {state['kind']} feedback, the rule has {type(self).__name__}: build the rule with "
                f"feedback=ml.feedback.{state['kind']}()"
            )
        self.seed, self.distribution, self.scale = state["seed"], state["distribution"], state["scale"]
        keys = [(name, name.split()) for name in state["matrices"]]
        self.matrices = {(kind, int(index)): state["matrices"][name].clone() for name, (kind, index) in keys}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(seed={self.seed}, distribution={self.distribution!r}, scale={self.scale})"


class Stored(Feedback):
    """Draw each matrix at its first use and keep it: sum of C n_i numbers at rest."""

    def _matrix(self, key: Key, shape: tuple[int, ...], fan_in: int, fan_out: int, like: Tensor) -> Tensor:
        B = self.matrices.get(key)
        if B is None or tuple(B.shape) != shape or _would_lose_bits(B, like):
            B = self._draw(key, shape, self._factor(fan_in, fan_out), like)
        self.matrices[key] = B.to(device=like.device)
        return self.matrices[key].to(dtype=like.dtype)


class Regenerated(Feedback):
    """Draw each matrix again at every use, some columns at a time: nothing at rest, the same numbers as `Stored`."""

    def columns(
        self, i: int, parts: Sequence[slice], error_size: int, output_size: int, like: Tensor
    ) -> Iterator[Tensor]:
        """Yield B_i[:, part] as `Feedback.columns` does; no whole B_i is made (but for orthogonal ones)."""
        if self.distribution == "orthogonal":
            yield from super().columns(i, parts, error_size, output_size, like)
            return
        generator, factor = self._generator(("block", i)), self._factor(error_size, output_size)
        for part in parts:
            yield self._drawn(generator, (part.stop - part.start, error_size), factor, like).t()

    def held(self) -> Feedback:
        """Return the same matrices, each drawn at its first use."""
        return Stored(self.seed, self.distribution, self.scale)

    def _matrix(self, key: Key, shape: tuple[int, ...], fan_in: int, fan_out: int, like: Tensor) -> Tensor:
        return self._draw(key, shape, self._factor(fan_in, fan_out), like)


class Shared(Feedback):
    """Keep one matrix, as large as the largest use so far, and give each block a slice of it.

    B_i is the first n_i columns, scaled for block i. Raises ValueError for the orthogonal distribution, of which a
    slice is not orthogonal.
    """

    def __init__(self, seed: int = 0, distribution: str = "he_normal", scale: float = 1.0):
        if distribution == "orthogonal":
            raise ValueError("a slice of an orthogonal matrix is not orthogonal: use Stored or Regenerated")
        super().__init__(seed, distribution, scale)

    def _matrix(self, key: Key, shape: tuple[int, ...], fan_in: int, fan_out: int, like: Tensor) -> Tensor:
        columns = shape[1] if key[0] == "block" else 1
        rows = math.prod(shape) // columns
        shared = self.matrices.get((key[0], columns))
        if shared is None or shared.shape[0] < rows or _would_lose_bits(shared, like):
            shared = self._draw((key[0], columns), (rows, columns), 1.0, like)  # it begins with the smaller one
        self.matrices[key[0], columns] = shared = shared.to(device=like.device)
        B = label("feedback", shared[:rows].view(shape) * self._factor(fan_in, fan_out))
        return label("feedback", B.to(dtype=like.dtype))


class Signal:
    """What a block is taught: e B_i, or e itself if it is the last one (`feedback` None).

    Whoever gets a signal may overwrite it: each is asked for once.
    """

    def __init__(self, i: int, e: Tensor, feedback: Feedback | None):
        self.i, self.e, self.feedback = i, e, feedback

    def slices(self, outputs: int, whole: int = 16) -> Iterator[tuple[slice, Tensor]]:
        """Yield (part, signal of these outputs, shape (N, outputs of the part)), a quarter of the outputs at a time.

        A part, but for the last, has a multiple of `whole` outputs; 16 fill a processor's vectors.
        """
        parts = cut(outputs, 4, SMALL_BYTES / (len(self.e) * self.e.element_size()), whole)
        if self.feedback is None:
            yield from ((part, self.e[:, part]) for part in parts)
            return
        e = self.e.reshape(len(self.e), -1)
        matrices = self.feedback.columns(self.i, parts, e.shape[1], outputs, like=e)
        for part, B in zip(parts, matrices, strict=True):
            yield part, e @ B

    def whole(self, out: Tensor) -> Tensor:
        """Return the signal in the shape (N, ...) and the memory layout of the block's output."""
        return self.e.view(out.shape) if self.feedback is None else self._into(torch.empty_like(out))

    def _into(self, signal: Tensor) -> Tensor:
        pixels = signal[0, 0].numel()
        for part, s in self.slices(signal[0].numel(), pixels if pixels > 1 else 16):
            channels = slice(part.start // pixels, part.stop // pixels)
            signal[:, channels] = s.view(len(s), -1, *signal.shape[2:])
            del s  # before the next one is made
        return signal

    def of(self, examples: slice) -> "Signal":
        """Return the signal of some examples."""
        return type(self)(self.i, self.e[examples], self.feedback)

    def held(self, outputs: int) -> "Signal":
        """Return the same signal for several uses; what each would form again, B_i or e B_i, is formed once."""
        if self.feedback is None:
            return self
        if self.e[0].numel() <= len(self.e):
            return type(self)(self.i, self.e, self.feedback.held())
        return type(self)(self.i, self._into(self.e.new_empty(len(self.e), outputs)), None)


def cut(size: int, parts: int, least: float, whole: int = 1) -> list[slice]:
    """Return slices of `size` in so many parts; fewer, where one would have less than `least`.

    A part, but for the last, is a multiple of `whole`.
    """
    width = math.ceil(max(size / parts, least) / whole) * whole
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


KINDS: dict[str, type[Feedback]] = {"stored": Stored, "regenerated": Regenerated, "shared": Shared}


def _would_lose_bits(kept: Tensor, like: Tensor) -> bool:
    return torch.promote_types(kept.dtype, like.dtype) != kept.dtype


@functools.cache
def _mix(seed: int, key: Key) -> int:
    """Return 32 well-mixed bits (all that torch's CPU generator uses of a seed)."""
    kind, index = key
    return int(np.random.SeedSequence([seed, ("block", "weight").index(kind), index]).generate_state(1)[0])
