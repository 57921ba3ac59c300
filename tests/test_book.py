"""What is read beside the code: links lead somewhere, references are right, words are spelt, pages stand alone."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import codespell_lib
import pytest

import memdfa_lab as ml
from memdfa_lab.batch.sweep_file import from_yaml

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

# A new host is added here after a look at what it is: a mistyped one is how a link breaks unseen.
HOSTS = {"arxiv.org", "colab.research.google.com", "doi.org", "docs.pytorch.org", "github.com", "keepachangelog.com"}
HOSTS |= {"mybinder.org", "www.cs.toronto.edu"}
ARXIV = re.compile(r"\d{4}\.\d{4,5}")
DOI = re.compile(r"10\.\d{4,9}/[\w.()/:-]*\w")


def markdown(path):
    """Return the text of a Markdown file, or of a notebook's Markdown cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def prose(text):
    """Return the text without code."""
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def links(text):
    """Return where each link and picture leads."""
    found = re.findall(r"""\]\(\s*<?([^\s)>]+)|(?:href|src)="([^"]+)""", prose(text))
    return [markdown or html for markdown, html in found]


def docstrings(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    return "\n\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))


REPORTS = [path for path in (ROOT / "reports").rglob("*.md") if "runs" not in path.relative_to(ROOT).parts]
BOOK = sorted((ROOT / "notebooks" / "book").glob("*.md"))
TEXTS = {path: markdown(path) for path in [*ROOT.glob("*.md"), *BOOK, *REPORTS, *NOTEBOOKS]}
DOCSTRINGS = {path: docstrings(path) for path in sorted((ROOT / "memdfa_lab").rglob("*.py"))}


def wrong_in(texts, look):
    """Return what look(path, text) finds wrong, by the name of the file, for the files in which it finds something."""
    found = {path.relative_to(ROOT).as_posix(): look(path, text) for path, text in texts.items()}
    return {name: wrong for name, wrong in found.items() if wrong}


# links


def wrong_links(path, text):
    """Return what is wrong with each link of a text, a line a link."""
    labels = re.findall(r"\[arXiv:([^\]]*)\]\(https://arxiv\.org/abs/([^)]*)\)", prose(text))
    wrong = [f"[arXiv:{label}] leads to {number}" for label, number in labels if label != number]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)|<img[^>]*src=\"([^\"]+)", prose(text))
    wrong += [f"{one}: a picture that is missing without a network" for two in pictures for one in two if "://" in one]
    for target in links(text):
        url = urlsplit(target)
        if not url.scheme:
            if url.path and not (path.parent / unquote(url.path)).exists():
                wrong.append(f"{target}: no such file")
        elif url.scheme != "https" or url.hostname not in HOSTS:
            wrong.append(f"{target}: not https, or a host that HOSTS does not have")
        elif url.hostname == "arxiv.org" and not ARXIV.fullmatch(url.path.removeprefix("/abs/")):
            wrong.append(f"{target}: not https://arxiv.org/abs/NUMBER")
        elif url.hostname == "doi.org" and not DOI.fullmatch(url.path[1:]):
            wrong.append(f"{target}: not a DOI")
        elif target.startswith(f"{REPOSITORY}/blob/main/") and not (ROOT / target.split("/blob/main/")[1]).exists():
            wrong.append(f"{target}: no such file in the repository")
    return wrong


def test_links_lead_somewhere():
    assert wrong_in(TEXTS, wrong_links) == {}


@pytest.mark.parametrize(
    "link",
    [
        "[![a](reports/no.png)](README.md)",
        '<img src="reports/no.png">',
        "[a](http://arxiv.org/abs/2012.11745)",
        "[a](https://arxiv.org/pdf/2012.11745)",
        "[arXiv:2012.11746](https://arxiv.org/abs/2012.11745)",
        "[a](https://arxiv.org.example.com/abs/2012.11745)",
        f"![a]({REPOSITORY}/a.png)",
        "[a](https://doi.org/ncomms13276)",
        f"[a]({REPOSITORY}/blob/main/no.md)",
    ],
)
def test_a_wrong_link_would_be_noticed(link):
    assert len(wrong_links(ROOT / "README.md", f"Some text, {link}. Code is not a link: `{link}`.")) == 1


# references


def further_reading(path):
    """Return the entries of a notebook's list, each on one line."""
    section = re.split(r"^## Further reading$", TEXTS[path], flags=re.MULTILINE)[1]
    entries = re.findall(r"^- (.*?)(?=^- |^$|\Z)", section, re.MULTILINE | re.DOTALL)
    return [" ".join(entry.split()) for entry in entries]


def test_each_reference_has_a_link_and_a_work_has_the_same_one_everywhere():
    citation = from_yaml(CITATION)
    assert citation["repository-code"] == REPOSITORY
    found = {
        one["title"].lower(): {one.get("url") or f"https://doi.org/{one['doi']}"} for one in citation["references"]
    }
    for path in NOTEBOOKS:
        assert further_reading(path), path
        for entry in further_reading(path):
            assert any("://" in target for target in links(entry)), entry
            if title := re.search(r"\*([^*]+)\*", entry):
                found.setdefault(title[1].strip(" .").lower(), set()).update(links(entry))
    assert {title: urls for title, urls in found.items() if len(urls) > 1} == {}


def test_a_number_that_is_named_is_one_of_a_listed_work():
    """An arXiv number or DOI in running text is that of CITATION.cff or of some notebook's further reading."""
    listed = CITATION + "".join(entry for notebook in NOTEBOOKS for entry in further_reading(notebook))

    def unlisted(path, text):
        numbers = re.findall(r"arxiv[:./ \n]+(?:abs/)?([\d.]*\d)", text, flags=re.IGNORECASE) + DOI.findall(text)
        return [one for one in numbers if one not in listed or not (ARXIV.fullmatch(one) or DOI.fullmatch(one))]

    assert wrong_in(TEXTS | DOCSTRINGS, unlisted) == {}


def test_the_first_cell_opens_the_notebook_elsewhere():
    for path in NOTEBOOKS:
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        name = REPOSITORY.removeprefix("https://github.com/")
        colab = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name}"
        binder = f"https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/notebooks/{path.name}"
        assert {colab, binder} <= set(links("".join(first["source"]))), path


# spelling


def test_spelling(tmp_path):
    """Each text is written under its own name for codespell, and one misspelt word, which it must find."""
    code = [*(ROOT / "memdfa_lab").rglob("*.py"), *(ROOT / "tests").glob("*.py")]
    texts = TEXTS | {path: path.read_text(encoding="utf-8") for path in code}
    for path, text in (texts | {ROOT / "probe": "the gradi" + "ant of a loss"}).items():
        target = tmp_path / f"{path.relative_to(ROOT)}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert "probe.txt" in line


def test_spelling_is_british():
    """But for `optimizer`, which is torch's word and the package's parameter; code is not looked at."""
    pairs = (Path(codespell_lib.__file__).parent / "data" / "dictionary_en-GB_to_en-US.txt").read_text(encoding="utf-8")
    american = dict(reversed(line.split("->")) for line in pairs.splitlines())
    assert american["normalize"] == "normalise"

    def american_words(path, text):
        text = re.sub(r"\]\([^)]*\)|https?://\S+", "", prose(text))
        return (set(re.findall(r"[a-z]+", text.lower())) - {"optimizer", "optimizers"}) & american.keys()

    assert wrong_in(TEXTS | DOCSTRINGS, american_words) == {}


# the chart to turn


PEAKS = runpy.run_path(str(ROOT / "notebooks" / "book" / "peaks.py"))
DATA = json.loads(PEAKS["DATA"].read_text(encoding="utf-8").removeprefix("const PEAKS = ").removesuffix(";\n"))
SETTINGS = [(optimizer, width) for optimizer in PEAKS["OPTIMIZERS"] for width in PEAKS["WIDTHS"]]


def test_the_chart_has_the_peaks_of_the_closed_forms():
    for optimizer, width in SETTINGS:
        for rule in PEAKS["CLOSED"]:
            assert DATA["peaks"][rule][f"{optimizer} {width}"] == PEAKS["closed"](rule, optimizer, width)
            assert DATA["rest"][rule][f"{optimizer} {width}"] == PEAKS["resting"](rule, optimizer, width)


def test_the_chart_has_the_peaks_that_are_predicted():
    """One of each table's numbers in turn."""
    for i, (rule, (optimizer, width)) in enumerate((rule, setting) for rule in DATA["peaks"] for setting in SETTINGS):
        depth, batch = i % 5, (3 * i) % len(DATA["batches"])
        found = PEAKS["predicted"](rule, optimizer, width, DATA["depths"][depth], DATA["batches"][batch])
        assert DATA["peaks"][rule][f"{optimizer} {width}"][depth][batch] == found, (rule, optimizer, width)


@contextmanager
def on_a_telephone(page):
    """Yield this page as a browser 390 pixels wide shows it, if there is one; nothing may fail or stick out."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800})
        wrong = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(page.as_uri())
        yield tab
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        browser.close()
    assert wrong == []


def turn(page):
    """Turn the chart on this page, and return the table's bytes before and after."""
    with on_a_telephone(page) as tab:

        def peaks():
            rows = tab.locator("#peaks tbody tr")
            return {row.get_attribute("data-rule"): int(row.get_attribute("data-peak")) for row in rows.all()}

        before = peaks()
        tab.get_by_label("Hidden layers:").press("ArrowLeft")
        tab.get_by_label("Batch:").press("Home")
        tab.get_by_label("1,024").check()
        tab.get_by_label("Adam").check()
        tab.get_by_label("DFA", exact=True).uncheck()
        after, caption = peaks(), tab.locator("#peaks-caption").inner_text()
        assert tab.get_by_label("Hidden layers:").get_attribute("aria-valuetext") == "32"
        assert tab.locator("#peaks-lines polyline").count() == len(after)
    return before, after, caption


# the pages


class Page(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.leads = [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "a" and "href" in values:
            self.leads.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("next", "prev", "index", "search", "canonical"):
            self.loads.append(values["href"])
        elif values.get("src"):
            self.loads.append(values["src"])


@pytest.mark.slow
def test_the_book(tmp_path, subtests):
    """One test, so that the book is built once."""
    for name in ("sphinx", "myst_nb", "furo", "jupyter_server_mathjax"):
        pytest.importorskip(name, reason='the book needs pip install -e ".[book]"')
    book = tmp_path / "book"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees")]
    command += ["-c", "notebooks/book", ".", str(book)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    with subtests.test("it is built without a warning"):
        assert done.returncode == 0, done.stderr
    made = [path for path in book.rglob("*.html") if not (ROOT / path.relative_to(book)).exists()]  # not copied
    aside = (book / "_static", book / "_downloads")  # executed notebooks to download load MathJax from outside
    pages = {path: Page(path) for path in made if not any(map(path.is_relative_to, aside))}

    with subtests.test("README is the landing page and leads to a page for each notebook"):
        assert "<h1>memdfa_lab" in (book / "index.html").read_text(encoding="utf-8")
        assert {f"notebooks/{path.stem}.html" for path in NOTEBOOKS} <= set(pages[book / "index.html"].leads)

    with subtests.test("no page loads anything from elsewhere"):
        for path, page in pages.items():
            for target in page.loads:
                url = urlsplit(target)
                assert url.scheme == "data" or not (url.scheme or url.netloc), f"{path.name} loads {target}"
                assert url.scheme == "data" or (path.parent / unquote(url.path)).is_file(), f"{path.name}: no {target}"

    with subtests.test("links between pages lead to files; a folder, opened from disk, would be a list"):
        for path, page in pages.items():
            for url in map(urlsplit, page.leads):
                if not url.scheme and url.path:
                    assert (path.parent / unquote(url.path)).is_file(), f"{path.name}: no {url.path}"

    with subtests.test("maths is left to MathJax, which is there; solutions are folded, their code is highlighted"):
        for path in NOTEBOOKS:
            text = (book / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
            assert "_static/mathjax/MathJax.js?config=" in text or 'class="math' not in text
            folded = re.findall(r"<details>.*?</details>", text, flags=re.DOTALL)
            assert len(folded) == TEXTS[path].count("<details>")
            written = [one for one in TEXTS[path].split("<details>")[1:] if "```python" in one]
            assert sum("highlight-python" in one for one in folded) == len(written)

    with subtests.test("it can be searched"):
        index = (book / "searchindex.js").read_text(encoding="utf-8")
        assert (book / "search.html").is_file()
        assert all(f'"{path.relative_to(ROOT).with_suffix("").as_posix()}"' in index for path in (*NOTEBOOKS, *BOOK))

    with subtests.test("the chart turns, by the keyboard, without a kernel"):
        before, after, caption = turn(book / "notebooks" / "book" / "peaks.html")
        depth, batch = DATA["depths"].index(64), DATA["batches"].index(2048)
        assert before == {rule: table["sgd 256"][depth][batch] for rule, table in DATA["peaks"].items()}
        assert caption == "Predicted, one step of 784-[1024]x32-10 at batch 8, Adam"
        left = {rule: table["adam 1024"][depth - 1][0] for rule, table in DATA["peaks"].items() if rule != "dfa"}
        assert after == left

    with subtests.test("figures can be read on a telephone: an inch (150 pixels of a file) has 72 pixels"):
        with on_a_telephone(book / "notebooks" / "04_memory_profiles.html") as tab:
            shown = "images => images.map(image => image.getBoundingClientRect().width / image.naturalWidth * 150)"
            inches = tab.locator(".cell_output img[src$='.png']").evaluate_all(shown)
        assert len(inches) > 5
        assert min(inches) >= 72

    with subtests.test("the reference has the public names, and the signatures of classes and functions"):
        text = (book / "notebooks" / "book" / "api.html").read_text(encoding="utf-8")
        public = {name: getattr(ml, name) for name in (*ml.__all__, *ml.LATER)}
        ids = {n: f"module-{x.__name__}" if isinstance(x, ModuleType) else f"memdfa_lab.{n}" for n, x in public.items()}
        assert [name for name, target in ids.items() if f'id="{target}"' not in text] == []
        for name, thing in public.items():
            if callable(thing):
                heading = text.split(f'id="memdfa_lab.{name}"')[1].split("</dt>")[0]
                assert 'class="sig-paren"' in heading, name
