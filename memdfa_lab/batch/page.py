"""The pages of a run folder, index.html and one for each executed notebook, without server, network or script."""

import re
from contextlib import suppress
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

from memdfa_lab.lab.files import write_text

TEMPLATES = Path(__file__).with_name("templates")
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "text/latex", "text/plain"]  # the first one
NUMBER = re.compile(r"<td(?=[^>]*>\s*[-+]?[\d,.]+(e[-+]?\d+)?( ?(%|[KMG]iB))?\s*</td>)")  # aligned at the right
MARKS = {"done": "✓", "failed": "✗", "running": "…", "interrupted": "–", "waiting": "·"}


class _Renderer(IPythonRenderer):
    """nbconvert's Markdown, with formulas as MathML, and links to the pages of other notebooks."""

    def block_math(self, body: str) -> str:
        return mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return mathml(body)

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, re.sub(r"^(\d\d_\w+)\.ipynb", r"\1.html", url), title)


def mathml(tex: str, display: str = "inline") -> str:
    """Return a formula in TeX as MathML, which browsers draw without a script; as code if it cannot be converted."""
    with suppress(Exception):  # latex2mathml's errors have no class in common
        formula = str(convert(tex, display=display))
        if "\\" not in formula:  # it leaves unknown commands as they are
            return formula
    return f"<code>{escape(tex)}</code>"


def markdown(source: str) -> str:
    """Return Markdown as HTML."""
    return MarkdownWithMath(renderer=_Renderer(escape=False, exclude_anchor_links=True)).render(source)


@cache
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(TEMPLATES / "page")
    return jinja2.Environment(loader=loader, autoescape=True).get_template(name)


def write_page(out: Path, name: str) -> None:
    """Write NAME.html from the executed notebook NAME.ipynb, with links to the figures and tables that it wrote."""
    notebook = nbformat.read(out / f"{name}.ipynb", as_version=4)
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}),
        extra_template_basedirs=[str(TEMPLATES)],
        template_name="page",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    exporter.register_filter("markdown2html", markdown)
    about = {"title": title(notebook, name), "name": name, "files": _files(out, name)}
    text, _ = exporter.from_notebook_node(notebook, resources={"page": about})
    write_text(out / f"{name}.html", NUMBER.sub('<td class="number"', text))


def write_index(out: Path, state: dict[str, Any]) -> None:
    """Write index.html, a table of the run's notebooks, from the content of run.json."""
    rows = []
    for name, record in state["notebooks"].items():
        has_page = (out / f"{name}.html").exists()
        heading = title(nbformat.read(out / f"{name}.ipynb", as_version=4), name) if has_page else name
        files = _files(out, name) if has_page else []
        rows.append({"name": name, "title": heading, "has_page": has_page, "files": files, **record})
    write_text(out / "index.html", _template("run.html.j2").render(rows=rows, marks=MARKS, **state))


def title(notebook: Any, name: str) -> str:
    """Return the notebook's first heading, as text, or its name."""
    lines = (cell.source.splitlines()[0] for cell in notebook.cells if cell.source.startswith("# "))
    return next(lines, name).removeprefix("# ")


def _files(out: Path, name: str) -> list[str]:
    kinds = (".csv", ".svg", ".png")
    return sorted(path.name for path in out.glob(f"{name}-*") if path.suffix in kinds)
