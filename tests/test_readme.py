"""README and reports say what is so: their tables, the example, the commands. (Their links: test_book.py.)"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memdfa_lab.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COG = [sys.executable, "-m", "cogapp", "-P", "-I", str(ROOT / "reports"), "-p", "import tables"]
PAGES = ["README.md", "reports/index.md"]


def test_tables_are_what_their_sources_give():
    """Each table in README and reports/index.md is made anew, from predictions and csv files (make tables)."""
    done = subprocess.run([*COG, "--check", *PAGES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_changed_number_would_be_noticed(tmp_path):
    page = tmp_path / "index.md"
    shutil.copy(ROOT / "reports" / "index.md", page)
    page.write_text(page.read_text(encoding="utf-8").replace("| 1.66 ± 0.08 (3) |", "| 1.65 ± 0.08 (3) |"), "utf-8")
    assert subprocess.run([*COG, "--check", str(page)], capture_output=True).returncode == 5


def test_the_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1].replace("epochs=3", "epochs=1")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout
    assert "test_accuracy" in done.stdout


def test_commands_are_known():
    for command in re.findall(r"`(memdfa [a-z]+)", TEXT):
        assert command.split()[1] in _parser().format_help()
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z]+)", TEXT):
        if target != "and":
            assert f"\n{target}:" in targets
