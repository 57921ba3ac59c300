"""Sweeps: what a file asks for is run once each and put in a table, whatever is killed in between."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from memdfa_lab import cli, figures
from memdfa_lab.batch import sweep
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import locked

CODE = f"memdfa_lab {metadata.version('memdfa_lab')}"
QUICK = {"network": "784-[16]x2-10", "epochs": 2, "batch_size": 100}
TINY = """
import os, signal, time
from pathlib import Path
(Path(out) / "kernel.pid").write_text(str(os.getpid()))
tries = len(list(Path(out).glob("try*")))
(Path(out) / f"try{tries}").touch()
if do == "fail":
    raise ValueError("no such\\nthing")
if do == "fail once" and tries == 0:
    raise OSError("for now")
if do == "wait twice" and tries < 2:
    time.sleep(120)
Path(out, "tiny-results.csv").write_text(f"n,threads,root\\n{n},{os.environ['OMP_NUM_THREADS']},{n**0.5}\\n")
"""


def write(path, **content):
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


@pytest.fixture
def tiny(tmp_path):
    """A notebook that does what its parameters ask for, and needs no torch."""
    cells = [nbformat.v4.new_code_cell(text) for text in ('n: int = 1\ndo: str = "work"\nout = None', TINY)]
    cells[0].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "tiny.ipynb")
    return {"run": "tiny.ipynb", "table": "results"}


def command(*arguments, **options):
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"  # background jobs ignore it
    code += "; from memdfa_lab.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, "sweep", *map(str, arguments)], text=True, **options)


def until(true, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.02)


def finished(out):
    return len(list((out / "runs").glob("*/done.json")))


def kill(process):
    """Kill without a chance to tidy up, and return all that it had started."""
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    if isinstance(process, subprocess.Popen):
        process.wait()
    return started


def gone(processes):
    return not psutil.wait_procs(processes, timeout=30)[1]


# Runs on a cluster, with kills

CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        print(cluster.scheduler_address, *(worker.pid for worker in cluster.workers.values()), flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def cluster(tmp_path):
    """A function that starts a cluster of two workers and returns its process, address and workers."""
    (tmp_path / "cluster.py").write_text(CLUSTER)
    processes = []

    def start():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        processes.append(subprocess.Popen([sys.executable, str(tmp_path / "cluster.py")], text=True, **pipes))
        address, *workers = processes[-1].stdout.readline().split()
        return processes[-1], address, [psutil.Process(int(worker)) for worker in workers]

    yield start
    for process in processes:
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills with signals")
def test_12_runs_are_there_once_each_though_a_worker_the_scheduler_and_the_client_are_killed(cluster, tmp_path):
    grid = {"rule": ["bp", "fa", "dfa", "memdfa"], "lr": [0.01, 0.03, 0.1]}
    file, out = write(tmp_path / "many.yaml", run="train", parameters=QUICK, grid=grid), tmp_path / "many"
    scheduler, address, (worker, _) = cluster()
    client = command(file, "--out", out, "--scheduler", address, stderr=subprocess.PIPE)
    until(lambda: finished(out) >= 2, client)
    assert gone(kill(worker))
    until(lambda: finished(out) >= 4, client)
    assert gone(kill(scheduler))
    _, err = client.communicate(timeout=120)
    assert client.returncode == 1
    assert err == "memdfa: lost the Dask scheduler: finished runs are kept, and the same command continues\n"

    scheduler, address, _ = cluster()
    client = command(file, "--out", out, "--scheduler", address)
    until(lambda: finished(out) >= 7, client)
    assert finished(out) < 12
    kill(client)
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/done.json")}
    client = command(file, "--out", out, "--scheduler", address)
    assert client.wait(timeout=300) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    scheduler.communicate(timeout=60)

    table = pd.read_csv(out / "results.csv", dtype={"run": str})
    assert list(table.groupby("run").size()) == [QUICK["epochs"]] * 12
    data = experiments.load_for(QUICK["network"], "mnist5k")
    results = ["epoch", "loss", "train_accuracy", "test_accuracy"]
    for (rule, lr), rows in table.groupby(["rule", "lr"]):
        _, history = experiments.train(rule, data=data, **QUICK, lr=lr, progress=False)
        pd.testing.assert_frame_equal(rows[results].reset_index(drop=True), history.table[results], check_exact=True)
    pd.testing.assert_frame_equal(pd.read_parquet(out / "results.parquet"), table, check_dtype=False)
    assert (out / "results.svg").exists()
    assert not list(out.glob("runs/*/checkpoint.pt"))


# Notebooks, on this machine


@pytest.mark.slow
def test_a_notebook_is_run_for_each_entry_and_what_fails_is_tried_again(tiny, tmp_path, capsys):
    listed = [{"n": 9, "do": "fail"}, {"n": 16, "do": "fail once"}]
    file, out = write(tmp_path / "s.yaml", **tiny, list=listed, threads=2), tmp_path / "out"
    assert [row["status"] for row in rows(file, out)] == ["waiting", "waiting"]
    assert not out.exists()
    with pytest.raises(sweep.RunsFailed, match=r"1 of 2 runs failed: \w+ \(n=9, .*\), cell 3: ValueError: no such"):
        sweep.run(file, out, jobs=2)
    table = pd.read_csv(out / "results.csv")
    assert list(table["parameter_n"]) == list(table["n"]) == [16]
    assert set(table["threads"]) == {2}
    tries = {row["n"]: len(list((out / "runs" / row["run"]).glob("try*"))) for row in rows(file, out)}
    assert tries == {9: 2, 16: 2}
    assert {row["n"]: (row["status"], row["error"]) for row in rows(out)} == {
        9: ("failed", "cell 3: ValueError: no such"),
        16: ("done", ""),
    }
    for row in rows(out):
        folder = out / "runs" / row["run"]
        executed = nbformat.read(folder / "tiny.ipynb", as_version=4)
        assert any(f"n = {row['n']}" in cell.source.splitlines() for cell in executed.cells)
        assert json.loads((folder / "parameters.json").read_text())["parameters"]["n"] == row["n"]
        assert not psutil.pid_exists(int((folder / "kernel.pid").read_text()))
    capsys.readouterr()
    assert cli.main(["sweep", "status", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "2 runs: 1 failed, 1 done"

    # another text of the notebook: nothing of the old one counts
    notebook = nbformat.read(tmp_path / "tiny.ipynb", as_version=4)
    notebook.cells[1].source += "\n# "
    nbformat.write(notebook, tmp_path / "tiny.ipynb")
    assert {row["status"] for row in rows(file, out)} == {"waiting", "failed"}


def rows(*arguments):
    return sweep.status(*arguments).to_dict("records")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills with signals")
def test_a_killed_run_takes_its_kernel_along_and_is_done_again_and_ctrl_c_ends_all(tiny, tmp_path):
    file, out = write(tmp_path / "s.yaml", **tiny, list=[{"n": 4, "do": "wait twice"}]), tmp_path / "out"
    client = command(file, "--out", out, "--jobs", 1, stderr=subprocess.PIPE)
    until(lambda: list(out.glob("runs/*/try0")), client)
    assert [row["status"] for row in rows(out)] == ["running"]
    (kernel,) = (psutil.Process(int(path.read_text())) for path in out.glob("runs/*/kernel.pid"))
    kernel.parent().kill()
    assert gone([kernel])
    until(lambda: list(out.glob("runs/*/try1")), client)
    started = psutil.Process(client.pid).children(recursive=True)
    assert len(started) == 2  # the run and its kernel
    client.send_signal(signal.SIGINT)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 130
    assert err == "memdfa: interrupted: finished work is kept, and the same command resumes from there\n"
    assert gone(started)
    sweep.run(file, out)
    assert [row["status"] for row in rows(out)] == ["done"]


@pytest.mark.slow
def test_only_what_has_its_mark_is_read_and_a_killed_training_goes_on(tmp_path):
    file = write(tmp_path / "s.yaml", run="train", parameters=QUICK, grid={"rule": ["bp", "memdfa"]})
    out = tmp_path / "out"
    sweep.run(file, out, jobs=1)
    whole = pd.read_csv(out / "results.csv")
    one, other = (out / "runs" / row["run"] for row in rows(out))
    (one / "done.json").unlink()
    (one / "history.csv").write_text("epoch,loss\n1,")
    experiments.train(
        "bp", data=experiments.load_for(QUICK["network"], "mnist5k"), **(QUICK | {"epochs": 1}), folder=one
    )
    kept = (other / "done.json").stat()
    assert list(sweep.collect(out)["rule"]) == ["memdfa"] * 2
    sweep.run(file, out, jobs=1)
    assert (other / "done.json").stat() == kept
    pd.testing.assert_frame_equal(
        pd.read_csv(out / "results.csv").drop(columns="seconds"), whole.drop(columns="seconds")
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kills with signals")
def test_a_killed_sweep_leaves_no_process_and_its_training_goes_on(tmp_path):
    """The run outlives neither the sweep nor its checkpoint, whether it is killed or interrupted."""
    settings = QUICK | {"epochs": 10_000, "batch_size": 4000}
    file, out = write(tmp_path / "s.yaml", run="train", parameters=settings, list=[{}]), tmp_path / "out"
    for number in (signal.SIGKILL, signal.SIGINT):
        before = [path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.pt")]
        client = command(file, "--out", out, "--jobs", 1, stderr=subprocess.DEVNULL)
        until(lambda: [path.stat().st_mtime_ns for path in out.glob("runs/*/checkpoint.pt")] != before, client)  # noqa: B023
        started = psutil.Process(client.pid).children(recursive=True)
        assert len(started) == 1
        client.send_signal(number)
        client.wait(timeout=60)
        assert gone(started)
        assert [row["status"] for row in rows(out)] == ["waiting"]
    (checkpoint,) = out.glob("runs/*/checkpoint.pt")
    assert len(torch.load(checkpoint, weights_only=True)["progress"]["rows"]) > 2


@pytest.mark.slow
def test_a_result_that_cannot_be_written_does_not_cost_its_training(tmp_path):
    file, out = write(tmp_path / "s.yaml", run="train", parameters=QUICK, grid={"rule": ["bp"]}), tmp_path / "out"
    (name,) = sweep.read(file).runs
    folder = out / "runs" / name
    (folder / "history.csv").mkdir(parents=True)  # stands in its place
    (folder / "parameters.json").write_text(
        json.dumps({"run": "train", "parameters": QUICK | {"rule": "bp"}, "code": CODE})
    )
    (out / "sweep.json").touch()
    with pytest.raises(sweep.RunsFailed):
        sweep.run(file, out, jobs=1)
    assert [row["status"] for row in rows(out)] == ["failed"]
    assert "Traceback" in (folder / "log.txt").read_text()
    assert (folder / "checkpoint.pt").exists()
    (folder / "history.csv").rmdir()
    sweep.run(file, out, jobs=1)
    assert [row["status"] for row in rows(out)] == ["done"]
    assert not (folder / "checkpoint.pt").exists()


# What is refused


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    file = write(tmp_path / "s.yaml", run="train", grid={"seed": [0]})
    with locked(tmp_path / "out" / "sweep.json"), pytest.raises(ValueError, match="another run is writing"):
        sweep.run(file, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="has other files and no sweep"):
        sweep.run(file, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: [train", "not YAML"),
        ("train", "not a sweep file"),
        ("{run: train, grids: {seed: [0]}}", "did you mean 'grid'?"),
        ("{run: train}", "give either grid"),
        ("{run: train, grid: {}}", "grid: Dictionary should have at least 1 item"),
        ("{run: train, list: []}", "list: List should have at least 1 item"),
        ("{run: train, grid: {seed: []}}", "grid.seed: List should have at least 1 item"),
        ("{run: train, grid: {seed: 3}}", "grid.seed must be a valid list, got 3"),
        ("{run: train, list: [{seed: 0}, {seed: 0}]}", "two runs have the same settings"),
        ("{run: train, list: [{seed: 0}, {}]}", "two runs have the same settings"),  # 0 is what {} has
        ("{run: train, grid: {seed: [0]}, run: train}", 'duplicate key "run"'),
        ("{run: train, grid: {seeds: [0]}}", "did you mean 'seed'?"),
        ("{run: train, on: 1, grid: {seed: [0]}}", "unknown key 'on'"),  # in YAML 1.1, on is true
        ("{run: train, grid: {1: [0]}}", "must be a valid string, got 1"),
        ("{run: train, grid: {_seed: [0]}}", "unknown setting '_seed'"),
        ("{run: train, grid: {rule: [bpp]}}", "unknown rule 'bpp'"),
        ("{run: train, grid: {lr: [fast]}}", "lr must be a valid number"),
        ("{run: train, grid: {epochs: [1:30]}}", "epochs must be a valid integer, got '1:30'"),  # 90 in base 60
        ("{run: train, grid: {network: [mnist_con]}}", "did you mean 'mnist_conv'?"),
        ("{run: train, grid: {dataset: [mnist5]}}", "did you mean 'mnist5k'?"),
        ("{run: train, grid: {seed: [2026-01-01]}}", "seed must be a valid integer"),
        ("{run: train, grid: {seed: [0]}, retries: -1}", "retries must be greater than or equal to 0"),
        ("{run: train, grid: {seed: [0]}, table: histories}", "table goes with a notebook"),
        ("{run: 02_mnist_mpl, grid: {epochs: [1]}}", "did you mean '02_mnist_mlp'?"),
        ("{run: 02_mnist_mlp, table: histories, grid: {epoch: [1]}}", "did you mean 'epochs'?"),
        ("{run: 02_mnist_mlp, table: histories, grid: {epochs: [x]}}", "epochs must be a valid integer, got 'x'"),
        ("{run: 02_mnist_mlp, table: histories, grid: {network: [fc_rel]}}", "did you mean 'fc_relu'?"),
        ("{run: 02_mnist_mlp, table: histories, grid: {out: [x]}}", "unknown parameter 'out'"),
        ("{run: 02_mnist_mlp, table: histories, grid: {dataset: [2026-01-01]}}", "dataset must be a valid string"),
        ("{run: 02_mnist_mlp, table: history_, grid: {epochs: [1]}}", "table must name a table that 02_mnist_mlp"),
        ("{run: 02_mnist_mlp, grid: {epochs: [1]}}", "table must name a table that 02_mnist_mlp"),
    ],
)
def test_what_cannot_run_is_one_line_before_anything_starts(text, expected, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    assert cli.main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_scheduler_is_one_line_and_workers_that_see_another_disk_say_so(tmp_path, capsys):
    file = write(tmp_path / "s.yaml", run="train", grid={"seed": [0]})
    arguments = ["sweep", str(file), "--out", str(tmp_path / "out"), "--scheduler"]
    assert cli.main([*arguments, "127.0.0.1:0x"]) == 2
    assert "no Dask scheduler at 127.0.0.1:0x" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert "all workers must share the sweep's folder" in sweep.work(str(tmp_path / "elsewhere"), "a", 0)


@pytest.mark.parametrize(("name", "runs"), [("rules", 24), ("notebook", 3)])
def test_example_files_can_be_run(name, runs):
    folder = Path(__file__).resolve().parent.parent / "notebooks" / "sweeps"
    assert len(sweep.read(folder / f"{name}.yaml").runs) == runs


def test_1e_3_is_a_number_and_a_run_is_named_by_all_its_settings(tmp_path):
    """That are those of the file and the network's own: how the file spells them does not matter."""
    (tmp_path / "a.yaml").write_text("{run: train, parameters: {rule: bp}, grid: {lr: [1e-3, 1E+1, 020]}}")
    (tmp_path / "b.yaml").write_text("{run: train, list: [{lr: 0.001, rule: bp, network: fc_relu}], retries: 3}")
    one, other = (sweep.read(tmp_path / name) for name in ("a.yaml", "b.yaml"))
    assert [run["lr"] for run in one.runs.values()] == [0.001, 10.0, 20]
    assert next(iter(one.runs)) == next(iter(other.runs))


def test_baselines_are_rules(tmp_path):
    file, out = (
        write(tmp_path / "s.yaml", run="train", parameters=QUICK, grid={"rule": ["last_layer"]}),
        tmp_path / "out",
    )
    sweep.run(file, out)
    assert list(pd.read_csv(out / "results.csv")["rule"]) == ["last_layer"] * 2


def test_relative_paths_are_meant_from_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist5k").mkdir()  # a name is a name, whatever lies here
    file = write(
        tmp_path / "s.yaml", run="train", list=[{"root": "data"}, {"dataset": "mine.npz"}, {"dataset": "mnist5k"}]
    )
    asked = sweep.read(file)
    given = [asked.given(name) for name in asked.runs]
    assert given == [{"root": str(tmp_path / "data")}, {"dataset": str(tmp_path / "mine.npz")}, {"dataset": "mnist5k"}]


# The figure


def summary_table(**columns):
    grid = [(lr, rule, seed) for lr in (0.01, 0.1) for rule in ("memdfa", "bp") for seed in (0, 1)]
    table = pd.DataFrame(grid, columns=["lr", "rule", "seed"])
    table = table.assign(run=[str(n) for n in range(8)], epoch=2, test_accuracy=table["lr"] + 0.1 * table["seed"])
    return pd.concat([table, table.assign(epoch=1, test_accuracy=0.0)]).assign(**columns)


def test_the_summary_draws_the_last_epoch_against_the_number_that_varied():
    axes = figures.sweep_summary(summary_table(), ["lr", "rule", "seed", "device"]).axes[0]
    assert axes.get_xlabel() == "lr"
    assert axes.get_ylabel() == "test accuracy (%)"
    assert [line.get_label() for line in axes.lines] == ["BP", "MEM-DFA"]
    for line in axes.lines:
        np.testing.assert_allclose(line.get_ydata(), [6, 15])  # the mean over seeds


def test_the_summary_of_names_has_a_place_for_each_and_without_numbers_there_is_none():
    table = summary_table(lr="as it is")
    axes = figures.sweep_summary(table, ["rule"]).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["BP", "MEM-DFA"]
    assert figures.sweep_summary(table[["run", "rule"]], ["rule"]) is None
