"""The step player: its moments are the ledger's, its pictures show them, and its controls change them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
import pytest
import torch

import memdfa_lab as ml
from memdfa_lab.memory.trace import readable
from memdfa_lab.widgets import step

RULES = [*ml.RULES, *ml.BASELINES]


def measured(rule, layers, optimizer):
    kind = {**ml.RULES, **ml.BASELINES}[rule]
    net = ml.models.mlp(784, [200] * layers, 10)
    made = kind(net, ml.experiments.OPTIMIZERS[optimizer], feedback=ml.feedback.Stored())
    return ml.memory.measure(made, torch.randn(512, 784), torch.zeros(512, dtype=torch.long), warm_up=1)


@pytest.mark.parametrize("rule", RULES)
def test_the_film_is_a_real_step(rule):
    """Moment by moment, what is shown is what a step that is run holds, but for single numbers."""
    for optimizer in ("sgd", "adam"):
        found, trace = step.film(rule, 3, optimizer=optimizer), measured(rule, 3, optimizer)
        events = [event for event in trace.events if event.storage.size_bytes > step.SCALAR_BYTES]
        moments = [(event.operation, event.phase, event.change_bytes > 0) for event in events]
        held = np.cumsum([event.change_bytes for event in events])
        ends = [at for at, (one, after) in enumerate(pairwise([*moments, None])) if one != after]
        totals = [0, *held[ends]]
        assert [moment.total_bytes for moment in found] == totals
        assert totals[-1] == 0
        assert 0 <= trace.peak_bytes - max(totals) < 100  # the single numbers


def test_a_tensor_stands_with_the_block_that_made_it():
    most = {"dfa": 6, "memdfa": 2}
    for rule, blocks in most.items():
        alive = [{block for block, kind in moment.held if kind == "activations"} for moment in step.film(rule, 5)]
        assert max(map(len, alive)) == blocks
    backward = [moment for moment in step.film("bp", 5) if moment.phase == "backward"]
    assert [moment.block for moment in backward] == sorted((moment.block for moment in backward), reverse=True)
    assert {block for moment in backward for block, kind in moment.held if kind == "gradients"} == set(range(6))


def bars(picture):
    """Return {(rule, column): {category: bytes}} of a picture, by what is written in it."""
    root = ElementTree.fromstring(f"<all>{picture.replace('<br>', '<br/>')}</all>")
    found = {}
    for row in root[0]:
        rule = row.find("div/b").text
        for column, frame in enumerate(row.findall("div/div/div/div")):
            held = [re.fullmatch(r"(.+): ([\d,]+) bytes", bar.get("title")) for bar in frame if bar.get("title")]
            if held:
                found[rule, column] = {one[1]: int(one[2].replace(",", "")) for one in held}
    return found


@pytest.mark.parametrize("at", [0, 3, 17, 30, 10_000])
def test_the_picture_shows_the_moment(at):
    films = {rule: step.film(rule, 4) for rule in ml.RULES}
    svg = step.picture(films, at, 5)
    expected = {}
    for rule, moments in films.items():
        label = ml.figures.label(rule)
        moment = moments[min(at, len(moments) - 1)]
        for (block, category), held in moment.held.items():
            expected.setdefault((label, 5 if block is None else block), {})[category] = held
        assert f"held {readable(moment.total_bytes)}" in svg
        assert f"peak {readable(max(one.total_bytes for one in moments))}" in svg
    assert bars(svg) == expected
    assert "role='img' aria-label='BP: " in svg
    colours = set(re.findall(r"background:(#\w+)", svg))
    assert colours <= {color for color, _ in ml.figures.FILLS.values()}
    assert not re.search(r"[\s;']color:", svg)  # text has the theme's own


def test_it_opens_at_the_first_rules_peak():
    for rules in (tuple(ml.RULES), ("memdfa",)):
        player = ml.widgets.step_player(rules=rules)
        moments = step.film(rules[0], 5)
        assert moments[player.time.value].total_bytes == max(moment.total_bytes for moment in moments) > 0
        assert player.play.value == player.time.value  # a browser sets the slider to it
        assert player.picture.value == step.picture(player.films, player.time.value, 6)
    with pytest.raises(ValueError, match="needs equal layers"):
        ml.widgets.step_player(family="model")


def test_each_control_changes_the_picture():
    player = ml.widgets.step_player()
    player.time.value = 20
    player.next_part()
    changes = {"depth": 3, "width": 100, "batch": 16, "optimizer": "adam", "feedback": "shared", "family": "convnet"}
    assert player.controls.keys() == changes.keys()
    for name, value in changes.items():
        before = player.picture.value
        player.controls[name].value = value
        player.next_part()
        assert player.picture.value != before, name
        assert not player.message.value
    films = {rule: step.film(rule, **changes) for rule in ml.RULES}
    assert player.films == films
    assert player.picture.value == step.picture(films, 20, 4)
    assert player.time.max == player.play.max == max(map(len, films.values())) - 1
    player.time.value = player.time.max
    player.next_part()
    assert player.picture.value.count("done") == 8  # in words, and in the text for who cannot see it
    for tick in player.ticks.values():
        tick.value = False
    player.next_part()
    assert "no rule is chosen" in player.message.value
    player.ticks["checkpoint"].value = True
    player.next_part()
    assert "BP, checkpointing" in player.picture.value
    assert not player.message.value


def test_a_shorter_film_ends_where_it_ends():
    player = ml.widgets.step_player()
    player.time.value = player.time.max
    player.next_part()
    player.controls["depth"].value = 1
    player.next_part()
    assert not player.message.value
    assert player.time.value == player.time.max
    assert player.picture.value == step.picture(player.films, player.time.max, 2)
