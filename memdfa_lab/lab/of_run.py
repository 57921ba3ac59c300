"""What a run's settings make of a rule: its feedback, its options, and whether it takes them together."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import nn

from memdfa_lab.core import feedback
from memdfa_lab.core.devices import CPU
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.rules import find_rule


def feedback_of(run: Any) -> Feedback:
    """Return the feedback of a run (`RunSettings`); without a distribution, it has that of the kind."""
    kind = partial(feedback.Learned, lr=run.feedback_lr) if run.feedback_lr else feedback.KINDS[run.feedback]
    return kind(run.seed, scale=run.scale, **({"distribution": run.distribution} if run.distribution else {}))


def options_of(run: Any) -> dict[str, Any]:
    """Return the run's options for its rule, other than network, optimizer, loss and feedback."""
    names = {name: name for name in ("clip_norm", "clip_global_norm", "precision", "pass1", "pack")}
    names |= {"positions": "readout_positions", "similarity": "readout_similarity"}
    names |= {"seed": "seed"} if run.rule in ("local_readout", "mezo") else {}
    return {to: getattr(run, name) for to, name in names.items() if getattr(run, name) is not None}


def check_together(run: Any) -> None:
    """Make the run's rule with a network of one weight. Raises ValueError as the rule does for its own network.

    The precision is left out for another device than the CPU, which may not be there.
    """
    options = options_of(run)
    if run.device != CPU:
        options.pop("precision", None)
    network = [nn.utils.skip_init(nn.Linear, 1, 1)]  # draws no random number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the rule itself gives
        find_rule(run.rule)(network, partial(torch.optim.SGD, lr=0.1), feedback=feedback_of(run), **options)
