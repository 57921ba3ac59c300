"""The same seeds give the same bytes in every process: matrices, training, and training that goes on from a file."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import BY_NAME, RULE_NAMES, STORAGES, make_rule, threads, train
from reference import assert_identical

from memdfa_lab.core.feedback import DISTRIBUTIONS

RESUMED = [("everything", rule, storage, "adamw") for rule, storage in product(RULE_NAMES, STORAGES)]
RESUMED += [("partly_frozen", rule, "stored", "momentum") for rule in RULE_NAMES]


def matrices() -> dict[str, Any]:
    """Return some matrices of each kind and distribution."""
    found = {}
    for kind, distribution in product(STORAGES, DISTRIBUTIONS):
        if (kind, distribution) != ("shared", "orthogonal"):
            feedback = STORAGES[kind](5, distribution)
            drawn = [feedback.dense(i, 10, n, torch.zeros(())) for i, n in enumerate((37, 20, 500))]
            drawn += [feedback.weight(j, torch.zeros(shape)) for j, shape in enumerate([(7, 9), (6, 2, 3, 3)])]
            found[f"{kind} {distribution}"] = drawn
    return found


def trained() -> dict[str, Any]:
    """Return the states of rules that have trained."""
    found = {}
    for name, rule in product(("conv_pool", "everything"), RULE_NAMES):
        learner = make_rule(rule, BY_NAME[name], "momentum")
        train(learner, BY_NAME[name])
        found[f"{name} {rule}"] = learner.state_dict()
    return found


def resumed(states: dict[str, Any]) -> dict[str, Any]:
    """Return what training leaves behind that goes on from these states; the rules are built with other settings."""
    found = {}
    for name, rule, storage, optimizer in RESUMED:
        feedback = STORAGES[storage](seed=17, distribution="uniform", scale=2.0)
        learner = make_rule(rule, BY_NAME[name], optimizer, feedback)
        learner.load_state_dict(states[f"{name} {rule} {storage}"])
        found[f"{name} {rule} {storage}"] = vars(train(learner, BY_NAME[name], steps=3))
    return found


def all_cases(states: dict[str, Any]) -> dict[str, Any]:
    """Return what this process draws, and what it trains with one thread and with two."""
    with threads(1):
        found = {"matrices": matrices(), "one thread": trained(), "resumed": resumed(states)}
    with threads(2):
        return {**found, "two threads": trained()}


def in_another_process(folder: Path) -> None:
    torch.manual_seed(99)
    torch.save(all_cases(torch.load(folder / "states.pt", weights_only=True)), folder / "found.pt")


@pytest.mark.slow
def test_another_process_draws_trains_and_goes_on_to_the_same_bytes(tmp_path):
    states = {}
    for name, rule, storage, optimizer in RESUMED:
        feedback = STORAGES[storage](seed=np.int64(5), distribution="he_normal", scale=0.5)
        learner = make_rule(rule, BY_NAME[name], optimizer, feedback)
        train(learner, BY_NAME[name], steps=2)
        states[f"{name} {rule} {storage}"] = learner.state_dict()
    torch.save(states, tmp_path / "states.pt")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import sys, pathlib, test_same_bytes as t; t.in_another_process(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=env, timeout=300)
    there = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_identical(there, all_cases(states))
