"""The recipes of the book run as they stand, and what they leave is what the rule alone would."""

from __future__ import annotations

import copy
import re
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from reference import assert_identical

import memdfa_lab as ml
from memdfa_lab.core.distributions import DISTRIBUTIONS
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab.example import example_step

TEXT = (Path(__file__).parents[1] / "notebooks" / "book" / "recipes.rst").read_text()
LOOP, LIGHTNING, RANKS = map(textwrap.dedent, re.findall(r"code-block:: python\n\n((?:   .*\n|\n)+)", TEXT))


def test_a_loop_of_ones_own_trains_with_loader_and_schedulers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space = {}
    exec(LOOP, space)
    rule = space["rule"]
    assert [optimizer.param_groups[0]["lr"] for optimizer in rule.optimizers] == pytest.approx([0.05 * 0.01] * 4)
    again = ml.MemDFA(copy.deepcopy(space["net"]), space["partial"](torch.optim.SGD, lr=0.05), precision="bfloat16")
    again.load_state_dict(torch.load("rule.pt", weights_only=True))
    assert_identical(again.state_dict(), rule.state_dict())
    exec(RANKS, space)
    assert len(space["history"].table) == 3


def test_the_recipes_of_contributing_give_rules_a_distribution_and_a_network(monkeypatch):
    for table in (ALL_RULES, DISTRIBUTIONS):  # what a recipe adds is taken away again
        for name in ("even_dfa", "last_two", "signs"):
            monkeypatch.setitem(table, name, None)
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    space = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(code, space)
    assert space["history"].table["test_accuracy"].iloc[-1] > 0.5
    _, e = space["rule"].error(torch.randn(4, 10), torch.arange(4))
    assert torch.allclose(e.norm(dim=1), torch.full((4,), 0.25))
    assert space["rule"].feedback.dense(0, 10, 64, like=e).unique().tolist() == pytest.approx([-(10**-0.5), 10**-0.5])
    rule, *batch = example_step("last_two", "784-[16]x3-10", 8)
    before = [p.clone() for p in rule.blocks.parameters()]
    rule.step(*batch)
    changed = [not torch.equal(p, old) for p, old in zip(rule.blocks.parameters(), before, strict=True)]
    assert changed == [False] * 4 + [True] * 4
    for name in ("even_dfa", "last_two"):
        rule, x, y = example_step(name, "784-[16]x3-10", 8)
        predicted = ml.experiments.profile(name, "784-[16]x3-10", 8)
        assert ml.memory.measure(rule, x, y, warm_up=1).peak_bytes == predicted.peak_bytes


@pytest.mark.slow
def test_in_lightning_a_rule_trains_as_alone_and_goes_on_from_a_checkpoint(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")
    monkeypatch.chdir(tmp_path)
    loop = LOOP.replace("shuffle=True", "shuffle=False")  # the order in which two runs would draw is Lightning's own
    space = {}
    exec(loop, space)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers
        torch.manual_seed(1)
        exec(LIGHTNING, space)
        learner, trainer = space["trainer"].lightning_module, space["trainer"]
        torch.manual_seed(1)
        alone = ml.MemDFA(space["Learner"]().net, space["partial"](torch.optim.SGD, lr=0.05, momentum=0.9))
        for epoch in range(3):
            for batch, labels in space["loader"]:
                alone.step(batch, labels)
            if epoch == 1:
                assert_identical(learner.rule.state_dict(), alone.state_dict())
        how = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        later, trainer = space["Learner"](), lightning.Trainer(max_epochs=3, **how)
        trainer.fit(later, space["loader"], ckpt_path="lightning.ckpt")
    assert_identical(later.rule.state_dict(), alone.state_dict())
