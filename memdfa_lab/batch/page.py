"""One page for a run folder: index.html with the notebooks' figures and tables; no server, no JavaScript needed."""

import csv
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from memdfa_lab.lab.files import write_text

ROWS, COLUMNS = 30, 12  # of a table on the page; a larger one is linked to
MARKS = {"done": "✓", "failed": "✗", "running": "…", "interrupted": "–", "waiting": "·"}
SIGNS = {"times": "×", "cdot": "·", "odot": "⊙", "sqrt": "√", "approx": "≈", "le": "≤", "ge": "≥", "pm": "±", "to": "→"}
SIGNS |= {"delta": "δ", "theta": "θ", "partial": "∂", "top": "T", "dots": "…", "infty": "∞", "sum": "Σ"}
SIGNS |= {"mathrm": "", "text": "", ",": " ", ";": " ", "!": ""}
STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6370; --page: #fff; --line: #d8dce2; --box: #f5f6f8;
  --link: #0b5cad; --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a2a9b4; --page: #16181c; --line: #383d46;
  --box: #20242a; --link: #7db7ff; --good: #5fd07f; --bad: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 54rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; line-height: 1.25; margin: 3.5rem 0 .3rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { margin: .4rem 0; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
main span, td span { white-space: nowrap; }
.done { color: var(--good); } .failed, .interrupted { color: var(--bad); }
.error { border-left: 4px solid var(--bad); background: var(--box); padding: .6rem .9rem; margin: 1rem 0; }
figure { margin: 1rem 0 1.8rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem; }
figcaption { margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { vertical-align: bottom; border-bottom-width: 2px; }
.number { text-align: right; }
td.number { white-space: nowrap; }
pre { overflow-x: auto; background: var(--box); padding: .7rem .9rem; border-radius: 6px; font-size: .85rem; }
summary { cursor: pointer; }
"""


def write_page(out: Path, run: dict[str, Any]) -> None:
    """Write index.html from what is in the run folder and what run.json says of it."""
    rows, sections = [], []
    for name, record in run["notebooks"].items():
        cells = _cells(out / f"{name}.ipynb")
        title = next((c["source"].splitlines()[0].lstrip("# ") for c in cells if c["source"].startswith("# ")), name)
        status, took = record["status"], f"{record['seconds']:.0f} s" if "seconds" in record else ""
        shown = f'<span class="{status}">{MARKS[status]} {status}</span>'
        linked = f'<a href="#{name}">{_prose(title)}</a>' if cells else _prose(title)
        rows.append(f'<tr><td>{linked}</td><td>{shown}</td><td class="number">{took}</td></tr>')
        if cells:
            error = f'<p class="error">Stopped in {escape(record["error"])}</p>' if "error" in record else ""
            sections.append(
                f'<section id="{name}"><h2>{_prose(title)}</h2>'
                f'<p class="soft">{shown} {took} · <a href="{name}.ipynb">executed notebook</a></p>{error}'
                f"{_settings(cells)}{''.join(_contents(out, name, cells))}</section>"
            )
    given = ", ".join(f"{name} = {value!r}" for name, value in run["parameters"].items())
    done = sum(record["status"] == "done" for record in run["notebooks"].values())
    write_text(
        out / "index.html",
        f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>memdfa_lab: {done} of {len(rows)} notebooks</title><style>{STYLE}</style></head>
<body>
<header><h1>What the notebooks show</h1>
<p>{done} of {len(rows)} notebooks done. Parameters: {escape(given) or "as they are in the notebooks"}.</p>
<p class="soft">{escape(run["versions"])}</p>
<div class="wide"><table><thead><tr><th>notebook</th><th>status</th><th class="number">time</th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div></header>
<main>{"".join(sections)}</main>
</body>
</html>
""",
    )


def _cells(notebook: Path) -> list[Any]:
    import nbformat

    return nbformat.read(notebook, as_version=4).cells if notebook.exists() else []


def _settings(cells: list[Any]) -> str:
    """Show the parameters and what was put in their place."""
    tags = ("parameters", "injected-parameters")
    code = "\n".join(cell.source for cell in cells if set(tags) & set(cell.metadata.get("tags", ())))
    lines = [line for line in code.splitlines() if line.strip() and not re.match(r"out\b|# Parameters", line)]
    text = escape("\n".join(lines))
    return f"<details><summary>Settings</summary><pre>{text}</pre></details>" if lines else ""


def _contents(out: Path, name: str, cells: list[Any]) -> Iterator[str]:
    """Give the notebook's figures and tables in its own order, each under its heading."""
    tables = {path.stem.removeprefix(f"{name}-"): path for path in sorted(out.glob(f"{name}-*.csv"))}
    heading = ""
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if cell.cell_type == "markdown" and (found := re.search(r"^## (.+)$", cell.source, re.MULTILINE)):
            heading = f"<h3>{_prose(found[1])}</h3>"
        caption = after.source.split("\n\n")[0].strip() if after is not None and after.cell_type == "markdown" else ""
        caption = caption[1:-1] if re.fullmatch(r"\*[^*].*\*", caption, re.DOTALL) else ""
        abouts = [output.get("metadata", {}).get("image/png", {}) for output in cell.get("outputs", [])]
        figures = [about for about in abouts if "name" in about and (out / f"{about['name']}.svg").exists()]
        here = [tables.pop(table) for table in list(tables) if f'"{table}"' in cell.source]
        shown = [_table(path, "" if figures else caption) for path in here]
        shown += [_figure(about["name"], about.get("alt", ""), caption) for about in figures]
        if shown:
            yield heading + "".join(shown)
            heading = ""
    yield from map(_table, tables.values())  # those whose name no cell spells out


def _figure(file: str, alt: str, caption: str) -> str:
    return (
        f'<figure><a href="{escape(file)}.svg"><img src="{escape(file)}.svg" alt="{escape(alt)}" loading="lazy"></a>'
        f"<figcaption>{_prose(caption)} "
        f'<a href="{escape(file)}.svg">svg</a> <a href="{escape(file)}.png">png</a></figcaption></figure>'
    )


def _table(path: Path, caption: str = "") -> str:
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    words = _prose(caption) or f"Table {escape(path.stem.partition('-')[2].replace('_', ' '))}:"
    link = f'<a href="{escape(path.name)}">csv</a>'
    if len(rows) > ROWS or len(head) > COLUMNS:
        return f'<p class="soft">{words} {len(rows)} rows, {len(head)} columns, {link}</p>'
    numeric = [all(_number(row[i].rstrip("%")) is not None for row in rows if row[i]) for i in range(len(head))]
    head = [name.replace("_", " ") for name in head]
    body = "".join(f"<tr>{_row(row, numeric, 'td')}</tr>" for row in rows)
    return (
        f'<figure><figcaption>{words} {link}</figcaption><div class="wide"><table><thead><tr>'
        f"{_row(head, numeric, 'th')}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _row(cells: list[str], numeric: list[bool], tag: str) -> str:
    kinds = [' class="number"' if kind else "" for kind in numeric]
    return "".join(f"<{tag}{kind}>{_short(cell)}</{tag}>" for cell, kind in zip(cells, kinds, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _short(text: str) -> str:
    """Show whole numbers as they are, others with four digits, commas in long ones."""
    value = _number(text)
    if value is None:
        return escape(text)
    return f"{value:,.0f}" if abs(value) >= 1000 or value.is_integer() else f"{value:.4g}"


def _prose(markdown: str) -> str:
    """Turn the markup of captions and headings into HTML: code, emphasis, links, and simple mathematics."""
    text = escape(" ".join(markdown.split()), quote=False)
    text = re.sub(r"\$(.+?)\$", lambda found: _mathematics(found[1]), text)
    text = re.sub(r"`(.+?)`", r"<code>\1</code>", text)
    text = re.sub(r"\[(.+?)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\*(.+?)\*", r"<em>\1</em>", text)


def _mathematics(tex: str) -> str:
    tex = re.sub(r"\\([A-Za-z]+|[,;!])", lambda found: SIGNS.get(found[1], found[1]), tex)
    for mark, tag in (("_", "sub"), (r"\^", "sup")):
        tex = re.sub(mark + r"\{(.+?)\}", rf"<{tag}>\1</{tag}>", tex)
        tex = re.sub(mark + r"(\w)", rf"<{tag}>\1</{tag}>", tex)
    return "<i>" + " ".join(re.sub("[{}]", "", tex).replace("√ ", "√").split()) + "</i>"
