"""The table of a run's settings: values are checked by name, the network's own come in place of None."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from reference import refuses

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import experiments
from memdfa_lab.lab.settings import RunSettings

OTHERS = {
    "rule": "dfa", "network": "fc_sigmoid", "dataset": "own.npz", "root": "folder", "epochs": 2, "batch_size": 50,
    "drop_last": True, "augment": True, "lr": 0.5, "optimizer": "adam", "weight_decay": 0.1, "loss": "bce",
    "feedback": "shared",
    "distribution": "normal", "initialisation": "zero", "scale": 2.0, "clip_norm": 3.0, "seed": 4, "device": "cpu",
    "precision": "bfloat16", "pass1": "int8", "standardise": True,
}  # fmt: skip
LEARNED = {"clip_global_norm": 2.0, "feedback_lr": 0.01}
PACKED = {"pack": "int8"}
READOUTS = {"rule": "local_readout", "readout_positions": 2, "readout_similarity": 0.5}
GIVEN = [OTHERS, LEARNED, PACKED, READOUTS]  # together, all settings; not all of them go together


WRONG = {
    "epochs": [0, 1.5, True, "3"], "batch_size": [np.int64(0), [1]], "lr": [math.nan, math.inf, -0.5, "fast"],
    "weight_decay": [-0.1], "scale": [0, math.inf], "clip_norm": [0], "seed": [-1, 2**64],
    "readout_positions": [0], "readout_similarity": [-0.1, 1.5],
    "device": [3], "root": [3], "rule": [None], "network": [3],
}  # fmt: skip
MISSPELT = {
    "rule": ("memdf", "memdfa"), "network": ("fc_rely", "fc_relu"), "optimizer": ("adm", "adam"),
    "loss": ("mae", "mse"), "feedback": ("store", "stored"), "distribution": ("he_norml", "he_normal"),
    "initialisation": ("zeros", "zero"),
    "precision": ("bfloat", "bfloat16"), "pass1": ("int9", "int8"), "feedback_kind": ("share", "shared"),
    "pack": ("int9", "int8"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_in_one_line_with_its_name(name, value):
    for give in (RunSettings, RunSettings().changed):
        with refuses(ValueError, name, str(value)):
            give(**{name: value})


@pytest.mark.parametrize("name", MISSPELT)
def test_a_name_that_is_not_in_its_table_is_refused_with_the_nearest(name):
    given, nearest = MISSPELT[name]
    with refuses(ValueError, repr(given), f"did you mean {nearest!r}?"):
        RunSettings(**{name: given})


def test_a_b_that_is_zero_must_learn():
    assert RunSettings(distribution="zero", feedback_lr=0.1).completed().distribution == "zero"
    with refuses(ValueError, "zero", "feedback_lr"):
        RunSettings(distribution="zero")


@pytest.mark.parametrize("name", ["readout_positions", "readout_similarity"])
def test_what_a_readout_is_like_is_for_local_readout_alone(name):
    with refuses(ValueError, name, "local_readout", "not for memdfa"):
        RunSettings(**{name: 1})


@pytest.mark.parametrize("kind", ["shared", "regenerated"])
def test_a_b_that_learns_is_stored(kind):
    assert RunSettings(feedback="stored", feedback_lr=0.1).feedback == "stored"
    with refuses(ValueError, f"a B that learns is stored, not {kind}", "leave feedback out"):
        RunSettings(feedback=kind, feedback_lr=0.1)


TOGETHER = {
    "feedback_lr": 0.01, "feedback": "shared", "distribution": "orthogonal", "clip_norm": 0.1, "clip_global_norm": 0.1,
    "precision": "bfloat16", "pass1": "bfloat16", "pack": "int8", "standardise": True, "readout_positions": 2,
}  # fmt: skip


@pytest.mark.parametrize("rule", ALL_RULES)
def test_what_a_rule_refuses_its_settings_refuse_with_the_same_line(rule, data):
    lines = set()
    for names in combinations(TOGETHER, 2):
        given = {name: TOGETHER[name] for name in names}
        try:
            RunSettings(rule=rule, **given)
        except ValueError as problem:
            lines.add(str(problem))
        else:
            experiments.make_rule(rule, "784-[8]x2-10", data, **given)
    assert "a slice of an orthogonal matrix is not orthogonal: use Stored or Regenerated" in lines


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"pack": "int8", "feedback_lr": 0.1}, "leave feedback that learns out"),
        ({"rule": "dfa", "clip_global_norm": 1.0, "feedback_lr": 0.1}, "take MemDFA, or clip_norm"),
        ({"rule": "local_readout", "pass1": "int8"}, "goes through the blocks once: leave pass1 out"),
        ({"rule": "drtp", "clip_global_norm": 1.0}, "goes through the blocks once: leave clip_global_norm out"),
        ({"clip_norm": 1.0, "clip_global_norm": 1.0}, "give one of them"),
        ({"precision": "float16"}, "float16 is for a GPU"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_as_the_rule_does(given, why):
    with refuses(ValueError, why):
        RunSettings(**given)


def test_the_precision_of_another_device_is_left_to_the_rule_on_it_and_nothing_is_drawn():
    torch.manual_seed(0)
    assert RunSettings(precision="float16", device="cuda").precision == "float16"
    for rule in ALL_RULES:
        RunSettings(rule=rule)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))


def test_an_unknown_setting_is_refused_with_the_nearest():
    with refuses(ValueError, "unknown setting 'epoch'", "did you mean 'epochs'?"):
        RunSettings(epoch=3)


def test_the_smallest_values_are_taken():
    least = {"epochs": 1, "batch_size": 1, "lr": 0.0, "weight_decay": 0.0, "seed": 0}
    assert dict(RunSettings(**least)).items() >= least.items()


def test_numbers_of_numpy_are_numbers():
    run = RunSettings(epochs=np.int64(3), lr=np.float32(0.5), scale=2)
    assert run == RunSettings(epochs=3, lr=0.5, scale=2.0)
    assert (type(run.epochs), type(run.lr), type(run.scale)) == (int, float, float)


def test_feedback_has_another_name_in_notebooks_and_not_two_at_once():
    assert RunSettings(feedback_kind="shared") == RunSettings(feedback="shared")
    with refuses(ValueError, "feedback_kind"):
        RunSettings(feedback_kind="shared", feedback="stored")


def test_what_is_none_becomes_the_networks_own_setting_and_baselines_have_those_of_bp():
    own = {"optimizer": "adam", "weight_decay": 1e-4, "loss": "cross_entropy", "distribution": "uniform"}
    own |= {"epochs": 250, "batch_size": 128, "initialisation": "xavier_uniform"}
    for rule in (*ml.RULES, *ml.BASELINES):
        as_bp = rule == "bp" or rule in ml.BASELINES
        given = RunSettings(rule=rule, network="lenet")
        assert given.completed() == given.changed(lr=1e-3 if as_bp else 1e-4, **own)
        starts = RunSettings(rule=rule, network="nokland_2x800").completed().initialisation
        assert starts == ("uniform" if as_bp else "zero")
    assert RunSettings(**OTHERS).completed() == RunSettings(**OTHERS)


def test_every_setting_is_an_option_of_train(monkeypatch, capsys, data):
    """With each value given and with none, the run is the one that the table describes."""
    runs = []

    def train(data, folder, overwrite, group, sync_batchnorm, **settings):
        runs.append((RunSettings(**settings), loaded.pop()))
        raise KeyboardInterrupt

    loaded = []
    monkeypatch.setattr(experiments, "train", train)
    monkeypatch.setattr(experiments, "load_for", lambda *arguments: loaded.append(arguments) or data)
    for given in (*GIVEN, {}):
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items())
        options = [text for name, value in pairs for text in ([name] if value is True else [name, str(value)])]
        assert cli.main(["train", *options]) == 130
    every = [pair for given in GIVEN for pair in given.items()]
    assert {name for name, _ in every} == RunSettings.model_fields.keys()
    assert not any(getattr(RunSettings(), name) == value for name, value in every if name != "device")
    expected = [RunSettings(**given) for given in (*GIVEN, {})]
    assert runs == [(run, (run.network, run.dataset, run.root)) for run in expected]
