"""Memory of a training step: measured per tensor, predicted before running, as a formula, as the allocator saw it."""

import importlib
from typing import Any

from memdfa_lab.memory.crosscheck import allocator_peak, compare, cuda_peak, cuda_snapshot
from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.predict import predict
from memdfa_lab.memory.sizing import deepest, largest_batch
from memdfa_lab.memory.trace import CATEGORIES, Trace, bytes_of, readable

__all__ = [
    "CATEGORIES",
    "Ledger",
    "Trace",
    "allocator_peak",
    "bytes_of",
    "compare",
    "cuda_peak",
    "cuda_snapshot",
    "deepest",
    "formula",
    "largest_batch",
    "measure",
    "predict",
    "readable",
]


def __getattr__(name: str) -> Any:
    if name == "formula":  # sympy takes a while to import
        return importlib.import_module("memdfa_lab.memory.formula")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
