"""Offloaded training: the numbers of training in memory, bit for bit, and a folder that is never half a network."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from problems import OPTIMIZERS, STORAGES, Problem, Record, make_rule, params, record, rotated
from reference import assert_same_training

from memdfa_lab.core.store import TEACH
from memdfa_lab.core.watcher import has_data
from memdfa_lab.lab.offload import Disk


def train(rule: Any, problem: Problem, steps: int = 4) -> Record:
    """Train as problems.train does, and bring in all blocks for the record."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = [rule.step(x, y) for x, y in problem.batches(steps)]
        assert not rule.store.offloads or not any(has_data(p) for p in rule.blocks.parameters())
        with ExitStack() as all_in:
            for i in range(len(rule.chain)):
                all_in.enter_context(rule.store.block(i, TEACH))
            return record(losses, rule.blocks, rule.optimizers)


@rotated("problem optimizer storage ahead", params(), OPTIMIZERS, STORAGES, (1, 0, 2))
def test_offloaded_training_is_that_in_memory_bit_for_bit(problem, optimizer, storage, ahead, tmp_path):
    rule = make_rule("memdfa", problem, optimizer, storage, offload=Disk(tmp_path, ahead=ahead))
    assert_same_training(train(rule, problem), train(make_rule("memdfa", problem, optimizer, storage), problem))
