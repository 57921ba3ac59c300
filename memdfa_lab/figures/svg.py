"""Parts of a picture as SVG text, and films of them in CSS. The films of a page share their names: `memdfa-NAME`."""

INK, GREY = "#222222", "#707070"
SECONDS, STILL = 10.0, 3.0  # how long a film takes, and the still picture before it and after


def percent(part: float) -> str:
    """Return a time, from 0 to 1 while the film moves, as a percentage of the film including its still picture."""
    return f"{100 * part * SECONDS / (SECONDS + STILL):.2f}%"


def film(name: str, steps: str, timing: str) -> str:
    """Return CSS that moves elements of the class memdfa-NAME through these keyframes, in a loop."""
    played = f"{SECONDS + STILL:g}s {timing} {STILL:g}s infinite"
    return f"@keyframes memdfa-{name}{{{steps}}}.memdfa-{name}{{animation:memdfa-{name} {played}}}"


def box(x: float, y: float, width: float, height: float, fill: str, radius: float = 0) -> str:
    """Return a rectangle."""
    corners = f' rx="{radius}"' if radius else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"{corners} fill="{fill}"/>'


def arrow(path: str, color: str) -> str:
    """Return a path with an arrowhead at its end; `heads` must define one in this colour."""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2.5" marker-end="url(#memdfa-{color[1:]})"/>'


def heads(*colors: str) -> str:
    """Return the heads of arrows in these colours."""
    look = 'viewBox="0 0 8 8" refX="6" refY="4" markerWidth="9" markerHeight="9" markerUnits="userSpaceOnUse"'
    found = [f'<marker id="memdfa-{c[1:]}" {look} orient="auto"><path d="M0 0L8 4L0 8Z" fill="{c}"/>' for c in colors]
    return f"<defs>{'</marker>'.join([*found, ''])}</defs>"


def text(x: float, y: float, words: str, size: int, anchor: str = "start", fill: str = INK, bold: bool = False) -> str:
    """Return a text whose baseline is at y."""
    look = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"' + ' font-weight="bold"' * bold
    return f'<text x="{x:.1f}" y="{y:.1f}" {look}>{words}</text>'
