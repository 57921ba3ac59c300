"""README says what is so: its table of peaks, its example, its commands. (Its links: test_book.py.)"""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import memdfa_lab as ml
import memdfa_lab.batch.paper.tables
from memdfa_lab.figures import STYLES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
NAMES = {label: rule for rule, (label, _) in STYLES.items()}


def peaks() -> list[tuple[str, str, int, dict[str, str]]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("|")]
    header = next(row for row in rows if row[0] == "rule" and "N=" in row[1])
    found = []
    for row in rows:
        if row[0] in NAMES and "**" in row[1]:
            for column, cell in zip(header[1:], row[1:], strict=True):
                network, batch = column.split(", N=")
                numbers = dict(re.findall(r"([aefgw]) (\d+\.\d\d)", cell))
                numbers["peak"] = re.search(r"\*\*(.*?)\*\*", cell)[1]
                found.append((NAMES[row[0]], network, int(batch), numbers))
    return found


def test_the_table_has_every_rule_and_baseline():
    assert {rule for rule, *_ in peaks()} == {*ml.RULES, *ml.BASELINES}


@pytest.mark.parametrize(("rule", "network", "batch", "numbers"), peaks())
def test_each_peak_in_the_table_is_the_predicted_one(rule, network, batch, numbers):
    trace = ml.experiments.profile(rule, network, batch)
    expected = {name[0]: f"{value / 2**20:.2f}" for name, value in trace.peak_by_category.items()}
    assert numbers == expected | {"peak": f"{trace.peak_bytes / 2**20:.2f}"}


def test_the_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1].replace("epochs=3", "epochs=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout
    assert "test_accuracy" in done.stdout


def test_commands_are_known():
    from memdfa_lab.cli import _parser

    for command in re.findall(r"`(memdfa [a-z]+)", TEXT):
        assert command.split()[1] in _parser().format_help()
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z]+)", TEXT):
        if target != "and":
            assert f"\n{target}:" in targets


def test_the_mnist_table_is_that_of_the_run():
    table = pd.read_csv(ROOT / "reports" / "mnist_fc_relu" / "histories.csv")
    for label in ("BP", "FA", "DFA", "MEM-DFA"):
        (cells,) = re.findall(
            rf"^\| {label} \| (\d+\.\d\d ± \d\.\d\d) \| (\d+\.\d\d ± \d\.\d\d) \|", TEXT, re.MULTILINE
        )
        for epoch, cell in zip((5, 20), cells, strict=True):
            runs = 100 * table[(table["rule"] == NAMES[label]) & (table["epoch"] == epoch)]["test_accuracy"]
            assert cell == f"{runs.mean():.2f} ± {runs.std():.2f}"


def test_the_errors_of_convolutional_networks_are_those_of_the_runs():
    found = ml.paper.tables.errors(ml.paper.tables.load(ROOT / "reports" / "paper")["histories"])
    (told,) = re.findall(r"\*\*Convolutional networks\*\*(.*?)\n\nOn the", TEXT, re.DOTALL)
    found = found.set_index(["experiment", "rule"])
    for experiment, rules, epochs in (
        ("mnist_conv", ("bp", "memdfa"), 8),
        ("cifar10_liao_bn", ("bp", "memdfa"), 8),
        ("cifar10_liao", ("bp", "memdfa"), 12),
        ("mnist_2x800", ("bp", "memdfa"), 12),
        ("mnist_7x240", ("bp", "memdfa"), 12),
        ("mnist_100x240", ("memdfa",), 40),
    ):
        for rule in rules:
            run = found.loc[experiment, rule]
            spread = "" if run["seeds"] == 1 else f" ± {run['spread']:.2f}"
            assert f"{STYLES[rule][0]} {run['error']:.2f}{spread}" in " ".join(told.split())
            assert run["epochs"] == epochs
    assert found.loc[("mnist_100x240", "bp"), "error"] > 80  # "does not train"


def test_the_times_are_those_of_the_bench():
    table = pd.read_csv(ROOT / "reports" / "bench" / "bench.csv", keep_default_na=False)
    for label, rule, kind in (
        ("FA, B stored", "fa", "stored"),
        ("DFA", "dfa", "regenerated"),
        ("MEM-DFA", "memdfa", "regenerated"),
        ("BP, checkpointing + step in backward", "checkpoint_step_in_backward", "none"),
    ):
        (cells,) = re.findall(rf"^\| {re.escape(label)} \|((?: \d\.\d\d \([^|]+\) \|)+)$", TEXT, re.MULTILINE)
        rows = table[(table["rule"] == rule) & (table["feedback"] == kind)]
        expected = [f"{r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})" for r in rows.itertuples()]
        assert [cell.strip() for cell in cells.strip("|").split("|")] == expected


def test_the_knob_is_as_it_was_benched():
    table = pd.read_csv(ROOT / "reports" / "bench" / "frontier" / "bench.csv", keep_default_na=False)
    for _, rows in table.groupby("network"):
        ours = rows[rows["rule"] == "memdfa"]
        assert ours["ratio"].is_monotonic_decreasing
        assert ours["peak_bytes"].is_monotonic_increasing
        assert ours["ratio"].max() < rows[rows["rule"].str.startswith("checkpoint")]["ratio"].min()
    benched = pd.read_csv(ROOT / "reports" / "bench" / "bench.csv", keep_default_na=False)
    here, there = (
        runs.query("rule == 'memdfa' and feedback == 'regenerated'")["ratio"].iloc[0] for runs in (table, benched)
    )
    assert f"MEM-DFA took {here:.2f} of BP's\ntime on the first network where it took {there:.2f} in the table" in TEXT


def test_the_depths_are_as_they_were_benched():
    table = pd.read_csv(ROOT / "reports" / "bench" / "deep" / "bench.csv")
    found = {
        (rule, width): rows.assign(us=rows["us_a_block"].round().astype(int), mib=rows["peak_bytes"] / 2**20)
        for rule in ("bp", "memdfa")
        for width in (64, 512)
        for rows in [table[(table["rule"] == rule) & table["network"].str.contains(f"[{width}]", regex=False)]]
    }
    ours, bp = found["memdfa", 64], found["bp", 64]
    assert ours["peak_bytes"].nunique() == 1
    wide = {rule: [f"{us / 1000:.2f}" for us in found[rule, 512]["us_a_block"]] for rule in ("bp", "memdfa")}
    text = " ".join(TEXT.split())
    assert "takes MEM-DFA {}, {} and {} µs a block".format(*ours["us"]) in text
    assert f"and {ours['mib'].iloc[0]:.3f} MiB above rest at each" in text
    assert "BP takes {}, {} and {} µs, and".format(*bp["us"]) in text
    assert "and {:.1f}, {:.1f} and {:.1f} MiB.".format(*bp["mib"]) in text
    assert "MEM-DFA takes {} and {} ms a block at 100 and 1,000 layers".format(*wide["memdfa"]) in text
    assert "BP {} and {}.".format(*wide["bp"]) in text
