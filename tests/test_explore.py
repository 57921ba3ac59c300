"""`memdfa explore` without a browser: what is on the page, and what it says when it cannot be served."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import sys
import urllib.request

import nbformat
import psutil
import pytest

from memdfa_lab.batch import explore
from memdfa_lab.batch.notebooks import notebooks_folder
from memdfa_lab.cli import main


def notebook():
    return nbformat.read(notebooks_folder() / explore.NOTEBOOK, as_version=4)


def test_the_page_has_the_explorers_and_what_they_need_alone():
    cells = explore.page(notebook()).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for name in ("memory_explorer", "step_player", "live_training", "feedback_explorer"):
        assert sum(f"ml.widgets.{name}(" in source for source in code) == 1
    assert len(code) == 6  # the parameters, and what reads them
    assert not any(call in source for source in code for call in ("report.figure(", "report.table("))
    assert sum(source.startswith("## ") for source in prose) == 4
    assert not any(source.startswith("*") for source in prose)  # captions
    assert not any(".ipynb" in source for source in prose)  # links that would lead nowhere
    names: dict = {}
    for source in code[:2]:
        exec(source.replace("%load_ext memdfa_lab", ""), names)  # nothing that was left out is missed
    assert names["setting"].depth == 32


def test_without_voila_it_says_what_to_install(monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "voila" else there(name))
    assert main(["explore"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        'memdfa: memdfa explore needs Voila, which is not installed: pip install "memdfa_lab[explore]"'
    ]


@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="no Voila")
def test_a_port_that_cannot_be_had_is_said(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["explore", "--port", str(port), "--no-browser"]) == 2
    assert main(["explore", "--port", "70000"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        f"memdfa: port {port} cannot be used",
        "memdfa: port 70000 cannot be used",
    ]
    assert all("choose another, or leave --port out" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("voila") is None, reason="no Voila")
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_sigterm_ends_the_server_and_its_kernel():
    command = [sys.executable, "-m", "memdfa_lab", "explore", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as explorer:
        address = explorer.stdout.readline().split()[4]
        urllib.request.urlopen(address).close()  # whose page has a kernel
        started = psutil.Process(explorer.pid).children(recursive=True)
        assert len(started) == 1
        explorer.terminate()
        assert explorer.wait(timeout=60) == 0
    assert not psutil.wait_procs(started, timeout=30)[1]
