"""The command line: results, --help with examples, one line and status 2 for wrong arguments."""

import pandas as pd
import pytest

from memdfa_lab import cli

QUICK = ["--epochs", "1", "--batch-size", "200"]


def run(capsys, *arguments):
    try:
        status = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse leaves this way
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_train_writes_a_history_a_rule_and_prints_a_table(capsys, tmp_path):
    status, out, _ = run(capsys, "train", "--rule", "dfa", "memdfa", *QUICK, "--out", tmp_path / "a b")
    assert status == 0
    one, other = (pd.read_csv(tmp_path / "a b" / rule / "history.csv") for rule in ("dfa", "memdfa"))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))
    assert "memdfa" in out
    assert f"{one['test_accuracy'].item():.4f}" in out


def test_train_goes_on_with_the_run_in_the_folder(capsys, tmp_path):
    run(capsys, "train", *QUICK, "--out", tmp_path)
    first = pd.read_csv(tmp_path / "memdfa" / "history.csv")
    status, _, _ = run(capsys, "train", "--epochs", 2, "--batch-size", 200, "--out", tmp_path)
    assert status == 0
    second = pd.read_csv(tmp_path / "memdfa" / "history.csv")
    assert list(second["epoch"]) == [1, 2]
    pd.testing.assert_frame_equal(first, second.head(1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: command"),
        (["train", "--device", "tpu0"], "tpu0"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--epochs", "two"], "invalid int value: 'two'"),
        (["reproduce", "--only", "77"], "no notebook '77'"),
        (["reproduce", "--only", "02", "-p", "epoch", "3"], "did you mean 'epochs'?"),
        (["reproduce", "-p", "epochs", "[1"], "-p takes a value as in YAML"),
        (["sweep", "status", "no/such.yaml"], "No such file"),
        (["sweep", "one.yaml", "two.yaml"], "invalid choice: 'one.yaml'"),
    ],
)
def test_wrong_arguments_get_one_line_and_status_2(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err + out
    assert list(tmp_path.rglob("*")) == []  # nothing was written


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(ValueError, match="unknown network"):
        run(capsys, "train", "--network", "nonsense", "--debug")


def test_a_fault_in_the_program_keeps_its_traceback(capsys, monkeypatch):
    """An hour into training, a TypeError is not a wrong argument."""

    def fault(*args, **kwargs):
        len(3)

    monkeypatch.setattr("memdfa_lab.lab.experiments.train", fault)
    status, _, err = run(capsys, "train")
    assert status == 1
    assert "Traceback" in err
    assert "in fault" in err
    assert err.splitlines()[-1] == "memdfa: object of type 'int' has no len()"


def test_a_baseline_is_trained_like_a_rule(capsys, tmp_path):
    status, _, _ = run(capsys, "train", "--rule", "checkpoint", "bp", *QUICK, "--out", tmp_path)
    assert status == 0
    one, other = (pd.read_csv(tmp_path / rule / "history.csv") for rule in ("checkpoint", "bp"))
    pd.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"))


@pytest.mark.parametrize("command", ["train", "reproduce", "profile", "bench", "sweep"])
def test_help_has_examples(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"  memdfa {command}" in out.split("examples:")[1]


def test_ctrl_c_ends_with_130_and_one_line(capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("memdfa_lab.lab.experiments.train", interrupted)
    status, _, err = run(capsys, "train")
    assert status == 130
    assert err.count("\n") == 1


def test_profile_predicts_what_it_measures(capsys, tmp_path):
    arguments = ["profile", "--network", "784-[64]x3-10", "--batch", "16", "--rules", "all"]
    status, measured, _ = run(capsys, *arguments, "--csv", tmp_path / "m.csv")
    assert status == 0
    _, predicted, _ = run(capsys, *arguments, "--predict", "--csv", tmp_path / "p.csv", "--plot", tmp_path / "p.svg")
    assert measured.splitlines()[1:] == predicted.splitlines()[1:]
    assert measured.splitlines()[0].replace("measured", "predicted") == predicted.splitlines()[0]
    one, other = (pd.read_csv(tmp_path / name).drop(columns="time_s") for name in ("m.csv", "p.csv"))
    pd.testing.assert_frame_equal(one, other)
    assert {"p.svg", "p.png"} <= {path.name for path in tmp_path.iterdir()}


def test_bench_times_each_rule_beside_bp_and_keeps_what_it_has(capsys, tmp_path):
    arguments = ["bench", "--network", "784-[32]x2-10", "--batch", 8, "--rules", "memdfa", "--rounds", 3]
    status, out, _ = run(capsys, *arguments, "--out", tmp_path)
    assert status == 0
    table = pd.read_csv(tmp_path / "bench.csv")
    assert list(table["rule"]) == ["bp", "memdfa"]
    assert table["ratio"][0] == 1.0
    assert table["peak_bytes"][1] < table["peak_bytes"][0]
    assert "threads" in out.splitlines()[0]
    assert (tmp_path / "bench.svg").exists()
