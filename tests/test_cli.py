"""The command line: results, --help with examples, one line and status 2 for wrong arguments."""

import os
import re

import pandas as pd
import pytest

from memdfa_lab import cli
from memdfa_lab.lab import experiments

QUICK = ["--epochs", "1", "--batch-size", "200"]


def run(capsys, *arguments):
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_train_writes_a_history_a_rule_and_prints_a_table(capsys, tmp_path):
    rules = ["dfa", "memdfa", "checkpoint", "bp"]  # baselines are rules, too
    status, out, _ = run(capsys, "train", "--rule", *rules, *QUICK, "--out", tmp_path / "a b")
    assert status == 0
    tables = {rule: pd.read_csv(tmp_path / "a b" / rule / "history.csv").drop(columns="seconds") for rule in rules}
    pd.testing.assert_frame_equal(tables["dfa"], tables["memdfa"])
    pd.testing.assert_frame_equal(tables["checkpoint"], tables["bp"])
    for line, (rule, table) in zip(out.splitlines()[1:5], tables.items(), strict=True):
        assert line.split()[:2] == [rule, "1"]
        assert f"{table['test_accuracy'].item():.4f}" in line


def test_train_goes_on_with_the_run_in_the_folder(capsys, tmp_path):
    run(capsys, "train", *QUICK, "--out", tmp_path)
    first = pd.read_csv(tmp_path / "memdfa" / "history.csv")
    status, _, _ = run(capsys, "train", "--epochs", 2, "--batch-size", 200, "--out", tmp_path)
    assert status == 0
    second = pd.read_csv(tmp_path / "memdfa" / "history.csv")
    assert list(second["epoch"]) == [1, 2]
    pd.testing.assert_frame_equal(first, second.head(1))


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="unknown network"):
        run(capsys, "train", "--network", "nonsense", "--debug")


@pytest.mark.parametrize(("error", "shown"), [(TypeError("a fault"), True), (OSError("full " * 999), False)])
def test_a_fault_in_the_program_keeps_its_traceback_and_an_error_of_the_system_does_not(
    error, shown, capsys, monkeypatch
):
    """An hour into training, a TypeError is not a wrong argument."""

    def fault(*args, **kwargs):
        raise error

    monkeypatch.setattr("memdfa_lab.lab.experiments.train", fault)
    status, _, err = run(capsys, "train")
    assert status == 1
    assert ("Traceback" in err, "in fault" in err) == (shown, shown)
    assert err.splitlines()[-1].startswith(f"memdfa: {str(error)[:900]}")
    assert len(err) < 1100 or shown


@pytest.mark.parametrize("command", ["train", "reproduce", "profile", "bench", "sweep"])
def test_help_has_examples(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"  memdfa {command}" in out.split("examples:")[1]


@pytest.mark.parametrize("command", ["train", "reproduce", "profile", "bench", "sweep", "explore"])
def test_each_option_says_what_it_does_and_has_one_default(capsys, command):
    _, out, _ = run(capsys, command, "--help")
    options = out.split("options:")[1].split("examples:")[0]
    for option in re.split(r"\n  (?=-)", options)[1:]:
        words = re.sub(r"^-.*?(\s{2,}|\n\s+)", "", option, count=1)
        assert words[0].isalpha(), option
        assert not words.startswith("default"), option
        assert words.count("default: ") <= 1, option


def test_ctrl_c_ends_with_130_and_one_line(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("memdfa_lab.lab.experiments.train", interrupted)
    status, _, err = run(capsys, "train")
    assert status == 130
    assert err.count("\n") == 1


def test_profile_has_a_b_that_learns_where_a_rule_can_teach_it(capsys, tmp_path):
    file = tmp_path / "table.csv"
    call = ["profile", "--network", "784-[64]x3-10", "--batch", "16", "--budget", "8MiB", "--table", str(file)]
    B = 4 * 10 * 64 * 3
    rest = {}
    for kind in ("stored", "learned"):
        assert cli.main([*call, "--feedback", kind]) == 0
        table = pd.read_csv(file, index_col="rule")
        assert table.loc["memdfa", "B"] == B
        rest[kind] = table["at rest"]
    state = 2 * B + 4 * 3  # Adam's
    assert (rest["learned"] - rest["stored"]).to_dict() == {"bp": 0, "fa": 0, "dfa": state, "memdfa": state}
    assert cli.main([*call, "--feedback", "learned", "--grid", "2"]) == 2
    assert "leave grid out" in capsys.readouterr().err


def test_profile_predicts_what_it_measures(capsys, tmp_path):
    arguments = ["profile", "--network", "784-[64]x3-10", "--batch", "16", "--rules", "all"]
    status, measured, _ = run(capsys, *arguments, "--csv", tmp_path / "m.csv")
    assert status == 0
    _, predicted, _ = run(capsys, *arguments, "--predict", "--csv", tmp_path / "p.csv", "--plot", tmp_path / "p.svg")
    assert measured.splitlines()[1:] == predicted.splitlines()[1:]
    peak = experiments.profile("memdfa", "784-[64]x3-10", 16).peak_bytes
    assert re.search(rf"784-\[64\]x3-10, batch 16.*measured(.|\n)* memdfa +{peak} ", measured)
    assert measured.splitlines()[0].replace("measured", "predicted") == predicted.splitlines()[0]
    one, other = (pd.read_csv(tmp_path / name).drop(columns="time_s") for name in ("m.csv", "p.csv"))
    pd.testing.assert_frame_equal(one, other)
    assert {"p.svg", "p.png"} <= {path.name for path in tmp_path.iterdir()}


def test_bench_times_each_rule_beside_bp_and_keeps_what_it_has(capsys, tmp_path, monkeypatch):
    arguments = ["bench", "--network", "784-[32]x2-10", "--batch", 8, "--rules", "memdfa", "--rounds", 3]
    arguments += ["--threads", 1, "all", "--pass1", "int8", "--plain"]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr("memdfa_lab.lab.bench.NOISE", -1)  # any run is noisy
    status, out, err = run(capsys, *arguments, "--out", tmp_path)
    assert status == 0
    assert err.count("noisy, BP's time varied by") == 2
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(zip(table["threads"], table["rule"], strict=True)) == [
        (n, r) for n in (1, 2) for r in ("bp", "memdfa", "memdfa", "bp")
    ]
    assert table["ratio"][0] == 1.0
    assert table["peak_bytes"][1] < table["peak_bytes"][0]
    assert "batch 8, 1 thread:" in out
    assert "batch 8, 2 threads:" in out
    assert (tmp_path / "bench.svg").exists()
