"""What fits a budget, what B costs, and models of the user's own by name."""

from __future__ import annotations

import itertools
import pickle
import sys
import warnings
from functools import partial

import pandas as pd
import pytest
import torch
from reference import held_by_formula, refuses
from torch import nn
from torch.cuda import _memory_viz

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.distributions import seconds_a_number
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.memory import sizing

BOTH = "train --network fc_relu --model nets_of_mine:small --input 3x2x2"
ADAM = partial(torch.optim.Adam, lr=0.1)
NETS = {
    "mlp": (lambda: ml.models.mlp(20, [30] * 5, 4), (20,), ml.feedback.Stored()),
    "convnet": (
        lambda: ml.models.convnet((3, 8, 8), [4, 6], 10, batch_norm=True),
        (3, 8, 8),
        ml.feedback.Regenerated(),
    ),
}


@pytest.mark.parametrize(("rule", "name"), [(rule, list(NETS)[i % 2]) for i, rule in enumerate(ALL_RULES)])
def test_the_largest_batch_fits_and_one_more_does_not(rule, name, monkeypatch):
    make, shape, B = NETS[name]
    held = {n: ml.memory.predict(rule, make(), (n, *shape), ADAM, B).held_bytes for n in (2, 40, 41)}
    asked = []
    monkeypatch.setattr(sizing, "predict", lambda *args, **how: asked.append(args) or ml.memory.predict(*args, **how))
    for budget, batch in ((held[41] - 1, 40), (held[40], 40), (held[2], 2)):
        asked.clear()
        found = ml.memory.largest_batch(rule, make, shape, f"{budget} B", optimizer=ADAM, feedback=B)
        assert found == batch
        assert len(asked) < 16
    with refuses(ValueError, "not even one example fits into 640 B: it takes"):
        ml.memory.largest_batch(rule, make(), shape, 640, ADAM, B)


def test_y_may_have_a_shape_and_an_example_none():
    how = {"loss_fn": nn.functional.mse_loss, "y_shape": (10,)}
    net, budget = ml.models.mlp(20, [30], 10), 20_000
    found = ml.memory.largest_batch("memdfa", net, (20,), budget, **how)
    for n, fits in ((found, True), (found + 1, False)):
        trace = ml.memory.predict("memdfa", net, (n, 20), loss_fn=nn.functional.mse_loss, y_shape=(n, 10))
        assert (trace.held_bytes <= budget) == fits
    with refuses(ValueError, "the budget must be a size"):
        ml.memory.largest_batch("memdfa", net, (20,), "much")


@pytest.mark.slow
def test_the_deepest_is_the_closed_forms():
    for rule in ml.RULES:
        found = ml.memory.deepest(rule, lambda depth: ml.models.mlp(20, [30] * depth, 4), (64, 20), 300_000)
        held = partial(held_by_formula, rule, batch=64, width=30, inputs=20, classes=4)
        assert held(found) <= 300_000 < held(found + 1)
    with refuses(ValueError, "not even a network of depth 1 fits"):
        ml.memory.deepest("bp", lambda depth: ml.models.mlp(20, [30] * depth, 4), (64, 20), "1 KB")


def test_the_bytes_of_b_are_those_that_are_kept():
    make, shape, _ = NETS["mlp"]
    for rule, numbers in (("bp", 0), ("fa", 30 * 30 * 4 + 30 * 4), ("dfa", 4 * 30 * 5), ("memdfa", 4 * 30 * 5)):
        assert sizing.feedback_bytes(rule, make, shape, ml.feedback.Regenerated()) == 4 * numbers
    assert 0 < seconds_a_number("he_normal") < 1e-5


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_bytes_of_a_b_that_learns_are_those_of_b_alone(optimizer):
    feedback = ml.feedback.Learned(lr=0.1, optimizer=optimizer)
    make, shape, _ = NETS["mlp"]
    ml.MemDFA(make(), ADAM, feedback=feedback).step(torch.randn(6, 20), torch.arange(6) % 4)
    before = [tensor.clone() for tensor in feedback.tensors()]
    stored, learned = (
        ml.experiments.sizes("memdfa", "fc_relu", "1 GiB", feedback_kind=kind)
        for kind in ("stored", ml.feedback.Learned(lr=0.1, optimizer=optimizer))
    )
    assert learned["B"] == stored["B"] > 0
    assert learned["s to draw B"] == stored["s to draw B"]
    assert sizing.feedback_bytes("memdfa", make, shape, feedback) == 4 * 4 * 30 * 5
    assert feedback.learns
    assert all(map(torch.equal, before, feedback.tensors()))  # one that has learned stays as it is


@pytest.fixture
def own(tmp_path, monkeypatch):
    text = "from torch.nn import *\ndef small():\n    return Sequential(Flatten(), Linear(12, 7), Linear(7, 3))\n"
    text += "def images():\n    return Sequential(Conv2d(3, 2, 2), ReLU(), Conv2d(2, 3, 3), Flatten())\n"
    (tmp_path / "nets_of_mine.py").write_text(text + "def wide(n):\n    return n\nclass Net(dict): pass\n")
    (tmp_path / "broken_nets.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.mark.parametrize("grid", [[], ["--grid", "1"]])
def test_a_model_of_ones_own_is_profiled_by_name(own, capsys, grid):
    call = ["profile", "--model", "nets_of_mine:images", "--input", "3x4x4", "--batch", "16", "--rules", "all", *grid]
    assert cli.main(call) == 0
    measured = capsys.readouterr().out
    assert cli.main([*call, "--budget", "64KiB", "--table", "table.csv"]) == 0
    predicted, _, sizes = capsys.readouterr().out.partition("\n\n")
    assert predicted.splitlines()[1:] == measured.splitlines()[1:]
    table = pd.read_csv("table.csv", index_col="rule")
    assert {line.split()[0] for line in sizes.splitlines()[3:]} == set(table.index) == ALL_RULES.keys()
    feedback = ml.feedback.Regenerated(grid=1 if grid else None)
    for rule in ("bp", "memdfa"):
        build = partial(ml.models.build, "nets_of_mine:images")
        found = ml.memory.largest_batch(rule, build, (3, 4, 4), "64 KiB", feedback=feedback)
        assert table.loc[rule, "largest batch"] == found
    assert dict(table["B"][["bp", "memdfa"]]) == {"bp": 0, "memdfa": 4 * 3 * 2 * (1 if grid else 9)}


def test_a_seed_makes_the_same_model_of_ones_own(own):
    one, other = (ml.models.build("nets_of_mine:small", seed=seed)[0][1].weight for seed in (1, 1))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "nets_of_mine:smal_l": "did you mean 'small'?",
        "nets_of_mine:wide": "missing a required argument: 'n'",
        "broken_nets:small": "ZeroDivisionError",
        "no_nets:small": "cannot import no_nets",
        "nets_of_mine:small@3y2": "is named MODULE:FUNCTION",
        "nets_of_mine:Net": "Net",
    }.items(),
)
def test_what_is_no_model_is_refused_in_a_line(own, name, said):
    with refuses((TypeError, ValueError), said):
        ml.models.build(name)


def test_the_shape_of_its_input_must_be_known(own, capsys):
    with refuses(ValueError, "the shape of nets_of_mine:small's input is not known"):
        ml.experiments.profile("bp", "nets_of_mine:small", 4)
    for call, said in {"profile --input 3x2x2": "--input goes with --model", BOTH: "leave one of them out"}.items():
        assert cli.main(call.split()) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("rule", ["bp", "memdfa"])
def test_torchs_memory_viewer_opens_a_step(tmp_path, rule, measured):
    trace = ml.experiments.profile(rule, "784-[32]x5-10", 16, "adam", measured=measured)
    trace.to_memory_viz(tmp_path / "step.pickle")
    data = pickle.loads((tmp_path / "step.pickle").read_bytes())
    for name in ("trace_plot", "segment_plot", "segsum", "trace"):
        assert len(getattr(_memory_viz, name)(data)) > 100
    stacks = [[frame["name"] for frame in entry["frames"]] for entry in data["device_traces"][0]]
    assert ["aten::addmm", "forward"] in stacks
    alive = {block["address"]: block["size"] for block in data["segments"][0]["blocks"] if block["requested_size"]}
    assert sum(alive.values()) == trace.resting_bytes + trace.end_bytes
    held, most = sum(alive.values()), 0
    for entry in reversed(data["device_traces"][0]):  # back from the end
        if entry["action"] == "alloc":
            assert alive.pop(entry["addr"]) == entry["size"]
        elif entry["action"] == "free_completed":
            alive[entry["addr"]] = entry["size"]
            places = sorted(alive.items())
            assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(places))
        most = max(most, sum(alive.values()))
    assert (most, sum(alive.values()), held) == (trace.held_bytes, trace.resting_bytes, trace.resting_bytes)


def test_a_function_that_draws_again_while_values_are_out_of_range_is_predicted():
    """nn.init.trunc_normal_ asks `while mask.any()`, of numbers that are not there."""

    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
        nn.init.trunc_normal_(net[0].weight)
        return net

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no operation that makes a model is warned of
        predicted = ml.memory.predict("memdfa", make, (6, 20))
    assert predicted.peak_bytes == ml.memory.predict("memdfa", make(), (6, 20)).peak_bytes
