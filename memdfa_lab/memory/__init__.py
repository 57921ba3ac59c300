"""Memory of a training step: measured per tensor, predicted before running, as a formula, and seen by the allocator."""

import importlib
from typing import Any

from memdfa_lab.memory.crosscheck import accelerator_peak, allocator_peak, compare
from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.predict import predict
from memdfa_lab.memory.sizing import deepest, largest_batch
from memdfa_lab.memory.trace import CATEGORIES, Trace, bytes_of, readable

__all__ = [
    "CATEGORIES",
    "Ledger",
    "Trace",
    "accelerator_peak",
    "allocator_peak",
    "bytes_of",
    "compare",
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
