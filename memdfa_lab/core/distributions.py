"""The distributions of the random matrices B: each draws numbers of unit scale, and says how B is scaled."""

import math
import time
from collections import ChainMap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _unit_he_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    # One uniform number an entry, mapped by the inverse distribution function: a larger matrix then begins with the
    # smaller one. (torch's trunc_normal_ draws values outside the interval again, after all others.) A normal cut at
    # two standard deviations has a standard deviation of 0.8796, so we divide by it.
    inside = math.erf(math.sqrt(2))  # the probability that a normal lies within two standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2) / 0.87962566103423978)


def _unit_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    inside = 1 - 2**-24  # the inverse is infinite at 1; this cuts the normal at 5.4 standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2))


def _unit_uniform(B: Tensor, generator: torch.Generator) -> Tensor:
    return B.uniform_(-1.0, 1.0, generator=generator)


def _orthogonal(B: Tensor, generator: torch.Generator) -> Tensor:
    # As torch.nn.init.orthogonal_. That draws nothing on the meta device, so that its memory could not be predicted.
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
    "orthogonal": (_orthogonal, lambda fan_in, fan_out: 1.0),  # all singular values are equal
}

# the distributions from which a learned B may start: those above, and zero
BEGINNINGS: Mapping[str, tuple[Any, Callable[[int, int], float]]] = ChainMap(
    {"zero": (lambda B, generator: B.zero_(), lambda fan_in, fan_out: 1.0)}, DISTRIBUTIONS
)


@cache
def seconds_a_number(distribution: str, error_size: int = 1000) -> float:
    """Return the seconds that drawing one entry of B takes here: the best of three matrices of a million entries."""
    draw, B, seconds = BEGINNINGS[distribution][0], torch.empty(2**20 // error_size, error_size), []
    for _ in range(3):
        started = time.perf_counter()
        draw(B, torch.Generator()).mul_(1.0)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / B.numel()
