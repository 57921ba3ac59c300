"""Train networks with BP, FA, DFA and MEM-DFA, and measure or predict their memory: `import memdfa_lab as ml`."""

import importlib
from typing import Any

from memdfa_lab import memory
from memdfa_lab.core import feedback, precision
from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.checks import of_an_extra
from memdfa_lab.core.local_losses import DRTP, LOCAL_RULES, LocalReadout
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import BP, DFA, FA, RULES, MemDFA
from memdfa_lab.lab import alignment, blocks, datasets, distributed, experiments, losses, models, tasks
from memdfa_lab.lab.check import check
from memdfa_lab.lab.constraints import projected, standardised
from memdfa_lab.lab.evaluation import accuracy, predict
from memdfa_lab.lab.fit import fit
from memdfa_lab.lab.history import History
from memdfa_lab.rivals import BASELINES
from memdfa_lab.rivals.activation_offload import ActivationOffload
from memdfa_lab.rivals.binomial import Binomial
from memdfa_lab.rivals.mezo import MeZO
from memdfa_lab.rivals.reversible import Reversible

__version__ = "0.1.0"
__all__ = [
    "BASELINES",
    "BP",
    "DFA",
    "DRTP",
    "FA",
    "LOCAL_RULES",
    "RULES",
    "ActivationOffload",
    "Binomial",
    "History",
    "LocalReadout",
    "MeZO",
    "MemDFA",
    "Reversible",
    "Rule",
    "accuracy",
    "alignment",
    "as_blocks",
    "blocks",
    "check",
    "datasets",
    "distributed",
    "experiments",
    "feedback",
    "fit",
    "losses",
    "memory",
    "models",
    "precision",
    "predict",
    "projected",
    "standardised",
    "tasks",
]
# name -> module, imported at first use: plotting, notebooks and widgets take a while to import
LATER = {
    "bench": "memdfa_lab.lab.bench",
    "figures": "memdfa_lab.figures",
    "paper": "memdfa_lab.batch.paper",
    "machines": "memdfa_lab.lab.machines",
    "neighbours": "memdfa_lab.neighbours",
    "offload": "memdfa_lab.lab.offload",
    "report": "memdfa_lab.batch.report",
    "sweep": "memdfa_lab.batch.sweep",
    "widgets": "memdfa_lab.widgets",
}


def load_ipython_extension(shell: Any) -> None:
    """Register the magics %%memory and %%exercise, for `%load_ext memdfa_lab`."""
    with of_an_extra():
        from memdfa_lab.widgets.magic import ExerciseMagic, MemoryMagic

    shell.register_magics(MemoryMagic, ExerciseMagic)


def __getattr__(name: str) -> Any:
    if name in LATER:
        with of_an_extra():
            return importlib.import_module(LATER[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})
