"""The notebooks as committed: in order, complete, readable by all, solutions that run. Their links: test_book.py."""

import ast
import json
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE = {"image/png", "text/plain"}
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

# So that each is run in seconds; a notebook is given those that it has.
QUICK = {
    "epochs": 1, "search_epochs": 1, "steps": 40, "seeds": [0], "train_images": 500, "lrs": [0.001], "scales": [1.0],
    "depths": [2, 8], "measured_depths": [2], "widths": [64, 128], "batches": [16, 64],
}  # fmt: skip


def read(path):
    return nbformat.read(path, as_version=4).cells


def code(path):
    return [cell for cell in read(path) if cell.cell_type == "code"]


def prose(path):
    return "\n\n".join(cell.source for cell in read(path) if cell.cell_type == "markdown")


def exercises(path):
    """Return (the starter's answer, what checks it, what the folded solution has as its answer) of each exercise."""
    cells = read(path)
    found = []
    for cell, after in pairwise(cells):
        if "exercise" in cell.metadata.get("tags", []):
            starter, check = cell.source.removeprefix("%%exercise\n").split("\n# check\n")
            folded = re.findall(r"```python\n(.*?)```", after.source, re.DOTALL)
            found.append((starter, check, "\n".join(folded)))
    return found


@every_notebook
def test_was_executed_in_order_without_errors_and_noise(path):
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(r"\d%\|", text), f"a progress bar: {text}"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["metadata"].keys() <= {"tags", "jupyter"} for cell in notebook["cells"])
    assert path.stat().st_size < 1.2e6  # 07 has a curve of each experiment


@every_notebook
def test_begins_with_goals_and_parameters_that_are_checked_and_write_nothing_by_default(path):
    first = read(path)[0].source
    assert first.startswith(f"# {path.name[:2]} · ")
    assert all(f"**{promise}:**" in first for promise in ("What you can do afterwards", "Before", "Reading time"))
    texts = "\n".join(cell.source for cell in read(path) if cell.cell_type == "markdown")
    words = len(re.sub(r"<details>.*?</details>", "", texts, flags=re.DOTALL).split())
    assert int(re.search(r"Reading time:\*\*\s+(\d+)\s+minutes", first)[1]) == math.ceil(words / 200)
    cells = code(path)
    assert ["parameters" in cell.metadata.get("tags", []) for cell in cells] == [True] + [False] * (len(cells) - 1)
    assert re.search(r"^out = None", cells[0].source, re.MULTILINE)
    assert "ml.report.check_parameters(" in cells[1].source
    assert re.search(rf'Report\(out, "{path.stem}"\)', cells[1].source)
    assert "report.finish(" in cells[-1].source


@every_notebook
def test_figures_have_a_text_for_those_who_cannot_see_them_and_a_caption(path):
    cells = read(path)
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata.get("image/png", {}).get("alt", "")) > 20, cell.source
                assert after.cell_type == "markdown", cell.source
                assert re.match(r"\*[^*]", after.source), f"no caption after: {cell.source}"
            for image in re.findall(r"<img\b[^>]*>", "".join(output.get("data", {}).get("text/html", ""))):
                assert re.search(r'\balt="[^"]', image), image
    assert all(text for text in re.findall(r"!\[(.*?)\]\(", prose(path)))


@every_notebook
def test_outputs_are_compared_unless_a_cell_says_so_for_a_reason(path):
    """A mark is for one cell, and only where there is something to compare: pictures are not compared anyway."""
    tags = {tag for cell in read(path) for tag in cell.metadata.get("tags", [])}
    assert tags <= {"parameters", "nbval-ignore-output", "exercise", "solution", "hide-input"}
    assert not any(re.search(r"# *(NBVAL|PYTEST_VALIDATE)_", cell.source) for cell in code(path))
    comparable = {True: [], False: []}  # by whether it is ignored
    for cell in code(path):
        ignored = "nbval-ignore-output" in cell.metadata.get("tags", [])
        comparable[ignored].append(any(set(output.get("data", {})) != PICTURE for output in cell.outputs))
        if not ignored and not path.name.startswith("07"):  # 07 shows committed numbers
            shown = "".join(output.get("data", {}).get("text/html", "") for output in cell.outputs)
            assert "accuracy" not in shown, f"another processor trains to another accuracy: {cell.source}"
    assert all(comparable[True]), "there is nothing to ignore"
    assert any(comparable[False])


@every_notebook
def test_what_a_reader_need_not_read_is_folded(path):
    """In Jupyter and in the book alike: parameters' checks, and cells that only draw."""
    for cell in code(path):
        folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert folded == ("hide-input" in cell.metadata.get("tags", [])), cell.source
    assert "hide-input" in code(path)[1].metadata.tags


@every_notebook
def test_has_exercises_of_three_levels_with_folded_solutions(path):
    levels = re.findall(r"^\*\*Exercise (\d+)\.\*\* \*(Warm-up|Core|Further)\.\*", prose(path), re.MULTILINE)
    assert [int(number) for number, _ in levels] == list(range(1, len(exercises(path)) + 1))
    assert len(levels) >= 3
    cells = read(path)
    for before, cell, after in zip(cells, cells[1:], cells[2:], strict=False):
        if "exercise" in cell.metadata.get("tags", []):
            assert re.search(r"^\*\*Exercise \d+\.", before.source, re.MULTILINE), cell.source
            assert cell.source.startswith("%%exercise\n")
            assert after.metadata.tags == ["solution"]
            assert after.source.startswith("<details><summary>Solution</summary>\n\n")
            assert after.source.endswith("\n</details>")
            assert "".join(output.get("text", "") for output in cell.outputs).startswith("Not yet: ")
    for _, check, solution in exercises(path):
        assert ast.parse(solution).body
        assert ast.parse(check).body


@pytest.mark.slow
@every_notebook
def test_each_solution_is_right_where_the_notebook_ends_and_each_starter_is_not(path, tmp_path):
    """Each by itself: in the notebook's names as they are at its end, not in what another solution left."""
    import papermill

    from memdfa_lab.batch.headless import ENGINE

    notebook = nbformat.read(path, as_version=4)
    for number, (starter, check, solution) in enumerate(exercises(path), 1):
        right, wrong = f"{solution}\n{check}", f"{starter}\n{check}"
        alone = f"""
exec(compile({right!r}, "solution {number}", "exec"), dict(globals()))
try:
    exec(compile({wrong!r}, "starter {number}", "exec"), dict(globals()))
except Exception:
    pass
else:
    raise AssertionError("the starter of exercise {number} is right as it stands")
"""
        notebook.cells.insert(-1, nbformat.v4.new_code_cell(alone))
    nbformat.write(notebook, tmp_path / path.name)
    has = papermill.inspect_notebook(str(path))
    papermill.execute_notebook(
        str(tmp_path / path.name),
        None,
        parameters={name: value for name, value in QUICK.items() if name in has},
        engine_name=ENGINE,
        kernel_name="python3",
        progress_bar=False,
        cwd=path.parent,
    )


# The tools: nbval as make runs it, make notebooks


def nbval(*arguments):
    """Run pytest with the options of `make test-notebooks`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = re.search(r"^NBVAL := (.*)$", makefile, re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", *options, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def tiny(path, *sources, out=None):
    """Write a notebook of these cells, with `out` as what the first has put out."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if out is not None:
        cells[0].update(execution_count=1, outputs=[nbformat.v4.new_output("stream", text=out)])
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.slow
def test_a_changed_number_is_noticed_and_a_time_is_not(tmp_path):
    source = 'print("peak 1234 bytes, 5.6 MiB"); print("3.2 s", object())'
    for name, peak in (("same", 1234), ("other", 1235)):
        out = f"peak {peak} bytes, 5.6 MiB\n4.7 s <object object at 0x7eff612bcb10>\n"
        tiny(tmp_path / f"{name}.ipynb", source, out=out)
    done = nbval(f"--rootdir={tmp_path}", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^FAILED .*other\.ipynb::Cell 0", done.stdout, re.MULTILINE)
    assert "1 failed, 1 passed" in done.stdout
    differ = done.stdout.split("Cell outputs differ")[1].split("short test summary")[0]
    assert "- peak 1234 bytes" in differ
    assert "+ peak 1235 bytes" in differ


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("12 s, 0.5 ms, 3 seconds, 2.5 min", "TIME, TIME, TIME, TIME"),
        ("31.5batch/s", "RATE"),
        ("<Styler at 0x7eff612bcb10>", "<Styler at ADDRESS>"),
        ("<Figure size 640x480 with 2 Axes>", "FIGURE"),
        ('<td id="T_a1b2c_row0_col1">', '<td id="T_ID_row0_col1">'),
        ("#T_a1b2c td {", "#T_ID td {"),
        *[(text, text) for text in ("peak 1,234,567 bytes", "78.60 MiB", "2.5 samples", "784-[800]x32-10")],
        *[(text, text) for text in ("(128, 784)", "12 steps", "s = 4 N")],
    ],
)
def test_noise_is_taken_out_and_what_is_to_be_compared_is_not(text, left):
    from nbval.plugin import get_sanitize_patterns

    for pattern, replacement in get_sanitize_patterns((ROOT / "tests" / "notebooks.sanitize").read_text()):
        text = re.sub(pattern, replacement, text)
    assert text == left


@pytest.mark.slow
def test_make_notebooks_runs_in_place_and_leaves_what_fails_as_it_was(tmp_path):
    good = tiny(tmp_path / "good.ipynb", "import os; os.environ['TQDM_DISABLE']", "print(1 + 1)", out="stale")
    bad = tiny(tmp_path / "bad.ipynb", "1 / 0", out="stale")
    before = bad.read_bytes()
    command = [sys.executable, str(ROOT / ".ci" / "refresh_notebooks.py"), str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "ZeroDivisionError: division by zero" in done.stderr
    assert bad.read_bytes() == before
    cells = code(good)
    assert [cell.execution_count for cell in cells] == [1, 2]
    assert cells[0].outputs[0].data["text/plain"] == "'1'"
    assert cells[1].outputs[0].text == "2\n"
    written = json.loads(good.read_text(encoding="utf-8"))
    assert written["metadata"] == {"language_info": {"name": "python"}}
    assert not any(cell["metadata"] for cell in written["cells"])
    assert {path.name for path in tmp_path.iterdir()} == {"good.ipynb", "bad.ipynb"}
