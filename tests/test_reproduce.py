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
import papermill
import psutil
import pytest

from memdfa_lab import cli
from memdfa_lab.batch import page
from memdfa_lab.batch.notebooks import numbered
from memdfa_lab.batch.reproduce import NotebooksFailed, reproduce

FIGURE = """
import base64
from IPython.display import Image
from pathlib import Path
dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
for kind in ("svg", "png"):
    Path(out, f"01_first-curve.{kind}").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
Path(out, "01_first-peaks.csv").write_text("rule,peak_bytes,ratio\\nbp,82421956,1.0\\nmemdfa,942,0.000011429\\n")
Image(base64.b64decode(dot), alt="A line < a curve")
"""


def write(folder, name, *cells, title=None):
    """Write a notebook whose first cell has the parameters; a cell that begins with # or * is prose."""
    notebook_cells = [nbformat.v4.new_markdown_cell(f"# {title or name}")]
    for source in cells:
        kind = nbformat.v4.new_markdown_cell if source[0] in "#*" else nbformat.v4.new_code_cell
        notebook_cells.append(kind(source))
    notebook_cells[1].metadata.tags = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=notebook_cells, metadata=kernel), folder / f"{name}.ipynb")


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """Three notebooks that need no torch; the second fails until there is a file named mended."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write(folder, "01_first", "depth = 1\nout = None", "## Peaks", FIGURE, "*The line of $N_i$.*")
    mended = "from pathlib import Path\nif not Path('../mended').exists():\n    raise ValueError('not\\nmended')"
    write(folder, "02_second", "epochs = 1\nout = None", mended, "print('unreached')")
    write(folder, "03_third", "epochs = 1\nout = None", "print(epochs)")
    monkeypatch.setattr("memdfa_lab.batch.notebooks.notebooks_folder", lambda: folder)
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
    assert all(re.match(r"\d\d:\d\d:\d\d \[[123]/3\] 0", line) for line in lines)
    for name in ("[1/3] 01_first", "[2/3] 02_second", "[3/3] 03_third"):
        assert sum(f"{name}: started" in line for line in lines) == 1
    assert sum("01_first: done in " in line for line in lines) == 1
    assert re.search(r"02_second: failed after \d+ s, cell 3: ValueError: not$", "\n".join(lines), re.MULTILINE)

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

    with pytest.raises(ValueError, match="has a finished run"):
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
    with pytest.raises(ValueError, match="has a finished run"):
        reproduce(tmp_path / "run")
    done = nbformat.read(notebooks / "01_first.ipynb", as_version=4)
    done.cells[1].execution_count = 5
    nbformat.write(done, notebooks / "01_first.ipynb")
    reproduce(tmp_path / "run", ["03", "01"])
    assert list(state(tmp_path / "run")) == ["01_first", "03_third"]
    assert "[1/2] 01_first: done before, skipped" in capsys.readouterr().out


def test_notebooks_run_where_they_lie_and_paths_are_meant_from_where_the_command_is_given(notebooks, tmp_path):
    """What a parameter means decides, not what lies here: a folder named as a network changes nothing."""
    for folder in ("mine", "mnist", "784-[16]x1-10"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine" / "table.csv").write_text("my numbers")
    cell = "runs = 'x'  # folder with a table\ndataset = 'mnist5k'  # a name, or a path\nnetwork = ''\nout = None"
    beside = "print(open(f'{runs}/table.csv').read(), open('beside.csv').read(), dataset, network)"
    write(notebooks, "01_first", cell, beside)
    (notebooks / "beside.csv").write_text("of the course")
    reproduce("run", ["01"], {"runs": "mine", "dataset": "mnist", "network": "784-[16]x1-10"})
    shown = executed(tmp_path / "run", "01_first")[-1].outputs[0].text
    assert shown == "my numbers of the course mnist 784-[16]x1-10\n"
    reproduce("other", ["01"], {"runs": "mine", "dataset": "mine.npz"})
    assert f" {tmp_path / 'mine.npz'} " in executed(tmp_path / "other", "01_first")[-1].outputs[0].text


MEETS = """
import os, time
from pathlib import Path
Path(f"here{me}").touch()
while not Path(f"here{other}").exists():
    time.sleep(0.05)
print(os.environ["OMP_NUM_THREADS"])
"""


def test_notebooks_run_at_the_same_time_with_one_thread_each(notebooks, tmp_path, monkeypatch):
    """Each waits for the other."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for me, other in ((1, 2), (2, 1)):
        write(notebooks, f"0{me}_{'first' if me == 1 else 'second'}", f"me = {me}\nother = {other}\nout = None", MEETS)
    reproduce("run", ["01", "02"], timeout_s=120, jobs=2)
    assert executed(tmp_path / "run", "01_first")[-1].outputs[0].text == "1\n"
    with pytest.raises(ValueError, match="jobs must be a whole number from 1"):
        reproduce("other", jobs=0)


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
    with pytest.raises(ValueError, match="has other files"):
        reproduce(notebooks, overwrite=True)
    assert len(list(notebooks.iterdir())) == 3


def test_an_error_that_is_not_of_a_cell_keeps_its_traceback_and_the_others_run(notebooks, monkeypatch, capfd):
    run = papermill.execute_notebook

    def broken(source, *arguments, **options):
        return run(source, *arguments, **options) if "03" in source else 1 + "a"

    monkeypatch.setattr(papermill, "execute_notebook", broken)
    with pytest.raises(NotebooksFailed, match="1 of 2 notebooks failed: 01_first, cell 0: TypeError: unsupported"):
        reproduce("run", ["01", "03"])
    assert 'else 1 + "a"' in capfd.readouterr().err


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
    for name in ("02_second", "03_third"):
        write(
            notebooks, name, "out = None", "from pathlib import Path", f"Path('{name}').touch()\nwhile True:\n    pass"
        )
    program = (
        "import signal, sys, pathlib, memdfa_lab.batch.notebooks as n; from memdfa_lab import cli; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell's background jobs ignore it
        f"n.notebooks_folder = lambda: pathlib.Path({str(notebooks)!r}); "
        "sys.exit(cli.main(['reproduce', '--jobs', '2', '--out', 'my run']))"
    )
    running = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    end = time.monotonic() + 120
    while not all((notebooks / name).exists() for name in ("02_second", "03_third")):
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    kernels = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err.splitlines()[-1].startswith("memdfa: interrupted in 02_second, 03_third: ")
    assert "memdfa reproduce --out 'my run' continues" in err
    assert "Traceback" not in err
    assert statuses(tmp_path / "my run") == ["done", "interrupted", "interrupted"]
    assert not psutil.wait_procs(kernels, timeout=30)[1]
    assert (tmp_path / "my run" / "02_second.ipynb").exists()
    assert not list((tmp_path / "my run").glob(".*.ipynb"))


@pytest.mark.slow
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
    parsed = Page((out / "02_mnist_mlp.html").read_text(encoding="utf-8"))
    assert names - {"index.html", "run.json", ".run.json.lock", "02_mnist_mlp", "02_mnist_mlp.html"} <= set(
        parsed.links
    )
    assert "epochs = 1" in parsed.text


def test_a_wrong_value_is_one_line_and_status_1(tmp_path, capsys):
    status = cli.main(["reproduce", "--only", "02_mnist_mlp", "-p", "epochs", "0", "--out", str(tmp_path / "run")])
    assert status == 1
    err = capsys.readouterr().err
    assert "02_mnist_mlp, cell 3: ValueError: epochs must be greater than or equal to 1, got 0" in err
    assert err.count("\n") == 1


# The pages


class Page(HTMLParser):
    """Checks that tags are closed in order, and gathers links and pictures."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.loaded, self.pictures, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given["href"]] if tag == "a" else []
        self.loaded += [given[name] for name in ("href", "src") if name in given and tag != "a"]
        self.pictures += [given] if tag == "img" else []
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "img", "br", "input"):
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_pages_show_figures_tables_and_failures(notebooks, tmp_path):
    table = "import pandas as pd\npd.DataFrame({'rule': ['bp'], 'bytes': [942]})"
    formula = "from IPython.display import Latex, display\ndisplay(Latex(r'$\\frac{1}{n}$'))"
    write(notebooks, "01_first", "depth = 1\nout = None", "## Peaks", FIGURE, "*The line of $N_i$.*", table, formula)
    write(notebooks, "02_second", "epochs = 1\nout = None", "raise ValueError('a < b')", title="02 · B < A")
    with pytest.raises(NotebooksFailed):
        reproduce("run", ["01", "02"], {"depth": 3})
    out = tmp_path / "run"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(out.glob("*.html"))}
    pages = {name: Page(text) for name, text in texts.items()}
    for name, parsed in pages.items():
        assert all(link.startswith("#") or (out / link).exists() for link in parsed.links), parsed.links
        assert all(source.startswith("data:image/png") for source in parsed.loaded)  # nothing from elsewhere
        assert "<script" not in texts[name]
        assert 'name="viewport"' in texts[name]
        assert "prefers-color-scheme: dark" in texts[name]

    index, first = pages["index"], pages["01_first"]
    for shown in ("1 of 2 notebooks done", "depth = 3", "02 · B < A", "Stopped in cell 3: ValueError: a < b", "torch"):
        assert shown in index.text
    assert {"01_first.html", "01_first.ipynb", "01_first-curve.svg", "01_first-peaks.csv"} <= set(index.links)
    assert {"01_first.ipynb", "01_first-curve.svg", "01_first-curve.png", "01_first-peaks.csv"} <= set(first.links)
    assert [picture["alt"] for picture in first.pictures] == ["A line < a curve"]
    order = ["depth = 3", "Peaks", "The line of N", "942"]
    assert [first.text.rindex(part) for part in order] == sorted(first.text.rindex(part) for part in order)
    assert "<msub><mi>N</mi><mi>i</mi></msub>" in texts["01_first"]
    assert "<mfrac><mrow><mn>1</mn></mrow><mrow><mi>n</mi></mrow></mfrac>" in texts["01_first"]
    assert '<td class="number">942</td>' in texts["01_first"]
    assert "ValueError: a < b" in pages["02_second"].text


def test_a_formula_with_what_is_not_known_is_shown_as_it_is_and_notebooks_have_none(monkeypatch):
    assert page.mathml(r"\nonsense < 1") == r"<code>\nonsense &lt; 1</code>"
    assert page.mathml(r"a^") == r"<code>a^</code>"
    formulas, mathml = [], page.mathml
    monkeypatch.setattr(page, "mathml", lambda tex, *display: formulas.append(tex) or mathml(tex, *display))
    for path in numbered().values():
        for cell in nbformat.read(path, as_version=4).cells:
            outputs = [output.get("data", {}).get("text/latex", "") for output in cell.get("outputs", [])]
            for text in [*outputs, cell.source * (cell.cell_type == "markdown")]:
                page.markdown(text)
    assert len(formulas) > 400
    assert [tex for tex in formulas if mathml(tex).startswith("<code>")] == []
