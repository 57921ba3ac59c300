"""All notebooks in one command: what it leaves, and what happens when one fails, when it is cut, when repeated."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest

from memdfa_lab import cli
from memdfa_lab.batch.page import _prose, write_page
from memdfa_lab.batch.reproduce import NotebooksFailed, reproduce

FIGURE = """
import base64
from IPython.display import Image
from pathlib import Path
dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
for kind in ("svg", "png"):
    Path(out, f"01_first-curve.{kind}").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
Path(out, "01_first-peaks.csv").write_text("rule,peak_bytes,ratio\\nbp,82421956,1.0\\nmemdfa,942,0.000011429\\n")
["peaks"]
Image(base64.b64decode(dot), alt="A line < a curve", metadata={"name": "01_first-curve"})
"""


def write(folder, name, *cells, title=None):
    """Write a notebook whose first cell has the parameters; text of which the first sign is # or * is prose."""
    made = [nbformat.v4.new_markdown_cell(f"# {title or name}")]
    for source in cells:
        kind = nbformat.v4.new_markdown_cell if source[0] in "#*" else nbformat.v4.new_code_cell
        made.append(kind(source))
    made[1].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata=kernel), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Three notebooks that need no torch; the second fails until there is a file named mended."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(folder, "01_first", "depth = 1\nout = None", "## Peaks", FIGURE, "*The line of $N_i$.*")
    mended = "from pathlib import Path\nif not Path('../mended').exists():\n    raise ValueError('not\\nmended')"
    write(folder, "02_second", "epochs = 1\nout = None", mended, "print('unreached')")
    write(folder, "03_third", "epochs = 1\nout = None", "print(epochs)")
    monkeypatch.setattr("memdfa_lab.batch.reproduce.notebooks_folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def state(out):
    return json.loads((out / "run.json").read_text())["notebooks"]


def statuses(out):
    return [record["status"] for record in state(out).values()]


def executed(out, name):
    """Return the code cells of an executed notebook."""
    return [cell for cell in nbformat.read(out / f"{name}.ipynb", as_version=4).cells if cell.cell_type == "code"]


def test_one_fails_the_others_run_and_the_run_goes_on_when_it_is_mended(notebooks, tmp_path, capsys):
    out = tmp_path / "run 1"
    with pytest.raises(NotebooksFailed, match="1 of 3 notebooks failed: 02_second, cell 3: ValueError: not; see"):
        reproduce("run 1", parameters={"epochs": 7})
    assert statuses(out) == ["done", "failed", "done"]
    assert state(out)["02_second"]["error"] == "cell 3: ValueError: not"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"\d\d:\d\d:\d\d \[1/3\] 01_first: done in \d+ s", lines[0])
    assert re.fullmatch(r"\S+ \[2/3\] 02_second: failed after \d+ s, cell 3: ValueError: not", lines[1])

    partly = executed(out, "02_second")
    assert partly[-1].execution_count is None
    assert any(output.output_type == "error" for output in partly[2].outputs)
    assert executed(out, "03_third")[-1].outputs[0].text == "7\n"
    assert "7" not in "".join(cell.source for cell in executed(out, "01_first")[:2])  # it has no epochs
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".run.json.lock"]
    assert str(tmp_path) not in (out / "01_first.ipynb").read_text()  # no paths of this machine

    (tmp_path / "mended").touch()
    write(notebooks, "03_third", "epochs = 1\nout = None", "print(10 * epochs)")  # its source is another one now
    first = (out / "01_first.ipynb").stat()
    assert reproduce("run 1") == out.relative_to(tmp_path)
    assert "01_first: done before, skipped" in capsys.readouterr().out
    assert (out / "01_first.ipynb").stat() == first
    assert statuses(out) == ["done"] * 3
    assert executed(out, "02_second")[-1].outputs[0].text == "unreached\n"
    assert executed(out, "03_third")[-1].outputs[0].text == "70\n"  # with the parameters of before

    with pytest.raises(ValueError, match="holds a finished run"):
        reproduce("run 1")
    with pytest.raises(ValueError, match=r"with other parameters \({'epochs': 7}\)"):
        reproduce("run 1", parameters={"epochs": 8})
    with pytest.raises(ValueError, match="with other parameters"):  # the others' would not be what run.json says
        reproduce("run 1", ["03"], {"epochs": 8}, overwrite=True)
    (out / "03_third-old.csv").touch()
    reproduce("run 1", ["03"], {"epochs": 7}, overwrite=True)
    assert not (out / "03_third-old.csv").exists()
    assert "[1/1] 03_third: done" in capsys.readouterr().out
    assert (out / "01_first.ipynb").stat() == first


def test_what_was_only_put_out_is_no_other_source_and_a_run_grows_by_what_is_asked_for(notebooks, tmp_path, capsys):
    reproduce(tmp_path / "run", ["01"])
    with pytest.raises(ValueError, match="holds a finished run"):
        reproduce(tmp_path / "run")
    done = nbformat.read(notebooks / "01_first.ipynb", as_version=4)
    done.cells[1].execution_count = 5
    nbformat.write(done, notebooks / "01_first.ipynb")
    reproduce(tmp_path / "run", ["03", "01"])
    assert list(state(tmp_path / "run")) == ["01_first", "03_third"]
    assert "[1/2] 01_first: done before, skipped" in capsys.readouterr().out


def test_notebooks_run_where_they_lie_and_paths_are_meant_from_where_the_command_is_given(notebooks, tmp_path):
    (tmp_path / "mine.csv").write_text("my numbers")
    (tmp_path / "mnist").mkdir()  # a name is a name, whatever lies here
    beside = "print(open(table).read(), open('beside.csv').read(), dataset)"
    write(notebooks, "01_first", "table = 'x'\ndataset = 'mnist5k'\nout = None", beside)
    (notebooks / "beside.csv").write_text("of the course")
    reproduce("run", ["01"], {"table": "mine.csv", "dataset": "mnist"})
    assert executed(tmp_path / "run", "01_first")[-1].outputs[0].text == "my numbers of the course mnist\n"


def test_what_cannot_run_is_refused_before_anything_is_written(notebooks, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'epochs'"):
        reproduce("run", parameters={"epoch": 3})
    with pytest.raises(ValueError, match="unknown parameter 'epochs'"):
        reproduce("run", ["01"], {"epochs": 3})
    with pytest.raises(ValueError, match="unknown parameter 'out'"):
        reproduce("run", parameters={"out": "elsewhere"})
    with pytest.raises(ValueError, match="no notebook '77'"):
        reproduce("run", ["77"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="holds other files"):
        reproduce(notebooks, overwrite=True)
    assert len(list(notebooks.iterdir())) == 3


@pytest.mark.slow
def test_a_notebook_that_takes_too_long_and_one_whose_kernel_dies_do_not_stop_the_others(notebooks, tmp_path):
    write(notebooks, "01_first", "out = None", "import time\ntime.sleep(2)", "time.sleep(60)")
    write(notebooks, "02_second", "out = None", "import os\nos._exit(1)")
    with pytest.raises(NotebooksFailed, match="2 of 3"):
        reproduce("run", timeout_s=4)  # of all cells together
    assert statuses(tmp_path / "run") == ["failed", "failed", "done"]
    errors = [record.get("error") for record in state(tmp_path / "run").values()]
    assert errors[0].endswith("the time limit of 4 s is reached")
    assert errors[1] == "cell 3: the kernel died, which often means that memory ran out"
    assert (tmp_path / "run" / "01_first.ipynb").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(notebooks, tmp_path):
    write(notebooks, "02_second", "out = None", "import time\ntime.sleep(120)")
    program = (
        "import signal, sys, pathlib, memdfa_lab.batch.reproduce as r; from memdfa_lab import cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore it
        f"r.notebooks_folder = lambda: pathlib.Path({str(notebooks)!r}); "
        "sys.exit(cli.main(['reproduce', '--out', 'my run']))"
    )
    running = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    partly, end = tmp_path / "my run" / ".02_second.ipynb", time.monotonic() + 120
    while (
        running.poll() is None and time.monotonic() < end and not (partly.exists() and "sleep" in _running_cell(partly))
    ):
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1] == (
        "memdfa: interrupted in 02_second: what was finished is kept, memdfa reproduce --out 'my run' goes on"
    )
    assert "Traceback" not in err
    assert statuses(tmp_path / "my run") == ["done", "interrupted", "waiting"]
    assert (tmp_path / "my run" / "02_second.ipynb").exists()
    assert not partly.exists()


def _running_cell(path):
    try:
        cells = json.loads(path.read_text())["cells"]
    except ValueError:  # half written
        return ""
    return "".join("".join(c["source"]) for c in cells if c["metadata"]["papermill"]["status"] == "running")


def test_a_real_notebook_leaves_figures_and_tables(tmp_path):
    parameters = {"epochs": 1, "seeds": [3], "rules": ["dfa", "memdfa"], "batch_size": 100}
    out = reproduce(tmp_path / "run", ["02"], parameters)
    names = {path.name for path in out.iterdir()}
    for name in ("learning_curves", "confusion", "digits"):
        assert {f"02_mnist_mlp-{name}.svg", f"02_mnist_mlp-{name}.png"} <= names
    table = pd.read_csv(out / "02_mnist_mlp-histories.csv")
    assert set(table["rule"]) == {"dfa", "memdfa"}
    assert table["loss"][0] == table["loss"][1]
    assert "widget-view" not in (out / "02_mnist_mlp.ipynb").read_text(encoding="utf-8")  # a progress bar
    page = (out / "index.html").read_text(encoding="utf-8")
    for name in names - {"index.html", "run.json", ".run.json.lock", "02_mnist_mlp"}:
        assert f'="{name}"' in page, f"{name} is not on the page"
    assert "epochs = 1" in page


def test_a_wrong_value_is_one_line_and_status_1(tmp_path, capsys):
    status = cli.main(["reproduce", "--only", "02_mnist_mlp", "-p", "epochs", "0", "--out", str(tmp_path / "run")])
    assert status == 1
    err = capsys.readouterr().err
    assert "02_mnist_mlp, cell 3: ValueError: parameter epochs must be a whole number from 1" in err
    assert err.count("\n") == 1


# The page


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers links and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.pictures, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("href", "src") if name in given]
        self.pictures += [given] if tag == "img" else []
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_shows_figures_tables_and_failures(notebooks, tmp_path):
    write(notebooks, "02_second", "epochs = 1\nout = None", "raise ValueError('a < b')", title="02 · B < $W_{i+1}$")
    with pytest.raises(NotebooksFailed):
        reproduce("run", ["01", "02"], {"depth": 3})
    out = tmp_path / "run"
    text = (out / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    for link in page.links:
        assert link.startswith("#") or (out / link).exists(), link
    assert {f"01_first{end}" for end in (".ipynb", "-curve.svg", "-curve.png", "-peaks.csv")} <= set(page.links)
    assert [(picture["src"], picture["alt"]) for picture in page.pictures] == [
        ("01_first-curve.svg", "A line < a curve")
    ]
    assert "The line of <i>N<sub>i</sub></i>." in text
    assert "<h3>Peaks</h3>" in text
    for shown in ("1 of 2 notebooks done", "82,421,956", "942", "1.143e-05", "peak bytes", "depth = 3"):
        assert shown in page.text
    assert "Stopped in cell 3: ValueError: a < b" in page.text
    assert "02 · B &lt; <i>W<sub>i+1</sub></i>" in text
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        (r"$\sqrt L$ and $N \times n_{i-1}$", "<i>√L</i> and <i>N × n<sub>i-1</sub></i>"),
        (r"$\mathrm{d}W^\top \le e\, B_i$", "<i>dW<sup>T</sup> ≤ e B<sub>i</sub></i>"),
        (
            "**a** *b* `c < d`\nand [e](https://f.org)",
            '<strong>a</strong> <em>b</em> <code>c &lt; d</code> and <a href="https://f.org">e</a>',
        ),
    ],
)
def test_captions_keep_their_markup(markdown, html):
    assert _prose(markdown) == html


def test_a_large_table_is_only_linked_to(tmp_path):
    write(tmp_path, "01_first", "out = None")
    pd.DataFrame({"n": range(31)}).to_csv(tmp_path / "01_first-many.csv", index=False)
    record = {"status": "done", "seconds": 1.0}
    write_page(tmp_path, {"parameters": {}, "versions": "", "notebooks": {"01_first": record}})
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert "Table many: 31 rows, 1 columns" in page.text
    assert "parameters: as they are in the notebooks" in page.text.lower()
    assert "01_first-many.csv" in page.links
