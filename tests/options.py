"""Options against options: a short training with each pair of them, and whether both do what they are for.

`python tests/options.py FILE` writes the table; under torchrun it finds what two ranks do with each option.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler

import memdfa_lab as ml
from memdfa_lab.lab.batchnorm import synchronise

REFUSALS = (TypeError, ValueError, RuntimeError)
RANKS = "two ranks"


@dataclass(frozen=True)
class Run:
    """A short training; what an option does is to replace some of these."""

    rule: str = "memdfa"
    feedback: str = "regenerated"
    of_rule: dict[str, Any] = field(default_factory=dict)
    of_fit: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[..., Any] = lambda weights: torch.optim.SGD(weights, lr=0.1)
    change: Callable[[nn.Module], object] = lambda net: None
    loss: Callable[[nn.Module], Callable[..., Tensor]] = lambda net: F.cross_entropy
    context: Callable[[], Any] = nullcontext
    resumed: bool = False
    offload: bool = False


class Temperature(nn.Module):
    """A cross-entropy with a temperature of its own, which learns."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.ones(()))

    def forward(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits * self.log.exp(), y)


def penalised(net: nn.Module) -> Callable[..., Tensor]:
    return lambda logits, y: F.cross_entropy(logits, y) + 0.05 * sum(p.abs().sum() for p in net.parameters())


@dataclass(frozen=True)
class Option:
    """What an option changes in a run; if its results are those of another run, what that has in its place."""

    group: str
    changes: dict[str, Any]
    same_as: dict[str, Any] | None = None


def of_rule(**options: Any) -> dict[str, Any]:
    return {"of_rule": options}


def of_fit(**options: Any) -> dict[str, Any]:
    return {"of_fit": options}


OPTIONS: dict[str, Option] = {
    "BP": Option("rule", {"rule": "bp"}),
    "FA": Option("rule", {"rule": "fa"}),
    "DFA": Option("rule", {"rule": "dfa"}),
    "MEM-DFA": Option("rule", {"rule": "memdfa"}, {"rule": "dfa"}),
    "BP, checkpointing": Option("rule", {"rule": "checkpoint"}, {"rule": "bp"}),
    "BP, 2 segments": Option("rule", {"rule": "checkpoint", **of_rule(segments=2)}, {"rule": "bp"}),
    "BP, step in backward": Option("rule", {"rule": "step_in_backward"}, {"rule": "bp"}),
    "BP, both": Option("rule", {"rule": "checkpoint_step_in_backward"}, {"rule": "bp"}),
    "BP, binomial": Option("rule", {"rule": "binomial"}, {"rule": "bp"}),
    "BP, 1 snapshot": Option("rule", {"rule": "binomial", **of_rule(snapshots=1)}, {"rule": "bp"}),
    "BP, reversible": Option("rule", {"rule": "reversible"}, {"rule": "bp"}),
    "BP, activations on disk": Option("rule", {"rule": "activation_offload"}, {"rule": "bp"}),
    "MeZO": Option("rule", {"rule": "mezo"}),
    "last layer": Option("rule", {"rule": "last_layer"}),
    "local readouts": Option("rule", {"rule": "local_readout"}),
    "DRTP": Option("rule", {"rule": "drtp"}),
    "stored B": Option("feedback", {"feedback": "stored"}, {}),
    "shared B": Option("feedback", {"feedback": "shared"}),
    "learned B": Option("feedback", {"feedback": "learned"}),
    "keep_bytes": Option("keep", of_rule(keep_bytes=1500), {}),
    "pack": Option("pack", of_rule(pack="int8")),
    "offload": Option("offload", {"offload": True}, {}),
    "clip_norm": Option("clip", of_rule(clip_norm=0.05)),
    "clip_global_norm": Option("clip", of_rule(clip_global_norm=0.05)),
    "bfloat16": Option("precision", of_rule(precision="bfloat16")),
    "float16": Option("precision", of_rule(precision="float16")),
    "pass 1 in int8": Option("pass1", of_rule(pass1="int8")),
    "AdamW": Option("optimizer", {"optimizer": partial(torch.optim.AdamW, lr=0.01)}),
    "scheduler": Option("scheduler", of_fit(scheduler=partial(lr_scheduler.StepLR, step_size=1))),
    "plateau": Option(
        "scheduler", of_fit(scheduler=partial(lr_scheduler.ReduceLROnPlateau, threshold=10.0, patience=0))
    ),
    "a step a batch": Option(
        "scheduler", of_fit(scheduler=partial(lr_scheduler.StepLR, step_size=3), scheduler_each="batch")
    ),
    "augment": Option("augment", of_fit(augment=lambda x: x + 0.2 * torch.randn_like(x))),
    "stop_after": Option(  # by a loss that stays as it is, so that the first epoch is the best
        "stop", of_fit(stop_after=1, metrics={"loss": lambda logits, y: torch.ones(())})
    ),
    "drop_last": Option("drop", of_fit(drop_last=True)),
    "resumed": Option("resumed", {"resumed": True}, {}),
    "autocast": Option("precision", {"context": lambda: torch.autocast("cpu", torch.bfloat16)}),
    "frozen block": Option("change", {"change": lambda net: net[3].requires_grad_(False)}),
    "penalty": Option("loss", {"loss": penalised}),
    "loss that learns": Option("loss", {"loss": lambda net: Temperature()}),
}


def changed(run: Run, changes: dict[str, Any]) -> Run:
    """Return the run with changes; options of rule and fit join those that are there."""
    joins = {name: {**getattr(run, name), **value} for name, value in changes.items() if name.startswith("of_")}
    return replace(run, **{**changes, **joins})


def stand_in(alone: Run, same_as: dict[str, Any]) -> Run:
    """Return the run whose results are expected: without the options that only the rule in question has."""
    of_all = {
        name: value for name, value in alone.of_rule.items() if name not in ("keep_bytes", "segments", "snapshots")
    }
    return replace(alone, **same_as, of_rule=of_all, offload=False) if same_as else alone


def train(run: Run, group: Any = None) -> Tensor:
    """Train for three epochs and return all weights and buffers in one vector."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)
    )
    run.change(net)
    if group is not None:
        synchronise(net, group)
    x = torch.randn(44, 8)
    y = (x[:, :5] + 0.3 * torch.randn(44, 5)).argmax(1)
    data = ml.datasets.Data("made", x[:34], y[:34], x[34:], y[34:], torch.zeros(1, 1, 1), 1.0, 5)
    kinds = {"stored": ml.feedback.Stored, "regenerated": ml.feedback.Regenerated, "shared": ml.feedback.Shared}
    kinds["learned"] = partial(ml.feedback.Learned, lr=0.01)
    kind = {**ml.RULES, **ml.BASELINES, **ml.LOCAL_RULES}[run.rule]

    def made(folder: Path) -> ml.Rule:
        model, more = copy.deepcopy(net), {}
        if run.offload:
            more = {"offload": ml.offload.Disk(folder)}
            model = more["offload"].build(partial(nn.Sequential, *model))
        rule = kind(model, run.optimizer, run.loss(model), kinds[run.feedback](seed=1), **run.of_rule, **more)
        if group is not None:
            rule.group = group
        return rule

    with run.context(), tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        rule = made(folder)
        if run.resumed:
            file = (folder if group is None else Path(os.environ["SHARED_FOLDER"])) / "run.pt"
            how = {**run.of_fit, "checkpoint": folder if run.offload else file, "progress": False}
            ml.fit(rule, data, 2, 8, overwrite=not run.offload, **how)
            if run.offload:
                rule.store.close()
            rule = made(folder)
            ml.fit(rule, data, 3, 8, **how)
        else:
            ml.fit(rule, data, 3, 8, progress=False, **run.of_fit)
        found = rule.store.state_dict() if run.offload else rule.blocks.state_dict()
        return torch.cat([tensor.detach().double().flatten() for tensor in found.values()])


@cache
def train_alone(name: str, *same_as: tuple[str, Any]) -> Tensor:
    """Train with one option, or as the run whose results are expected of it; each is trained once."""
    return train(stand_in(changed(Run(), OPTIONS[name].changes), dict(same_as)))


def far(one: Tensor, other: Tensor) -> float:
    """Return how far two vectors are from each other, as a part of their length."""
    return ((one - other).norm() / other.norm()).item()


def outcome(one: str, other: str) -> str:
    """Return "works", which of the two has no effect on the other's results, or what refuses the pair."""
    without = Run()
    for name in (one, other):
        without = changed(without, OPTIONS[name].changes)
    try:
        found = train(without)
    except REFUSALS as problem:
        return "refused: " + re.sub(rf"{re.escape(tempfile.gettempdir())}\S*?(?=[:,])", "FOLDER", str(problem))
    idle = []
    for name, beside in ((one, other), (other, one)):
        option = OPTIONS[name]
        exact_e = (name, beside) == ("keep_bytes", "pass 1 in int8")  # of the blocks that are kept
        if option.same_as is not None and not exact_e:
            expected = train_alone(beside, *option.same_as.items())
            assert far(found, expected) < 1e-6, f"{name} with {beside} has other results"
        elif option.group != "rule" and far(found, train_alone(beside)) < 1e-6:
            idle.append(name)
    return f"no effect: {' and '.join(idle)}" if idle else "works"


def with_ranks(name: str, group: Any) -> str:
    """Return the same for an option on two ranks."""
    run = changed(Run(), OPTIONS[name].changes)
    try:
        found = train(run, group)
    except REFUSALS as problem:
        return f"refused: {problem}"
    expected = train(run)
    assert far(found, expected) < (0.05 if name in ("autocast", "bfloat16", "pack") else 1e-4), (
        f"{name} on two ranks has other results"
    )
    return "works"


def pairs() -> list[tuple[str, str]]:
    """Return all pairs of options of different groups."""
    return [(one, other) for one, other in combinations(OPTIONS, 2) if OPTIONS[one].group != OPTIONS[other].group]


def on_two_ranks() -> dict[str, str]:
    """Return what two ranks do with each option."""
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SHARED_FOLDER": folder}
        command = [sys.executable, "-m", *torchrun, __file__, f"{folder}/found.json"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((Path(folder) / "found.json").read_text())


def table() -> pd.DataFrame:
    """Return a row a pair: one, other, outcome."""
    rows = [(one, other, outcome(one, other)) for one, other in pairs()]
    rows += [(name, RANKS, found) for name, found in on_two_ranks().items()]
    return pd.DataFrame(rows, columns=["one", "other", "outcome"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        with ml.distributed.ranks() as ranks:
            results = {name: with_ranks(name, ranks) for name in OPTIONS}
            if ranks.rank == 0:
                Path(sys.argv[1]).write_text(json.dumps(results))
    else:
        table().to_csv(sys.argv[1], index=False)
