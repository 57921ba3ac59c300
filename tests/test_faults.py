"""Faults: processes killed at random moments, a full disk, Ctrl-C twice, two runs in one folder. Nothing is lost."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from reference import FAULTS, assert_identical
from test_reproduce import write

from memdfa_lab import cli
from memdfa_lab.lab.files import locked

pytestmark = pytest.mark.slow
MAIN = """import signal, sys; from pathlib import Path
from memdfa_lab import cli; from memdfa_lab.batch import notebooks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
"""
NETWORK = "784-[16]x1-10"


def start(*arguments: Any, before: str = "") -> subprocess.Popen[str]:
    """Start a command of memdfa in a process of its own."""
    code = f"{MAIN}{before}\nsys.exit(cli.main(sys.argv[1:]))"
    given = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def training(out: Path, epochs: int) -> list[Any]:
    return ["train", "--network", NETWORK, "--epochs", epochs, "--batch-size", 400, "--out", out]


def result(out: Path) -> tuple[pd.DataFrame, Any]:
    """Return the history without the times, and all that the checkpoint holds without them."""
    state = torch.load(out / "memdfa" / "checkpoint.pt", weights_only=True)
    state["progress"].pop("seconds")
    state.pop("generators")  # a fresh process of torch seeds the global one at random; these networks draw nothing
    for row in state["progress"]["rows"]:
        row.pop("seconds")
    return pd.read_csv(out / "memdfa" / "history.csv").drop(columns="seconds"), state


def assert_same_result(one: Path, other: Path) -> None:
    (table, state), (expected_table, expected) = result(one), result(other)
    pd.testing.assert_frame_equal(table, expected_table)
    assert_identical(state, expected)


def wait_for_change(path: Path, process: subprocess.Popen[str], limit_s: float = 120) -> None:
    """Wait until the process has written the file, or has ended."""
    before, limit = path.stat().st_mtime_ns if path.exists() else 0, time.monotonic() + limit_s
    while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
        assert time.monotonic() < limit, "nothing was written"
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[1]


def kill(process: subprocess.Popen[str]) -> bool:
    """Kill a process as nothing can prevent; return whether it was still running."""
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def test_training_killed_at_random_moments_ends_as_if_never_killed(tmp_path):
    moments, epochs, killed = random.Random(0), 25 * FAULTS, 0
    for _ in range(FAULTS):
        process = start(*training(tmp_path / "cut", epochs))
        wait_for_change(tmp_path / "cut" / "memdfa" / "checkpoint.pt", process)
        time.sleep(moments.uniform(0, 0.5))
        killed += kill(process)
    assert killed >= FAULTS / 2, "it ended before it was killed: give it more epochs"
    for out in ("cut", "whole"):
        process = start(*training(tmp_path / out, epochs))
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    assert_same_result(tmp_path / "cut", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole" / "memdfa").glob(".*")} <= {".checkpoint.pt.lock"}


TRAINS = f"""
from pathlib import Path
import memdfa_lab as ml
data = ml.datasets.load("mnist5k").subset(200, 50)
rule, history = ml.experiments.train("memdfa", "{NETWORK}", data, 20, 50, folder=Path(out, "01_train"), progress=False)
history.table.drop(columns="seconds").to_csv(Path(out, "01_train-history.csv"), index=False)
"""
COUNTS = "from pathlib import Path\nPath(out, '02_count-table.csv').write_text('n\\n3\\n')"


def test_reproduce_killed_at_random_moments_ends_as_if_never_killed(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(folder, "01_train", "out = None", TRAINS)
    write(folder, "02_count", "out = None", COUNTS)
    patch = f"notebooks.notebooks_folder = lambda: Path({str(folder)!r})"

    def run(out: str) -> subprocess.Popen[str]:
        return start("reproduce", "--only", "01,02", "--out", tmp_path / out, before=patch)

    started = time.monotonic()
    whole = run("whole")
    _, errors = whole.communicate(timeout=600)
    assert whole.returncode == 0, errors
    took = time.monotonic() - started
    moments, killed = random.Random(1), 0
    for _ in range(FAULTS):
        process = run("cut")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moments.uniform(0, 0.9 * took))
        killed += kill(process)
    assert killed > 0
    time.sleep(2)  # the last kernel looks once a second whether its parent is there
    process = run("cut")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0 or "has a finished run" in errors, errors
    for name in ("01_train-history.csv", "02_count-table.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    states = [torch.load(tmp_path / out / "01_train" / "checkpoint.pt", weights_only=True) for out in ("cut", "whole")]
    assert_identical(states[0]["rule"], states[1]["rule"])


def test_a_sweep_killed_at_random_moments_ends_as_if_never_killed(tmp_path):
    """The client alone is killed, what it had started ends by itself; each run is there once, and no half of one."""
    content = {
        "run": "train",
        "parameters": {"network": NETWORK, "epochs": 2, "batch_size": 200},
        "grid": {"rule": ["memdfa"], "seed": list(range(1 + FAULTS))},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(content))

    def run(out: str) -> subprocess.Popen[str]:
        return start("sweep", tmp_path / "s.yaml", "--out", tmp_path / out, "--jobs", 1)

    moments, killed = random.Random(2), 0
    for _ in range(FAULTS):
        finished = len(list((tmp_path / "cut" / "runs").glob("*/done.json")))
        process = run("cut")
        until_more = time.monotonic() + 120
        while process.poll() is None and len(list((tmp_path / "cut" / "runs").glob("*/done.json"))) == finished:
            assert time.monotonic() < until_more, "no run was finished"
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.7))
        killed += kill(process)
    assert killed >= FAULTS / 2, "it ended before it was killed: give it more runs"
    tables = []
    for out in ("cut", "whole"):
        process = run(out)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        tables.append(pd.read_csv(tmp_path / out / "results.csv").drop(columns="seconds"))
    assert len(tables[0]) == 2 * (1 + FAULTS)
    pd.testing.assert_frame_equal(*tables)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_costs_nothing_that_was_written(small_disk, tmp_path, capsys):
    out = small_disk / "run"
    assert cli.main(list(map(str, training(out, 1)))) == 0
    checkpoint = out / "memdfa" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    capsys.readouterr()
    assert cli.main(list(map(str, training(out, 2)))) != 0
    _, errors = capsys.readouterr()
    assert "memdfa/checkpoint.pt" in errors
    assert "No space left on device" in errors
    assert errors.count("\n") == 1
    assert checkpoint.read_bytes() == before
    left = {path.name for path in checkpoint.parent.iterdir()} - {".checkpoint.pt.lock"}
    assert left == {"checkpoint.pt", "history.csv"}
    ballast.unlink()
    for place in (out, tmp_path / "whole"):
        assert cli.main(list(map(str, training(place, 2)))) == 0
    assert_same_result(out, tmp_path / "whole")


@pytest.mark.parametrize("pause_s", [0.0, 0.002])
def test_ctrl_c_twice_leaves_a_run_that_goes_on(pause_s, tmp_path):
    process = start(*training(tmp_path / "cut", 2000))
    wait_for_change(tmp_path / "cut" / "memdfa" / "checkpoint.pt", process)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(pause_s)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-1500:]
    assert errors.count("\n") == 1
    assert "interrupted" in errors
    rows = torch.load(tmp_path / "cut" / "memdfa" / "checkpoint.pt", weights_only=True)["progress"]["rows"]
    for out in ("cut", "whole"):
        assert cli.main(list(map(str, training(tmp_path / out, len(rows) + 1)))) == 0
    assert_same_result(tmp_path / "cut", tmp_path / "whole")
    assert {path.name for path in (tmp_path / "cut").rglob(".*")} <= {".checkpoint.pt.lock"}


def test_a_second_ctrl_c_at_any_line_of_the_first_ones_handler_does_not_hang():
    code = """import os, signal, sys
from memdfa_lab.lab.terminal import ctrl_c_noted
for line in range(30):  # of those that run once the first signal is there
    count = 0
    def again(*_):
        global count
        count += 1
        if count == line:
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGINT)
        return again
    try:
        with ctrl_c_noted() as noted:
            sys.settrace(again)
            os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pass
    sys.settrace(None)
    assert noted
"""
    subprocess.run([sys.executable, "-c", f"{MAIN}{code}"], timeout=60, check=True)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_trains(tmp_path, capsys):
    first = start(*training(tmp_path, 100_000))
    try:
        wait_for_change(tmp_path / "memdfa" / "checkpoint.pt", first)
        assert cli.main([*map(str, training(tmp_path, 100_001)), "--overwrite"]) == 2
        _, errors = capsys.readouterr()
        assert "another run is writing" in errors
        assert errors.count("\n") == 1
        assert first.poll() is None
    finally:
        kill(first)
    with locked(tmp_path / "memdfa" / "checkpoint.pt"):  # it is free again
        pass


def test_two_runs_of_reproduce_in_one_folder_are_refused(tmp_path, capsys):
    with locked(tmp_path / "out" / "run.json"):
        assert cli.main(["reproduce", "--only", "02", "--out", str(tmp_path / "out")]) == 2
    _, errors = capsys.readouterr()
    assert "another run is writing" in errors
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".run.json.lock"]


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    ticks = iter(range(0, 10**12, 10**6))
    assert cli.main(list(map(str, training(tmp_path / "whole", 3)))) == 0
    monkeypatch.setattr(time, "time", lambda: 2e9 - 86400.0 * next(ticks))
    assert cli.main(list(map(str, training(tmp_path / "jumps", 3)))) == 0
    assert_same_result(tmp_path / "jumps", tmp_path / "whole")
