"""The book: README, the notebooks, the reports and a reference as pages, by sphinx and myst-nb (`make book`).

The project's folder is the source folder, so a link between README, notebooks and reports is a link in the book too.
Nothing is run, and no page loads anything from the network.
"""

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from html import escape
from pathlib import Path
from textwrap import indent

import jupyter_server_mathjax
import pandas as pd
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = html_title = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Pages. Only these two folders are searched: the project's may hold an environment, data and builds.
root_doc = "README"
include_patterns = ["*.md", "notebooks/[0-9]*.ipynb", "notebooks/book/*.rst", "notebooks/book/*.md", "reports/index.md"]
exclude_patterns = [path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("notebooks", "reports")]
CONTENTS = """

```{toctree}
:hidden:
:caption: Begin here
notebooks/book/student
notebooks/book/teaching
notebooks/book/researcher
notebooks/book/engineer
notebooks/book/peaks
```

```{toctree}
:hidden:
:glob:
:caption: Notebooks
notebooks/*
```

```{toctree}
:hidden:
:caption: Package
notebooks/book/which
notebooks/book/memory
notebooks/book/own
notebooks/book/running
notebooks/book/recipes
notebooks/book/gpu
reports/index
notebooks/book/api
CONTRIBUTING
CHANGELOG
SECURITY
```
"""

# Markdown and notebooks, with the outputs that are committed.
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # these scripts would come from the network
highlight_language = "text"

# Maths by the MathJax that Jupyter packages, copied beside the pages (in `finish`).
mathjax_path = "mathjax/MathJax.js?config=TeX-AMS-MML_HTMLorMML-full"
mathjax2_config = {
    "tex2jax": {"ignoreClass": "tex2jax_ignore", "processClass": "math"},
    "HTML-CSS": {"availableFonts": [], "webFont": "STIX-Web", "imageFont": None, "scale": 95},
    "messageStyle": "none",
}

# The reference, of docstrings as `read_as_text` leaves them.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80

# Looks.
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sphinx = html_show_copyright = html_show_sourcelink = html_copy_source = False


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give README the table of contents; take widgets out of notebooks: without a kernel they are dead."""
    if docname == root_doc:
        source[0] += CONTENTS
    elif docname.startswith("notebooks/") and source[0].startswith("{"):
        notebook = json.loads(source[0])
        for cell in notebook["cells"]:
            outputs = cell.get("outputs", [])
            outputs[:] = [
                one for one in outputs if "application/vnd.jupyter.widget-view+json" not in one.get("data", {})
            ]
        notebook["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # knows %magics
        source[0] = json.dumps(notebook)


def read_as_text(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Show a docstring's signs as they are written, and its tables too; only `these` are reST."""
    text = "\n".join(lines)
    text = re.sub(r"(`[^`]*`)|([*_|\\])", lambda found: f"{found[1]}\\ " if found[1] else f"\\{found[2]}", text)
    text = re.sub(
        r"(?:^\\\|.*\n?)+",
        lambda table: "::\n\n" + indent(re.sub(r"\\ ?", "", table[0]), "    "),
        text,
        flags=re.MULTILINE,
    )
    lines[:] = text.splitlines()


def without_factory(
    app: Sphinx, what: str, name: str, thing: object, options: object, signature: str, returns: str
) -> tuple:
    """Write a dataclass's made default as `...`: sphinx sets a signature that it can parse, and `<factory>` is none."""
    return signature and signature.replace("<factory>", "..."), returns


class FolderLinks(SphinxPostTransform):
    """Lead links to reports to their copies beside the pages, and links to other folders to the repository."""

    default_priority = 8  # before myst_parser's own, which knows documents and files only

    def run(self, **kwargs: object) -> None:
        here = (ROOT / self.env.docname).parent
        for link in [
            *self.document.findall(addnodes.pending_xref),
            *self.document.findall(addnodes.download_reference),
        ]:
            target = (here / link["reftarget"]).resolve()
            if link.get("reftype") != "myst" or not target.exists():
                continue
            if target.is_relative_to(REPORTS):
                uri = os.path.relpath(target / "index.html" if target.is_dir() else target, here)
            elif target.is_dir():
                uri = f"{PROJECT['urls']['Repository']}/tree/main/{target.relative_to(ROOT)}"
            else:
                continue
            link.replace_self(nodes.reference("", "", *link.children, refuri=uri))


def report_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, object], str]]:
    """Make a page for each folder of results without one: its pictures, its short tables, what else is in it."""
    for folder in filter(Path.is_dir, REPORTS.rglob("*")):
        if (folder / "index.html").exists() or (REPORTS / "runs") in (folder, *folder.parents):
            continue
        body = [f"<h1>{escape(folder.name)}</h1>"]
        links = []
        for path in sorted(folder.iterdir()):
            name = escape(path.name)
            links.append(f'<li><a href="{name}{"/index.html" if path.is_dir() else ""}">{name}</a></li>')
            if path.suffix == ".png":
                body.append(f'<p><img src="{name}" alt="{escape(path.stem)}"></p>')
            elif path.suffix == ".csv" and len(table := pd.read_csv(path)) <= 40:
                html = table.to_html(index=False, border=0, float_format="{:.4g}".format)
                body.append(f'<h2>{escape(path.stem)}</h2><div class="table-wrapper">{html}</div>')
        body += ["<h2>Files</h2>", "<ul>", *links, "</ul>"]
        page = f"{folder.relative_to(ROOT).as_posix()}/index"
        yield page, {"title": folder.name, "body": "\n".join(body)}, "page.html"


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Put beside the pages what they need: the results, MathJax, and README under the name that servers look for."""
    if exception:
        return
    out = Path(app.outdir)
    shutil.copytree(REPORTS, out / "reports", dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs"))
    mathjax = Path(jupyter_server_mathjax.__file__).parent / "static"
    unused = shutil.ignore_patterns("localization", "a11y", "SVG")
    shutil.copytree(mathjax, out / "_static" / "mathjax", dirs_exist_ok=True, ignore=unused)
    shutil.copy(out / f"{root_doc}.html", out / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", read_as_text)
    app.connect("autodoc-process-signature", without_factory)
    app.connect("html-collect-pages", report_pages)
    app.connect("build-finished", finish)
    app.add_post_transform(FolderLinks)
