"""Memory of a training step: measured per tensor, predicted before running, as a formula, as the system saw it."""

from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.predict import predict
from memdfa_lab.memory.trace import CATEGORIES, Trace, readable

__all__ = ["CATEGORIES", "Ledger", "Trace", "measure", "predict", "readable"]
