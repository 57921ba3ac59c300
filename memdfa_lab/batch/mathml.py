"""Mathematics in TeX as MathML, which browsers draw without a script: as much of TeX as the notebooks use."""

import re
from html import escape
from html.entities import html5

TEXT = re.compile(r"\\(text|mathrm|operatorname) *(?:\{([^{}]*)\}|(\w))")
TOKEN = re.compile(rf"{TEXT.pattern}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S")
# command -> its element, with a place for each argument
ELEMENTS = dict.fromkeys(("frac", "tfrac"), "<mfrac>{}{}</mfrac>") | {
    "sqrt": "<msqrt>{}</msqrt>",
    "underbrace": "<munder>{}<mo>⏟</mo></munder>",
    "hat": '<mover accent="true">{}<mo>^</mo></mover>',
    "dot": '<mover accent="true">{}<mo>˙</mo></mover>',
    **dict.fromkeys(("mathrel", "big", "Big"), "{}"),
    "displaystyle": "<mrow></mrow>",
}
SPACES = {",": 0.17, ";": 0.28, "!": -0.17, " ": 0.25, "quad": 1, "qquad": 2}  # em
ELEMENTS |= {name: f'<mspace width="{width}em"></mspace>' for name, width in SPACES.items()}
ELEMENTS |= {name: f"<mi>{name}</mi>" for name in ("max", "min", "cos", "sin", "log", "exp")}
SIGNS = {"cdot": "·", "cdots": "⋯", "dots": "…", "infty": "∞", "partial": "∂", "to": "→"}  # html5 has other names


def mathml(tex: str, display: bool = False) -> str:
    """Return a formula as an element of HTML, or as the code that it is if it has more than this module knows."""
    try:
        formula = _Parser(tex).row()
    except (IndexError, KeyError):  # a brace is missing, or a command is unknown
        return f"<code>{escape(tex)}</code>"
    return f'<math display="{"block" if display else "inline"}">{formula}</math>'


class _Parser:
    """Reads the tokens of a formula from left to right."""

    def __init__(self, tex: str):
        self.tokens = [found[0] for found in TOKEN.finditer(tex)]

    def row(self, end: str = "") -> str:
        """Return all up to a token, which is left out, or to the end of the formula."""
        parts = []
        while self.tokens[0] != end if end else self.tokens:
            parts.append(self.scripted())
        if end:
            self.tokens.pop(0)
        return f"<mrow>{''.join(parts)}</mrow>"

    def scripted(self) -> str:
        """Return what comes next with its subscript and superscript; those of a sum are below and above."""
        below_above = ("under", "over") if self.tokens[0] in ("\\sum", "\\underbrace") else ("sub", "sup")
        base, below, above = self.atom(), "", ""
        while self.tokens and self.tokens[0] in ("_", "^", "'"):
            mark = self.tokens.pop(0)
            if mark == "_":
                below = self.argument()
            else:
                above += self.argument() if mark == "^" else "<mo>′</mo>"
        tag = "m" + below_above[0] * bool(below) + below_above[1] * bool(above)
        scripts = below + (f"<mrow>{above}</mrow>" if above else "")
        return f"<{tag}>{base}{scripts}</{tag}>" if scripts else base

    def argument(self) -> str:
        """Return what a command or a script applies to: a group in braces, or one token, of a number one digit."""
        if self.tokens[0].isdigit():
            self.tokens[:1] = [*self.tokens[0]]
        return self.atom()

    def atom(self) -> str:
        """Return the element of the next token, and of what belongs to it."""
        token = self.tokens.pop(0)
        if token == "{":  # noqa: S105, no password
            return self.row("}")
        if text := TEXT.fullmatch(token):
            spaced = escape((text[2] or text[3]).replace(" ", "\u00a0"))
            return f"<mtext>{spaced}</mtext>" if text[1] == "text" else f'<mi mathvariant="normal">{spaced}</mi>'
        if token == "\\left":  # noqa: S105
            opening, inside, closing = self.delimiter(), self.row("\\right"), self.delimiter()
            return f"<mrow>{opening}{inside}{closing}</mrow>"
        name = token.removeprefix("\\")
        if token != name and name in ELEMENTS:
            element = ELEMENTS[name]
            return element.format(*(self.argument() for _ in range(element.count("{}"))))
        sign = SIGNS.get(name) or html5[f"{name};"] if token != name and name.isalpha() else name
        if sign[0].isdigit():
            return f"<mn>{sign}</mn>"
        return f"<mi>{sign}</mi>" if sign.isalpha() else f'<mo stretchy="false">{escape(sign.replace("-", "−"))}</mo>'

    def delimiter(self) -> str:
        """Return the next token as a delimiter that is as high as what it encloses; a point stands for none."""
        if self.tokens[0] == ".":
            return f"<mo>{self.tokens.pop(0)[1:]}</mo>"
        return self.atom().replace(' stretchy="false"', "")
