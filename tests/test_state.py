"""What a rule saves and loads: all that training needs to go on, a copy of it, and only that of an equal rule."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from problems import BY_NAME, RULE_NAMES, Problem, make_rule, train
from reference import assert_identical, assert_same_training, refuses_and_keeps
from torch import nn

MLP = BY_NAME["mlp_relu"]


def chain(*widths: int, frozen: str = "none") -> Problem:
    """Return a chain of dense layers; the parameters whose names begin with `frozen` do not learn."""

    def make() -> nn.Sequential:
        net = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        return net

    return Problem("chain", make, (8,))


def apart(parameters):
    return torch.optim.AdamW([{"params": [p]} for p in parameters], lr=0.01)


OURS = chain(8, 12, 10, 5)
OTHERS = {
    "another_rule": (lambda: make_rule("dfa", OURS, "adamw"), "rule DFA", "rule MemDFA"),
    "another_feedback": (lambda: make_rule("memdfa", OURS, "adamw", "regenerated"), "Regenerated", "Stored"),
    "another_width": (lambda: make_rule("memdfa", chain(8, 13, 10, 5), "adamw"), "(13, 8)", "(12, 8)"),
    "another_depth": (lambda: make_rule("memdfa", chain(8, 12, 5), "adamw"), "1.weight of shape (5, 12)", "(10, 12)"),
    "a_frozen_block": (lambda: make_rule("memdfa", chain(8, 12, 10, 5, frozen="1"), "adamw"), "no optimizer (frozen)"),
    "a_frozen_bias": (lambda: make_rule("memdfa", chain(8, 12, 10, 5, frozen="1.bias"), "adamw"), "AdamW of 1 tensors"),
    "another_optimizer": (lambda: make_rule("memdfa", OURS, "momentum"), "SGD of 2", "AdamW of 2"),
    "other_groups": (lambda: make_rule("memdfa", OURS, apart), "AdamW of 1 + 1 tensors", "AdamW of 2 tensors"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_rule_or_network_is_refused_and_changes_nothing(other):
    make, *hints = OTHERS[other]
    theirs, ours = make(), make_rule("memdfa", OURS, "adamw")
    theirs.feedback.seed = 11
    for rule in (theirs, ours):
        rule.step(OURS.x, OURS.y)
    with refuses_and_keeps(ours, ValueError, "another rule or network", *hints):
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    "saved", [MLP.build().state_dict(), {}, None, "rule.pt"], ids=["model", "empty", "none", "path"]
)
def test_what_is_no_state_of_a_rule_is_refused_and_changes_nothing(saved):
    ours = make_rule("memdfa", MLP)
    with refuses_and_keeps(ours, ValueError, "not the state_dict of a rule"):
        ours.load_state_dict(saved)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_loaded_rule_goes_on_as_the_first_and_shares_nothing_with_it(rule):
    problem = BY_NAME["batchnorm"]
    first, second = (make_rule(rule, problem, "adamw") for _ in range(2))
    train(first, problem)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict())
    after = train(first, problem)
    assert_identical(second.state_dict(), before)
    assert_same_training(train(second, problem), after)


def test_what_a_module_adds_to_its_state_comes_along():
    class Counting(nn.Linear):
        count = 0

        def get_extra_state(self) -> int:
            return self.count

        def set_extra_state(self, state: int) -> None:
            self.count = state

    one, other = (make_rule("bp", Problem("counting", lambda: nn.Sequential(Counting(8, 5)), (8,))) for _ in range(2))
    one.blocks[0].count = 7
    other.load_state_dict(one.state_dict())
    assert other.blocks[0].count == 7
