"""The four rules in one picture: a network, the path of the error through it, and what is in memory at each moment."""

from collections.abc import Sequence
from functools import partial

from torch import nn, optim

from memdfa_lab.core.checks import check_int
from memdfa_lab.core.feedback import Regenerated
from memdfa_lab.core.rules import RULES
from memdfa_lab.figures.lives import SMALL, Bar, lives
from memdfa_lab.figures.style import FILLS, label
from memdfa_lab.figures.svg import GREY, INK, arrow, box, film, heads, percent, text
from memdfa_lab.memory.predict import predict

WAYS = {
    "bp": "error back through the weights",
    "fa": "error back through random B",
    "dfa": "error straight to each layer",
    "memdfa": "keeps nothing, runs twice",
}
DIRECT = ("dfa", "memdfa")
TEXT = (
    "Four panels, BP, FA, DFA and MEM-DFA: a network, the path of its error, and bars that show how long each layer's "
    "tensors are in memory. BP and FA send the error back layer by layer, DFA and MEM-DFA straight to each layer. All "
    "but MEM-DFA keep every activation until the error arrives; MEM-DFA keeps two. Predicted peak, in activations: "
    "{peaks}."
)
WIDTH, PANEL, GAP = 800, 394, 12  # of the picture, of a panel, and between panels
TOP, ROW, AREA, AXIS = 44, 26, 66, 32  # heights: title, a layer, the bytes over time, the axis
BOX, WIDE, TALL = 44, 50, 19  # left edge, width and height of a layer's box
START, STOP = 166, 382  # horizontal places of the first and the last time
ERROR, ALIVE = FILLS["error"][0], FILLS["activations"][0]
BARS = {"activations": (2, 13), "error": (16, 4), "gradients": (21, 4)}  # their place in a row, and their thickness
LEGEND = {"activations": ("activations", 126), "error": ("error, signals", 146), "gradients": ("gradients", 0)}
NOTE = "predicted, in activations and forward passes"


def algorithm(layers: int = 4, units: int = 256, batch: int = 1024) -> str:
    """Return an SVG, 800 wide, of one step of each rule; browsers animate it.

    Each panel shows the network and the paths of the error; to the right of each layer, the lifetimes of the tensors
    that it makes; and below them the bytes at each moment. All numbers are predicted, for plain SGD and regenerated B.
    Peaks are in activations of a hidden layer; time is in forward passes, by multiply-adds.

    The picture in README is `python -c "import memdfa_lab as ml; print(ml.figures.algorithm())" > reports/memdfa.svg`.

    `layers`: how many hidden layers there are, 1 to 8, of `units` each, before an output layer of 10. Raises ValueError
    for another number.
    """
    check_int("layers", layers, 1, 8)
    check_int("units", units)
    net, size = partial(_network, layers, units), 4 * units * batch
    optimizer, feedback = partial(optim.SGD, lr=0.1), Regenerated(0)
    traces = {rule: predict(rule, net, (batch, units), optimizer, feedback) for rule in RULES}
    steps = {rule: lives(trace, layers + 1) for rule, trace in traces.items()}
    longest = max(bar.end for bars in steps.values() for bar in bars)
    highest = max(trace.peak_bytes for trace in traces.values()) / size
    height = TOP + ROW * (layers + 2) + AREA + AXIS
    parts, moves = [], [film("veil", f"0%{{opacity:.7}}{percent(1)},100%{{opacity:0}}", "step-end")]
    for place, (rule, bars) in enumerate(steps.items()):
        panel = _Panel(rule, bars, layers + 1, size, longest, highest)
        x, y = place % 2 * (PANEL + GAP), place // 2 * (height + GAP)
        parts.append(f'<g transform="translate({x} {y})">{panel.draw(height)}</g>')
        moves += panel.moves()
    total = 2 * height + GAP + 34
    alt = TEXT.format(peaks=", ".join(f"{label(rule)} {t.peak_bytes / size:.1f}" for rule, t in traces.items()))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" width="{WIDTH}" height="{total}" '
        f'style="max-width:100%;height:auto" class="memdfa" role="img" aria-label="{alt}"><style>'
        f".memdfa text{{font-family:Helvetica,Arial,sans-serif}}@media (prefers-reduced-motion:no-preference)"
        f"{{{''.join(moves)}}}</style>{heads(GREY, ERROR)}{box(0, 0, WIDTH, total, '#ffffff')}{''.join(parts)}"
        f"{_legend(total - 12)}</svg>"
    )


def _network(layers: int, units: int) -> nn.Sequential:
    hidden = [nn.Sequential(nn.Linear(units, units), nn.ReLU()) for _ in range(layers)]
    return nn.Sequential(*hidden, nn.Linear(units, 10))


class _Panel:
    """One rule's network, bars and bytes, drawn in a box of its own."""

    def __init__(self, rule: str, bars: Sequence[Bar], blocks: int, size: int, longest: float, highest: float):
        self.rule, self.bars, self.blocks, self.size, self.longest = rule, bars, blocks, size, longest
        self.base = TOP + ROW * (blocks + 1)  # below the rows
        self.floor, self.unit = self.base + AREA, (AREA - 8) / highest / size  # y of 0 bytes, height of one byte
        self.times = sorted({time for bar in bars for time in (bar.born, bar.end)})
        self.held = [sum(bar.size_bytes for bar in self.alive(time)) for time in self.times]
        self.peak = self.times[self.held.index(max(self.held))]

    def alive(self, time: float, category: str = "") -> list[Bar]:
        return [bar for bar in self.bars if bar.born <= time < bar.end and category in (bar.category, "")]

    def x(self, time: float) -> float:
        return START + (STOP - START) * time / self.longest

    def y(self, row: int) -> float:
        """Return y at the middle of a layer's row; row `blocks`, at the top, is the loss's."""
        return self.base - ROW * (row + 0.5)

    def draw(self, height: float) -> str:
        edge = f'stroke="{INK}" stroke-width="2.5"' if self.rule == "memdfa" else 'stroke="#cccccc"'
        frame = f'<rect x="1.5" y="1.5" width="{PANEL - 3}" height="{height - 3}" rx="8" fill="none" {edge}/>'
        title = text(14, 31, label(self.rule), 26, bold=True) + text(STOP, 30, WAYS[self.rule], 17, "end", GREY)
        return frame + title + self.lifetimes() + self.memory() + self.clock() + self.network()

    def lifetimes(self) -> str:
        """Return a bar for each tensor: thick for activations, below them signals and gradients; thin if small."""
        rows = range(self.blocks + 1)
        parts = [f'<path d="M{START} {self.y(row) + ROW / 2}H{STOP}" stroke="#eeeeee"/>' for row in rows]
        for row, category, size_bytes, born, end in self.bars:
            if category in BARS:
                top, tall = (10, 6) if row == self.blocks else BARS[category]
                tall = tall if 16 * size_bytes > self.size or row == self.blocks else 2
                wide = max(self.x(end) - self.x(born), 2)
                parts.append(box(self.x(born), self.y(row) - ROW / 2 + top, wide, tall, FILLS[category][0]))
        return "".join(parts)

    def memory(self) -> str:
        """Return the bytes over time, stacked by category, and the peak as a number."""
        parts: list[str] = []
        total = [0] * len(self.times)
        for category, (color, _) in FILLS.items():
            sizes = [sum(bar.size_bytes for bar in self.alive(time, category)) for time in self.times]
            total = [below + size for below, size in zip(total, sizes, strict=True)]
            tops = [f"{self.floor - size * self.unit:.1f}" for size in total]
            turns = zip(self.times, tops, ["", *tops], strict=False)
            steps = "".join(f"H{self.x(time):.1f}V{top}" for time, top, before in turns if top != before)
            parts += [f'<path d="M{START} {self.floor}{steps}Z" fill="{color}"/>'] if any(sizes) else []
        parts.reverse()  # the highest is the lowest layer of paint
        top = self.floor - max(self.held) * self.unit
        to_peak = f"M{START - 8} {top:.1f}H{self.x(self.peak):.1f}"
        parts.append(f'<path d="{to_peak}" stroke="{INK}" stroke-dasharray="3 3"/>')
        parts.append(f'<path d="M{START} {self.floor}H{STOP}" stroke="{INK}"/>')
        number = f"{max(self.held) / self.size:.1f}"
        parts.append(text(START - 14, self.floor - 1, number, 34, "end", bold=True))
        return "".join(parts) + text(14, self.floor - 1, "peak", 18, fill=GREY)

    def clock(self) -> str:
        """Return the time axis, and the line that moves along it; the future is drawn pale."""
        parts = [text(START - 14, self.floor + 22, "time", 17, "end", GREY)]
        one = self.blocks - 1 + SMALL  # a forward pass
        for number in range(1, int(self.longest / one) + 1):
            x = self.x(number * one)
            parts.append(f'<path d="M{x:.1f} {self.floor}v5" stroke="{INK}"/>')
            parts.append(text(x, self.floor + 22, str(number), 17, "middle", GREY))
        wide, tall = STOP - START + 4, self.floor - TOP
        line = f'<g {self.named("line")} style="{self.shifted(self.peak)}">'
        line += f'<rect class="memdfa-veil" x="2" width="{wide}" height="{tall}" fill="#ffffff" opacity="0"/>'
        line += f'<rect width="2" height="{tall}" fill="{INK}"/></g>'
        parts.append(f'<svg x="{START - 1}" y="{TOP}" width="{wide}" height="{tall}">{line}</svg>')
        return "".join(parts)

    def network(self) -> str:
        """Return the layers as boxes, filled while their activation is in memory, and the paths between them."""
        parts, middle, top = [], BOX + WIDE / 2, self.y(self.blocks)
        for number, x in enumerate((BOX - 29, BOX - 13) if self.rule == "memdfa" else (BOX - 13,), 1):
            name = text(x, self.base + 15, str(number), 16, "middle", GREY) if self.rule == "memdfa" else ""
            parts.append(f"<g {self.named('pass', number)}>{arrow(f'M{x} {self.base - 1}V{top - 1}', GREY)}{name}</g>")
        parts.append(f'<path d="M{middle} {self.base + 4}V{top}" stroke="{GREY}" stroke-width="2"/>')
        parts.append(text(middle, self.base + 16, "x", 18, "middle"))
        ways = {row: self.way(row) for row in range(self.blocks)}
        parts.append(f'<g opacity="0.25">{"".join(ways.values())}</g>')  # pale, where no error is on its way
        parts += [f"<g {self.named('way', row)}>{way}</g>" for row, way in ways.items()]
        for row in range(self.blocks):
            look = f'x="{BOX}" y="{self.y(row) - TALL / 2}" width="{WIDE}" height="{TALL}" rx="4" stroke-width="1.5"'
            lit, name = self.is_on(self.peak, self.shown()["box", row]), f"h{chr(0x2081 + row)}"
            parts.append(f'<rect {look} fill="#ffffff" stroke="{GREY}"/>')
            parts.append(text(middle, self.y(row) + 5.5, name, 17, "middle"))
            on = f'<rect {look} fill="{ALIVE}" stroke="{ALIVE}"/>'
            on += text(middle, self.y(row) + 5.5, name, 17, "middle", "#ffffff")
            parts.append(f'<g {self.named("box", row)} opacity="{int(lit)}">{on}</g>')
        circle = f'<circle cx="{middle}" cy="{top}" r="11" stroke="{ERROR}" stroke-width="1.5" fill='
        parts.append(f'{circle}"#ffffff"/>{circle}"{ERROR}" {self.named("e", 0)}/>')
        return "".join(parts) + text(middle, top + 5, "e", 18, "middle")

    def way(self, row: int) -> str:
        """Return the path of the error to a layer, with the matrix on it."""
        right, direct, last = BOX + WIDE, self.rule in DIRECT, row == self.blocks - 1
        bus, begin = right + (52 if direct else 34), self.y(self.blocks if direct else row + 1)
        end = self.y(row) - (0 if direct else 5)
        begin, start = (begin, right - 14) if direct or last else (begin + 5, right)
        parts = [arrow(f"M{start} {begin}H{bus}V{end}H{right + 3}", ERROR)]
        if not last:
            color, letter = ("#dddddd", "W") if self.rule == "bp" else (FILLS["feedback"][0], "B")
            x, y = (right + 32, end) if direct else (bus, (begin + end) / 2)
            parts += [box(x - 9, y - 8, 18, 16, color, 3), text(x, y + 5.5, letter, 15, "middle")]
        return "".join(parts)

    def spans(self, row: int, category: str) -> list[tuple[float, float]]:
        """Return when a layer has a tensor of that kind in memory, in time."""
        joined: list[tuple[float, float]] = []
        ours = [bar for bar in self.bars if (bar.row, bar.category) == (row, category)]
        for bar in sorted(ours, key=lambda bar: bar.born):
            begin, end = joined.pop() if joined and bar.born <= joined[-1][1] else (bar.born, bar.end)
            joined.append((begin, max(end, bar.end)))
        return joined

    def shown(self) -> dict[tuple[str, int], list[tuple[float, float]]]:
        """Return when each part of the network is lit: a box, a way, e, a pass."""
        last, ((e, end),) = self.blocks - 1, self.spans(self.blocks, "error")
        found = {("e", 0): [(e, end)], ("pass", 1): [(0.0, e)], ("pass", 2): [(e, end)]}
        for row in range(self.blocks):
            found["box", row] = self.spans(row, "activations")
            if self.rule in DIRECT:
                signal = self.spans(row, "gradients" if row == last else "error")  # a slice at a time
                found["way", row] = [(signal[0][0], signal[-1][1])]
            elif row == last:
                found["way", row] = [(e, self.spans(row, "error")[0][0])]
            else:
                found["way", row] = self.spans(row + 1, "error")
        return found

    def moves(self) -> list[str]:
        """Return the keyframes of the film."""
        found, whole = [], percent(1)
        for (kind, number), spans in self.shown().items():
            off = 0.25 if kind == "pass" else 0
            still = int(self.is_on(self.peak, spans)) if kind in ("box", "e") else 1
            times = [(0.0, off), *((time, seen) for span in spans for time, seen in zip(span, (1, off), strict=True))]
            steps = "".join(f"{percent(time / self.longest)}{{opacity:{seen}}}" for time, seen in times)
            found.append(film(f"{self.rule}-{kind}{number}", f"{steps}{whole}{{opacity:{still}}}", "step-end"))
        end = max(self.times)
        steps = f"0%{{transform:none}}{percent(end / self.longest)},{percent(0.999)}{{{self.shifted(end)}}}"
        return [*found, film(f"{self.rule}-line", f"{steps}{whole},100%{{{self.shifted(self.peak)}}}", "linear")]

    def is_on(self, time: float, spans: Sequence[tuple[float, float]]) -> bool:
        return any(born <= time < end for born, end in spans)

    def shifted(self, time: float) -> str:
        return f"transform:translateX({self.x(time) - START:.1f}px)"

    def named(self, kind: str, number: int | str = "") -> str:
        return f'class="memdfa-{self.rule}-{kind}{number}"'


def _legend(y: float) -> str:
    parts, x = [text(WIDTH - 14, y, NOTE, 17, "end", GREY)], 14
    for category, (name, wide) in LEGEND.items():
        parts += [box(x, y - 12, 15, 13, FILLS[category][0]), text(x + 21, y, name, 17)]
        x += wide
    return "".join(parts)
