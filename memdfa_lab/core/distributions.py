"""The distributions of the random matrices B: each draws numbers of unit scale, and says how B is scaled."""

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def _unit_he_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    # One uniform number an entry, through the inverse of the distribution function: a larger matrix then begins with
    # the smaller one. (torch's trunc_normal_ draws what falls outside again, at the end.) A normal cut at two standard
    # deviations has a standard deviation of 0.8796, so we divide by it.
    inside = math.erf(math.sqrt(2))  # how much of a normal lies within two standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2) / 0.87962566103423978)


def _unit_normal(B: Tensor, generator: torch.Generator) -> Tensor:
    inside = 1 - 2**-24  # the inverse is infinite at 1; this cuts the normal at 5.4 standard deviations
    return B.uniform_(-inside, inside, generator=generator).erfinv_().mul_(math.sqrt(2))


def _unit_uniform(B: Tensor, generator: torch.Generator) -> Tensor:
    return B.uniform_(-1.0, 1.0, generator=generator)


def _orthogonal(B: Tensor, generator: torch.Generator) -> Tensor:
    # As torch.nn.init.orthogonal_, which draws nothing on the meta device: memory could not be predicted.
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


@cache
def seconds_a_number(distribution: str, error_size: int = 1000) -> float:
    """Return how long drawing one of B's numbers takes here, measured on a matrix of a million: the best of three."""
    draw, B, seconds = DISTRIBUTIONS[distribution][0], torch.empty(2**20 // error_size, error_size), []
    for _ in range(3):
        started = time.perf_counter()
        draw(B, torch.Generator()).mul_(1.0)
        seconds.append(time.perf_counter() - started)
    return min(seconds) / B.numel()
