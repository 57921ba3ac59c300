"""README, the book's pages and reports say what is so: tables, examples, commands. (Their links: test_book.py.)"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from memdfa_lab.cli import _parser

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BOOK = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks" / "book").glob("*.md"))}
COG = [sys.executable, "-m", "cogapp", "-P", "-I", str(ROOT / "reports"), "-p", "import tables"]
PAGES = re.search(r"\$\(COG\) (.*)", (ROOT / "Makefile").read_text(encoding="utf-8"))[1].split()  # of `make tables`
EXAMPLES = [(name, code) for name, text in BOOK.items() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)


def test_readme_is_short():
    assert len(TEXT.encode()) <= 6000


@pytest.mark.slow
def test_tables_are_what_their_sources_give():
    """Each table is made anew, from predictions, csv files and notebooks (make tables)."""
    texts = {"README.md": TEXT, **{f"notebooks/book/{name}.md": text for name, text in BOOK.items()}}
    assert {name for name, text in texts.items() if "[[[cog" in text} == set(PAGES) - {"reports/index.md"}
    done = subprocess.run([*COG, "--check", *PAGES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_changed_number_would_be_noticed(tmp_path):
    text = (ROOT / "reports" / "index.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- \[\[\[cog tables.near\(\).*?\[\[\[end\]\]\] -->\n", text, re.DOTALL)[0]
    assert "| 1.66 ± 0.08 (3) |" in table
    page = tmp_path / "index.md"
    page.write_text(table.replace("| 1.66 ± 0.08 (3) |", "| 1.65 ± 0.08 (3) |"), encoding="utf-8")
    assert subprocess.run([*COG, "--check", str(page)], capture_output=True).returncode == 5


@pytest.mark.slow
def test_the_example_runs(tmp_path):
    done = run(re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "peak" in done.stdout
    assert "test_accuracy" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{i}" for i, (page, _) in enumerate(EXAMPLES)])
def test_the_examples_of_the_book_run(page, code, tmp_path):
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_each_reader_has_a_page_with_an_example():
    for page in ("student", "teaching", "researcher", "engineer"):
        assert f"notebooks/book/{page}.md" in TEXT
        for words in ("**You want**", "**You have**", "**Go there:**", "**Try this", "```"):
            assert words in BOOK[page], page


def test_commands_are_known():
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in (TEXT, *BOOK.values()):
        for command in re.findall(r"(?:`|^)(memdfa [a-z]+)", text, re.MULTILINE):
            assert command.split()[1] in _parser().format_help()
        for target in re.findall(r"(?:`|^)make ([a-z]+)", text, re.MULTILINE):
            assert f"\n{target}:" in targets
