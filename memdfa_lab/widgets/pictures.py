"""Pictures and tables of the explorers, as HTML.

They are never Output widgets, on which runs without a browser hang (nbclient issue 312).
"""

import base64
import html
import io
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

# No colours but grey: tables are read in light and dark themes. A table that is too wide scrolls by itself.
STYLE = """<style>
.memdfa-explorer .widget-html-content { min-width: 0 }
.memdfa-explorer table { border-collapse: collapse }
.memdfa-explorer :is(th, td) { text-align: right; padding: 2px 8px; white-space: nowrap; line-height: 1.4;
                               border-bottom: 1px solid rgba(128,128,128,0.4) }
</style>"""


def image(figure: Figure, alt: str, margins: Sequence[float], between: Sequence[float]) -> str:
    """Return a figure as HTML. Its margins are given: matplotlib's constrained layout would draw it twice.

    `alt`: the text for those who cannot see it. `margins`: left, bottom, right and top of the panels, in inches: the
    same each time, so that nothing jumps. `between`: the space between panels, in widths and heights of a panel.
    """
    width, height = figure.get_size_inches()
    left, bottom, right, top = margins
    figure.set_layout_engine(None)
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height, *between)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120, pil_kwargs={"compress_level": 1})
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f"<img src='{source}' alt='{html.escape(alt)}' style='width:100%;max-width:900px;background:white'>"


def table(rows: pd.DataFrame) -> str:
    """Return a table of texts as HTML; the texts may contain HTML. The index names the rows."""
    with pd.option_context("display.max_colwidth", None):
        text = rows.rename_axis(index=None, columns=str(rows.index.name)).to_html(escape=False, border=0)
    return f"{STYLE}<div style='overflow-x:auto;margin-bottom:1em'>{text}</div>"


def sparkline(totals: Sequence[int], top: int, at: int | None = None) -> str:
    """Return bytes in memory against time as an SVG, the axis up to `top`; a dot marks the moment `at`."""
    points = [(480 * i / max(len(totals) - 1, 1), 120 - 120 * total / max(top, 1)) for i, total in enumerate(totals)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dot = "" if at is None else '<circle cx="{:.1f}" cy="{:.1f}" r="7" fill="currentColor"/>'.format(*points[at])
    size = 'viewBox="-8 -8 496 136" width="496" height="136" style="max-width:100%;height:auto"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}><title>bytes alive, peak {max(totals):,}</title>'
        f'<polyline points="0,120 {line} 480,120" fill="#80808055" stroke="#808080" stroke-width="2"/>{dot}</svg>'
    )
