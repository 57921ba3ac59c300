"""Runs from names and numbers: comparing rules, what a notebook's parameters may be."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from reference import assert_identical, refuses

import memdfa_lab as ml
from memdfa_lab import figures
from memdfa_lab.batch.report import check_parameters
from memdfa_lab.lab.experiments import compare, confusion, make_rule, summary, train
from memdfa_lab.lab.settings import RunSettings

EXPECTED = {"epochs": range(1, 11), "lr": (None, (0.0, 1.0)), "rules": [{"bp", "fa"}], "fast": bool, "dataset": str}
GOOD = {"epochs": 3, "lr": None, "rules": ["bp"], "fast": False, "dataset": "mnist"}


def test_compare_gives_each_rule_the_same_start_and_dfa_and_memdfa_the_same_end(data, tmp_path):
    table, trained = compare("fc_relu", data, ["dfa", "memdfa"], [0, 1], 1, folder=tmp_path)
    for seed in (0, 1):
        assert_identical(*(dict(trained[rule, seed].blocks.state_dict()) for rule in ("dfa", "memdfa")))
    runs = [("dfa", 0), ("dfa", 1), ("memdfa", 0), ("memdfa", 1)]
    assert list(zip(table["rule"], table["seed"], strict=True)) == runs
    assert table["loss"][0] != table["loss"][1]
    assert all((tmp_path / rule / f"seed{seed}" / "history.csv").exists() for rule, seed in runs)
    again, _ = compare("fc_relu", data, ["dfa", "memdfa"], [0, 1], 1, folder=tmp_path)
    assert again.equals(table)  # the seconds, too: nothing is trained again


def test_the_summary_is_mean_and_spread_over_seeds_of_the_last_epoch():
    rows = [("bp", 0, 1, 9.0, 0.1, 0.1, 5.0), ("bp", 0, 2, 1.0, 0.5, 0.6, 5.0), ("bp", 1, 2, 3.0, 0.7, 0.8, 7.0)]
    columns = ["rule", "seed", "epoch", "loss", "train_accuracy", "test_accuracy", "seconds"]
    row = summary(pd.DataFrame(rows, columns=columns)).iloc[0]
    assert (row["seeds"], row["train_loss"], row["seconds"]) == (2, 2.0, 8.5)
    assert row["test_accuracy"] == pytest.approx(0.7)
    assert row["test_accuracy_std"] == pytest.approx(np.std([0.6, 0.8], ddof=1))


def test_without_accuracy_the_summary_and_the_curves_have_none(data):
    rows = [{"rule": "bp", "seed": seed, "epoch": 1, "loss": 2.0 + seed, "seconds": 1.0} for seed in (0, 1)]
    table = pd.DataFrame(rows)
    assert list(summary(table)) == ["rule", "seeds", "train_loss", "seconds"]
    with refuses(ValueError, "table lacks test_accuracy"):
        figures.learning_curves(table)
    (axes,) = figures.learning_curves(table.assign(test_accuracy=np.nan)).axes  # no test example
    assert axes.get_ylabel() == "mean training loss"
    for sweep in (table.drop(columns="rule"), table.drop(columns="rule").assign(test_accuracy=np.nan)):
        assert figures.sweep_summary(sweep.assign(run=["a", "b"]), ["seed"]).axes[0].get_ylabel() == "loss"


@pytest.mark.parametrize(("name", "given"), [("drop_last", True), ("augment", ml.datasets.flip_and_crop())])
def test_a_short_batch_is_left_out_and_images_augmented_if_the_settings_say_so(name, given, data):
    found = [train("bp", "fc_relu", data, 1, 64, **{name: on})[1].rows[0]["loss"] for on in (True, False)]
    rule = make_rule("bp", "fc_relu", data)
    assert found[0] == ml.fit(rule, data, 1, 64, **{name: given}).rows[0]["loss"] != found[1]
    run = RunSettings(rule="bp", network="fc_relu")
    assert name not in run.model_dump()  # a sweep's runs keep their names
    assert run.changed(**{name: True}).model_dump()[name] is True


def test_confusion_counts_true_classes_in_rows():
    counts = confusion(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 1, 1]), 3)
    assert counts.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    bytes_ = torch.arange(30, dtype=torch.uint8)
    assert np.array_equal(confusion(bytes_, bytes_, 30), np.eye(30))
    with refuses(ValueError, "labels from 0 to 2", "float32"):
        confusion(torch.tensor([1.5]), torch.tensor([1]), 3)


def test_good_parameters_pass():
    check_parameters({**GOOD, "_hidden": 1, "In": [], "ml": ml}, **EXPECTED)
    check_parameters({**GOOD, "lr": 0.5}, **EXPECTED)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be greater than or equal to 1, got 0"),
        ({"epochs": "3"}, "epochs must be a valid integer"),
        ({"epochs": True}, "epochs must be a valid integer"),
        ({"lr": 2.0}, "lr must be less than or equal to 1, got 2.0"),
        ({"rules": []}, "rules: List should have at least 1 item"),
        ({"rules": "[bp]"}, "rules must be a valid list"),
        ({"rules": ["bp", "bpp"]}, "unknown rules 'bpp'; did you mean 'bp'?"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"fast": "false"}, "fast must be a valid boolean, got 'false'"),
        ({"dataset": 3}, "dataset must be a valid string"),
        ({"epoch": 3}, "unknown parameter 'epoch'; did you mean 'epochs'?"),
    ],
)
def test_wrong_parameters_are_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError) as problem:  # noqa: PT011  (the message is compared below)
        check_parameters({**GOOD, **wrong}, **EXPECTED)
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("measured", [False, True])
def test_a_profile_is_that_of_the_networks_own_loss(measured):
    optimizer, storage = partial(torch.optim.SGD, lr=0.1), ml.feedback.Regenerated()
    rule = ml.MemDFA(ml.models.build("fc_sigmoid"), optimizer, ml.losses.mse, storage)
    expected = ml.memory.measure(rule, torch.rand(10, 1, 28, 28), torch.zeros(10, dtype=torch.long), warm_up=1)
    profile = ml.experiments.profile("memdfa", "fc_sigmoid", 10, measured=measured)
    assert profile.peak_bytes == expected.peak_bytes


def test_a_device_is_refused_where_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(ml.experiments, "check_device", str)  # this machine may have no other device
    with pytest.raises(ValueError, match="device is for a measured step: leave it out"):
        ml.experiments.profile("memdfa", "fc_relu", 10, measured=False, device="cuda")
