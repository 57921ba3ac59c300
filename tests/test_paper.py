"""The comparison: what is run, cut, chosen and kept, and what the tables say."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.batch import paper
from memdfa_lab.batch.notebooks import notebooks_folder
from memdfa_lab.batch.paper.plan import Experiment
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.lab import experiments

ONE = Experiment(
    name="small",
    network="784-[50]x2-10",
    dataset="mnist5k",
    seeds={"memdfa": [0, 1], "bp": [0], "dfa": [0]},
    epochs=2,
    epoch_s=30,
    why="a test",
    batch_size=50,
    schedule="cosine",
    settings={"optimizer": "adam", "distribution": "uniform"},
    search={"lr": [1e-9, 0.003], "scale": [1.0]},
    search_epochs=1,
)
COSINE = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=2)
NUMBERS = ["epoch", "loss", "train_accuracy", "test_accuracy"]


@pytest.fixture(scope="module")
def data():
    return ml.datasets.load("mnist5k").subset(train=600, test=200)


@pytest.fixture
def small(monkeypatch, data):
    """A plan of one experiment, on a few images."""
    monkeypatch.setattr(paper.plan, "experiments", lambda: (ONE,))
    monkeypatch.setattr(experiments, "load_for", lambda *_: data)


def refuse(*_, **__):
    raise AssertionError("this was done before")


# The plan


def test_the_plan_can_be_read_and_all_it_names_is_known():
    listed = paper.plan.experiments()
    assert len({one.name for one in listed}) == len(listed) > 10
    for one in listed:
        assert one.dataset in ml.datasets.names()
        assert one.why
        assert bool(one.search) == (one.search_epochs > 0)
        assert set(one.goal) <= set(one.seeds) <= set(ALL_RULES)
        assert all(seeds == sorted(set(seeds)) for seeds in one.seeds.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "mnist_con"}, "did you mean 'mnist_conv'?"),
        ({"seeds": {"memdf": [0]}}, "did you mean 'memdfa'?"),
        ({"settings": {"optimiser": "adam"}}, "did you mean 'optimizer'?"),
        ({"settings": {"loss": "mse_"}}, "did you mean 'mse'?"),
        ({"search": {"lr": [0.1, "fast"]}}, "lr must be a valid number"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
        ({"epoch": 3}, "did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs must be greater than or equal to 1"),
        ({"search_images": 100}, "search_images needs images for mnist5k"),
    ],
)
def test_a_wrong_experiment_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as problem:
        ONE.changed(**changes)
    assert "\n" not in str(problem.value)


def test_the_search_is_the_same_for_each_rule_but_for_what_bp_does_not_have():
    both = {"lr": [1.0, 2.0], "distribution": ["uniform", "normal"]}
    one = ONE.changed(search=both)
    assert (
        one.tried("memdfa")
        == one.tried("fa")
        == [{"lr": a, "distribution": b} for a in (1, 2) for b in both["distribution"]]
    )
    assert one.tried("bp") == [{"lr": 1.0}, {"lr": 2.0}]
    # 4 for memdfa, whose choice is dfa's, and 2 for bp; each an epoch; then 4 runs of 2
    assert one.seconds == 30 * (6 * 1 + 4 * 2)
    assert one.runs == [("memdfa", 0), ("bp", 0), ("dfa", 0), ("memdfa", 1)]


@pytest.mark.parametrize(
    ("text", "expected"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("0.5h", 1800), ("75s", 75), ("90min", 5400)]
)
def test_a_budget_is_read(text, expected, monkeypatch):
    budgets = []
    monkeypatch.setattr(paper.runs, "run", lambda out, only, budget_s, say: budgets.append(budget_s))
    monkeypatch.setattr(paper.memory, "measure", lambda out: None)
    assert cli.main(["reproduce", "--paper", "--budget", text]) == 0
    assert budgets == [expected]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "soon"], "a time is given as 2h, 90m or 1h30m, got 'soon'"),
        *[(["--budget", text], "a time is given as 2h, 90m or 1h30m") for text in ("", "h", "2x", "m30")],
        (["--budget=-1h"], "a time is given as 2h, 90m or 1h30m"),
        *[(["--budget", text], "must be a minute or more, got ") for text in ("5s", "59s")],
        (["--only", "mnist_2x80"], "did you mean 'mnist_2x800'?"),
        (["-p", "epochs", "3"], "do not go with --paper"),
        (["--overwrite"], "do not go with --paper"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, tmp_path, arguments, said):
    try:
        status = cli.main(["reproduce", "--paper", "--out", str(tmp_path), *arguments])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert not any(tmp_path.iterdir())


# A budget


def test_within_keeps_the_budget_shortens_leaves_out_and_says_so():
    plain = ONE.changed(search={}, search_epochs=0, seeds={"memdfa": [0]}, epoch_s=10)
    wanted = [plain.changed(name=name, epochs=epochs) for name, epochs in (("a", 10), ("b", 20), ("c", 40), ("d", 1))]
    assert [one.seconds for one in wanted] == [100, 200, 400, 10]
    assert paper.plan.within(wanted, 710) == (wanted, [])
    chosen, said = paper.plan.within(wanted, 250)
    assert [(one.name, one.epochs) for one in chosen] == [("a", 10), ("b", 15)]
    assert said == ["shortened: b, 15 epochs of 20", "left out: c (about 7 min)", "left out: d (about 0 min)"]
    chosen, said = paper.plan.within(wanted, 140)  # of b's 20 epochs 4 would fit: less than a quarter
    assert [(one.name, one.epochs) for one in chosen] == [("a", 10), ("d", 1)]
    assert [line.split(" (")[0] for line in said] == ["left out: b", "left out: c"]


@pytest.mark.parametrize("budget_s", [60, 200, 333, 419, 420, 1000])
def test_within_never_takes_longer_than_the_budget_search_included(budget_s):
    wanted = [ONE, ONE.changed(name="other", epochs=9)]
    chosen, said = paper.plan.within(wanted, budget_s)
    assert sum(one.seconds for one in chosen) <= budget_s
    assert len(chosen) + sum(line.startswith("left out") for line in said) == 2


def test_when_the_time_is_up_no_other_run_is_begun(small, monkeypatch, tmp_path):
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(paper.runs.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(paper.runs, "fit", lambda made, data, epochs, *_, **o: FIT(made, data, epochs, 50, **o))
    said = []
    paper.runs.run(tmp_path, budget_s=450, say=said.append)
    assert "the time is up in small, before" in said[-1]
    assert 1 <= paper.runs.read(tmp_path, "histories").groupby(["rule", "seed"]).ngroups < 4


FIT = paper.runs.fit


# The choice


def test_choose_takes_the_best_on_held_out_images_and_never_sees_the_test_set(data, tmp_path):
    blind = replace(data, x_test=None, y_test=None)
    assert paper.runs.choose(ONE, "memdfa", blind, tmp_path, say=lambda _: None) == {"lr": 0.003, "scale": 1.0}
    found = paper.runs.read(tmp_path, "choices").set_index("settings")["held_out_accuracy"]
    assert len(found) == 2
    made = experiments.make_rule("memdfa", ONE.network, data, lr=0.003, scale=1.0, **ONE.settings)
    held_out = data.holdout(1 / 6)
    ml.fit(made, held_out, 1, 50)
    best = json.dumps({**ONE.settings, "lr": 0.003, "scale": 1.0, "batch_size": 50, "schedule": "cosine"})
    assert found[best] == ml.accuracy(made, held_out.x_test, held_out.y_test)
    assert found[best] == found.max() > found.min()


def test_a_choice_is_recorded_and_not_repeated_and_dfas_is_memdfas(data, monkeypatch, tmp_path):
    first = paper.runs.choose(ONE, "memdfa", data, tmp_path, say=lambda _: None)
    monkeypatch.setattr(paper.runs, "fit", refuse)
    assert paper.runs.choose(ONE, "memdfa", data, tmp_path) == first
    assert paper.runs.choose(ONE, "dfa", data, tmp_path) == first
    paper.runs.collect(tmp_path)
    shutil.rmtree(tmp_path / "runs")  # as in a fresh clone
    assert paper.runs.choose(ONE, "memdfa", data, tmp_path) == first
    with pytest.raises(AssertionError, match="done before"):  # other epochs, another search
        paper.runs.choose(ONE.changed(search_epochs=2), "memdfa", data, tmp_path)
    with pytest.raises(AssertionError, match="done before"):  # trials on fewer images
        paper.runs.choose(ONE.changed(images=600, search_images=100), "memdfa", data, tmp_path)


def test_augment_and_drop_last_are_used_wherever_the_plan_has_them(data, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(paper.runs, "fit", lambda *_, **how: seen.append(how) or FIT(*_, **how))
    one = ONE.changed(settings={**ONE.settings, "drop_last": True}, search={"augment": [False, True]})
    paper.runs.choose(one, "bp", data, tmp_path, say=lambda _: None)
    assert [(how["augment"] is None, how["drop_last"]) for how in seen] == [(True, True), (False, True)]


def test_a_rule_that_runs_away_is_the_worst_choice(data, monkeypatch, tmp_path):
    def fit(made, *_, **__):
        if made.optimizers[0].defaults["lr"] == 0.003:
            raise FloatingPointError("the error is not finite")
        return FIT(made, data, 1, 50)

    monkeypatch.setattr(paper.runs, "fit", fit)
    assert paper.runs.choose(ONE, "fa", data, tmp_path, say=lambda _: None)["lr"] == 1e-9


# Runs


def test_a_run_trains_as_set_and_what_is_finished_is_skipped(small, data, monkeypatch, tmp_path):
    said = []
    assert paper.runs.run(tmp_path, say=said.append) == [ONE]
    table = paper.runs.read(tmp_path, "histories")
    assert set(zip(table["rule"], table["seed"], strict=True)) == {("memdfa", 0), ("memdfa", 1), ("bp", 0), ("dfa", 0)}
    assert not list(tmp_path.rglob("*.pt"))
    assert any("memdfa, seed 1: test error" in line for line in said)

    made = experiments.make_rule("memdfa", ONE.network, data, seed=1, lr=0.003, scale=1.0, **ONE.settings)
    alone = ml.fit(made, data, 2, 50, seed=1, scheduler=COSINE).table
    ours = table.query("rule == 'memdfa' and seed == 1")[NUMBERS].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, alone[NUMBERS], check_exact=True, check_dtype=False)

    written = (tmp_path / "histories.csv").read_bytes()
    monkeypatch.setattr(paper.runs, "fit", refuse)
    again = paper.runs.train(ONE, "bp", 0, {"lr": 0.003}, data, tmp_path)  # as of a plan that a budget has shortened
    assert list(again["loss"]) == list(table.query("rule == 'bp'")["loss"])
    assert paper.runs.run(tmp_path, say=said.append) == []
    shutil.rmtree(tmp_path / "runs")
    assert paper.runs.run(tmp_path, say=said.append) == []
    assert "1 of 1 experiments" in said[-1]
    assert (tmp_path / "histories.csv").read_bytes() == written
    paper.runs.collect(tmp_path)
    assert (tmp_path / "histories.csv").read_bytes() == written


@pytest.mark.parametrize(
    "changes", [{"batch_size": 60}, {"schedule": "constant"}, {"images": 500}, {"settings": {"optimizer": "sgd"}}]
)
def test_a_run_with_other_settings_is_not_done(changes, small, data, monkeypatch, tmp_path):
    quick = ONE.changed(seeds={"memdfa": [0]}, search={}, search_epochs=0, epochs=1)
    paper.runs.train(quick, "memdfa", 0, {}, data, tmp_path)
    paper.runs.collect(tmp_path)
    other = quick.changed(**changes)
    assert paper.plan.unfinished([quick], paper.runs.read(tmp_path, "histories")) == []
    assert paper.plan.unfinished([other], paper.runs.read(tmp_path, "histories")) == [other]
    paper.runs.train(other, "memdfa", 0, {}, data.subset(train=other.images), tmp_path)
    table = paper.runs.read(tmp_path, "histories")
    assert paper.plan.unfinished([quick, other], table) == []  # nothing that was finished is lost
    for one in (quick, other):
        monkeypatch.setattr(paper.plan, "experiments", lambda one=one: (one,))
        (kept,) = paper.plan.current(table)["settings"]
        assert kept == one.described({})


def test_a_run_that_states_the_networks_own_settings_is_the_same_run():
    own = ONE.changed(settings={}, search={}, search_epochs=0, batch_size=None, schedule="constant")
    spelt = own.changed(settings={"optimizer": ml.models.get(ONE.network).optimizer})
    assert spelt.has("memdfa", own.described({}))
    assert not spelt.has("memdfa", own.changed(batch_size=7).described({}))


def test_images_cut_the_training_images_and_are_said_in_the_settings_and_the_table(data, monkeypatch, tmp_path):
    few = ONE.changed(search={}, search_epochs=0, seeds={"memdfa": [0]}, images=200)
    monkeypatch.setattr(paper.plan, "experiments", lambda: (few,))
    monkeypatch.setattr(experiments, "load_for", lambda *_: data)
    seen = []
    monkeypatch.setattr(paper.runs, "fit", lambda made, cut, *a, **o: seen.append(cut) or FIT(made, cut, *a, **o))
    paper.runs.run(tmp_path, say=lambda _: None)
    assert torch.equal(seen[0].x_train, data.x_train[:200])
    assert torch.equal(seen[0].x_test, data.x_test)
    table = paper.runs.read(tmp_path, "histories")
    assert json.loads(table["settings"][0])["images"] == 200
    assert "images" not in json.loads(ONE.described({}))
    assert paper.tables.beside_published(table).query("network == @few.network")["source"].item() == (
        "here, small, 200 training images"
    )


def test_a_killed_run_goes_on_and_comes_to_the_same(data, monkeypatch, tmp_path):
    whole = paper.runs.train(ONE, "memdfa", 0, {"lr": 0.003}, data, tmp_path / "whole")

    def killed(made, data, epochs, *arguments, **options):
        FIT(made, data, 1, *arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(paper.runs, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        paper.runs.train(ONE, "memdfa", 0, {"lr": 0.003}, data, tmp_path / "cut")
    assert len(paper.runs.read(tmp_path / "cut", "histories")) == 0

    starts = []

    def seen(made, data, *arguments, **options):
        starts.append(options["checkpoint"].exists())
        return FIT(made, data, *arguments, **options)

    monkeypatch.setattr(paper.runs, "fit", seen)
    rest = paper.runs.train(ONE, "memdfa", 0, {"lr": 0.003}, data, tmp_path / "cut")
    assert starts == [True]
    pd.testing.assert_frame_equal(rest.drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True)


def test_a_run_without_a_result_does_not_stop_the_others(small, monkeypatch, tmp_path):
    def fit(made, *arguments, **options):
        if isinstance(made, ml.BP):
            raise FloatingPointError("the error is not finite")
        return FIT(made, *arguments, **options)

    monkeypatch.setattr(paper.runs, "fit", fit)
    said = []
    paper.runs.run(tmp_path, say=said.append)
    assert any(line.startswith("  bp, seed 0: no result") for line in said)
    assert set(paper.runs.read(tmp_path, "histories")["rule"]) == {"memdfa", "dfa"}


def test_new_runs_join_the_table_that_is_there_digit_for_digit(data, monkeypatch, tmp_path):
    other = ONE.changed(name="other")
    monkeypatch.setattr(paper.plan, "experiments", lambda: (other, ONE))
    shutil.copy(ml_reports() / "histories.csv", tmp_path)
    before = (tmp_path / "histories.csv").read_text().splitlines()
    paper.runs.train(ONE, "bp", 0, {}, data, tmp_path)
    paper.runs.train(other, "bp", 0, {}, data, tmp_path)
    paper.runs.collect(tmp_path)
    after = (tmp_path / "histories.csv").read_text().splitlines()
    new = [line for line in after[1:] if line.startswith(("small,", "other,"))]
    assert [line.split(",")[0] for line in new] == ["other", "other", "small", "small"]
    assert sorted(after) == sorted([*before, *new])  # in which order: that of the plan


def test_angles_are_taken_after_each_epoch_but_for_bp(data, tmp_path):
    one = ONE.changed(angles=True)
    for rule in ("memdfa", "bp"):
        paper.runs.train(one, rule, 0, {"lr": 0.003}, data, tmp_path)
    table = paper.runs.read(tmp_path, "histories")
    found = table.set_index(["rule", "epoch"]).filter(like="angle_").dropna()
    assert list(found.index) == [("memdfa", 1), ("memdfa", 2)]
    made = experiments.make_rule("memdfa", ONE.network, data, lr=0.003, **ONE.settings)
    ml.fit(made, data, 2, 50, scheduler=COSINE)
    expected = ml.alignment.angles(made, data.x_train[:500], data.y_train[:500])
    assert list(found.loc["memdfa", 2]) == expected


# The memory tables


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ml.models, "names", lambda: ["fc_relu", "lenet_mnist"])
        patch.setattr(paper.memory, "PROFILED", {"mnist_conv": 3})
        patch.setattr(paper.memory, "DEPTHS", (2, 4))
        patch.setattr(paper.memory, "MEASURED_AT", (4,))
        out = tmp_path_factory.mktemp("measured")
        paper.memory.measure(out)
    return paper.tables.load(out)


def test_memory_is_predicted_measured_and_derived(measured):
    depth = measured["depth"]
    at_4 = depth.query("depth == 4 and rule in ['bp', 'fa', 'dfa', 'memdfa']")
    assert (at_4["measured_bytes"] == at_4["peak_bytes"]).all()
    assert depth["measured_bytes"].notna().sum() == len(at_4) == 12
    derived = depth.dropna(subset="formula_bytes")
    assert (derived["formula_bytes"] == derived["peak_bytes"]).all()
    assert set(derived["network"]) == {"long_fc2"}
    assert len(derived) == 8
    long_conv = ml.models.sizes("long_conv")["parameters"].sum()
    chain = ml.models.from_layers(paper.memory.CHAINS["long_conv"].format(depth=30), (1, 28, 28), 10)
    assert sum(p.numel() for p in chain.parameters()) == long_conv


def test_peaks_are_made_of_categories_and_profiles_reach_them(measured):
    peaks = measured["peaks"]
    assert len(peaks) == 2 * len(paper.memory.COMPARED)
    parts = peaks.drop(columns=["network", "batch_size", "rule", "peak_bytes", "resting_bytes"])
    assert (parts.sum(axis=1) == peaks["peak_bytes"]).all()
    timeline = ml.memory.predict(
        "bp", ml.models.build("mnist_conv"), (3, 1, 28, 28), feedback=ml.feedback.Regenerated()
    ).timeline
    assert list(measured["profiles"].query("rule == 'bp'")["phase"]) == list(timeline["phase"])
    assert "" in set(timeline["phase"])
    for rule, steps in measured["profiles"].groupby("rule"):
        assert (steps["bytes"].cumsum() == steps["total_bytes"]).all()
        assert steps["total_bytes"].max() == experiments.profile(str(rule), "mnist_conv", 3).peak_bytes


# What the tables say


def ml_reports():
    return notebooks_folder().parent / "reports" / "paper"


def table_of(*runs):
    """Make a table of runs (experiment, rule, seed, epochs, last accuracy), an epoch a row, as `ml.paper` writes it."""
    columns = ["experiment", "network", "dataset", "rule", "seed", "epochs", "settings", *NUMBERS, "seconds"]
    rows = []
    for name, rule, seed, epochs, accuracy in runs:
        about = name, name, "mnist", rule, seed, epochs, ONE.described(ONE.tried(rule)[0])
        rows += [(*about, epoch, 1 / epoch, accuracy, accuracy, 1.0) for epoch in range(1, epochs + 1)]
    return pd.DataFrame(rows, columns=columns)


def test_errors_are_of_the_longest_runs_that_ended():
    table = table_of(("a", "bp", 0, 3, 0.9), ("a", "bp", 1, 3, 0.8), ("a", "bp", 2, 2, 0.1), ("a", "fa", 0, 2, 0.7))
    table = table[~table.eval("rule == 'fa' and epoch == 2")]
    (row,) = paper.tables.errors(table).to_dict("records")
    assert (row["rule"], row["seeds"], row["epochs"]) == ("bp", 2, 3)
    assert row["error"] == pytest.approx(15)
    assert row["spread"] == pytest.approx(50**0.5)


def test_what_is_missing_is_computed_from_the_plan(small):
    nothing = paper.tables.missing(table_of())
    assert nothing[["memdfa", "bp", "fa", "dfa"]].values.tolist() == [["0, 1", "0", "", "0"]]
    some = table_of(("small", "memdfa", 0, 2, 0.9), ("small", "bp", 0, 1, 0.9), ("small", "dfa", 0, 2, 0.9))
    assert paper.tables.missing(some)[["memdfa", "bp", "dfa"]].values.tolist() == [["1", "0", ""]]  # bp: too short
    every = table_of(*[("small", rule, seed, 2, 0.9) for rule, seed in ONE.runs])
    assert len(paper.tables.missing(every)) == 0


def test_goals_are_met_or_not_or_not_run(monkeypatch):
    monkeypatch.setattr(
        paper.plan, "experiments", lambda: (ONE.changed(goal={"memdfa": 10.0, "bp": 10.0, "dfa": 10.0}),)
    )
    table = table_of(("small", "memdfa", 0, 2, 0.95), ("small", "bp", 0, 2, 0.85))
    assert list(paper.tables.goals(table)["met"]) == ["yes", "no", "not run yet"]
    just = torch.tensor(0.9).item()  # an accuracy, in float32
    assert paper.tables.goals(table_of(("small", "memdfa", 0, 2, just)))["met"][0] == "yes"


def verdicts(tables):
    return [row["verdict"] for row in paper.tables.claims(tables).to_dict("records")]


def test_a_claim_is_only_shown_by_tables_that_show_it(measured):
    bench = pd.DataFrame({"network": "n", "rule": ["dfa", "memdfa"], "setting": None, "ratio": [1.0, 1.5]})
    assert paper.tables.extra_time(bench) == {"n": 1.5}
    assert verdicts(measured) == ["shown, with limits", "not shown", "not shown", "shown"]
    assert verdicts({**measured, "bench": bench})[1] == "shown, with limits"
    four = table_of(*[("a", rule, 0, 1, 0.9) for rule in ml.RULES])
    result = "with limits: MEM-DFA's test error is above BP's in 0 of 1 experiments"
    assert verdicts({**measured, "histories": four})[2] == result
    assert verdicts({**measured, "bench": bench.assign(ratio=[1.0, 1.6])})[1] == "not shown"  # theory: 1.5
    grows, differs = measured["depth"].copy(), measured["depth"].copy()
    grows.loc[grows.eval("rule == 'memdfa' and depth == 4"), "peak_bytes"] += 4
    differs["measured_bytes"] += 1
    assert verdicts({**measured, "depth": grows})[0] == "not shown"
    assert verdicts({**measured, "depth": differs})[3] == "not shown"
    assert verdicts({**measured, "depth": differs.assign(measured_bytes=None)})[3] == "not shown"  # none of none


def test_published_numbers_stand_beside_ours():
    table = paper.tables.beside_published(table_of(("a", "memdfa", 0, 2, 0.9), ("a", "memdfa", 1, 2, 0.8)))
    assert table.loc[0, ["memdfa", "source", "epochs"]].tolist() == ["15.00 ± 7.07 (2)", "here, a", "2"]
    published = paper.tables.published()
    assert len(table) == len(published) + 1
    assert published["source"].notna().all()
    assert published["link"].str.startswith("https://").all()
    assert table.query("network == 'LeNet, Adam'")[["bp", "fa", "dfa"]].values.tolist() == [["15.92", "40.67", "37.59"]]


def test_the_committed_tables_are_found_from_anywhere_and_agree_with_the_reports(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for runs in ("reports/paper", "../reports/paper", str(ml_reports())):
        tables = paper.tables.load(runs)
        assert set(tables["peaks"]["network"]) == set(ml.models.names())
    ours = paper.tables.errors(tables["histories"]).query("experiment == 'mnist_fc_relu'").set_index("rule")
    summary = pd.read_csv(ml_reports().parent / "mnist_fc_relu" / "summary.csv", index_col="rule")
    pd.testing.assert_series_equal(100 - ours["error"], 100 * summary["test_accuracy"], check_names=False)
    text = (ml_reports().parent / "index.md").read_text(encoding="utf-8")
    missing = paper.tables.missing(tables["histories"])  # with the settings of the plan
    assert all(f"| {name} |" in text for name in missing.get("experiment", []))
    with pytest.raises(ValueError, match=r"no tables of the comparison in 'no/where': make them with"):
        paper.tables.load("no/where")
