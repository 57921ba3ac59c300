"""Mathematics in TeX as MathML, which browsers draw without a script: as much of TeX as the notebooks use."""

import re
from html import escape
from html.entities import html5

TOKEN = re.compile(r"\\(?:text|mathrm|operatorname) *\{[^{}]*\}|\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\s+|.", re.DOTALL)
SIGNS = {"cdot": "·", "cdots": "⋯", "dots": "…", "infty": "∞", "partial": "∂", "to": "→"}  # html5 has other names
SPACES = {",": 0.17, ";": 0.28, "!": -0.17, " ": 0.25, "quad": 1, "qquad": 2}  # em
ACCENTS = {"hat": "^", "dot": "˙", "bar": "¯", "tilde": "~"}
FUNCTIONS = ("max", "min", "cos", "sin", "log", "exp")


def mathml(tex: str, display: bool = False) -> str:
    """Return a formula as a <math> element, or as the code that it is if it has more than this module knows."""
    try:
        formula = _Parser(tex).row()
    except (IndexError, KeyError):  # a brace is missing, or a command is unknown
        return f"<code>{escape(tex)}</code>"
    return f'<math display="{"block" if display else "inline"}">{formula}</math>'


class _Parser:
    """Reads the tokens of a formula from left to right."""

    def __init__(self, tex: str):
        self.tokens = [token for token in TOKEN.findall(tex) if not token.isspace()]

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
        limits = self.tokens[0] in ("\\sum", "\\underbrace")
        base, below, above = self.atom(), "", ""
        while self.tokens and self.tokens[0] in ("_", "^", "'"):
            match self.tokens.pop(0):
                case "_":
                    below = self.argument()
                case "^":
                    above += self.argument()
                case _:
                    above += "<mo>′</mo>"
        parts = ("under", "over") if limits else ("sub", "sup")
        tag = "m" + parts[0] * bool(below) + parts[1] * bool(above)
        above = f"<mrow>{above}</mrow>" if above else ""
        return f"<{tag}>{base}{below}{above}</{tag}>" if below or above else base

    def argument(self) -> str:
        """Return what a command or a script applies to: a group in braces, or one token, of a number one digit."""
        if self.tokens[0][:1].isdigit():
            self.tokens[:1] = [*self.tokens[0]]
        return self.atom()

    def atom(self) -> str:
        token = self.tokens.pop(0)
        if token == "{":  # noqa: S105, no password
            return self.row("}")
        if token[0] == "\\":
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>"
        if token.isalpha():
            return f"<mi>{token}</mi>"
        return f'<mo stretchy="false">{escape(token.replace("-", "−"))}</mo>'

    def command(self, name: str) -> str:
        name, brace, text = name.partition("{")
        if brace:
            spaced = escape(text[:-1].replace(" ", "\u00a0"))
            return f"<mtext>{spaced}</mtext>" if name == "text" else f'<mi mathvariant="normal">{spaced}</mi>'
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}em"></mspace>'
        match name:
            case "frac" | "tfrac":
                return f"<mfrac>{self.argument()}{self.argument()}</mfrac>"
            case "sqrt":
                return f"<msqrt>{self.argument()}</msqrt>"
            case "underbrace":
                return f"<munder>{self.argument()}<mo>⏟</mo></munder>"
            case "left":
                opening, inside, closing = self.delimiter(), self.row("\\right"), self.delimiter()
                return f"<mrow>{opening}{inside}{closing}</mrow>"
            case "big" | "Big":
                return self.delimiter(' stretchy="false"')
            case "displaystyle" | "mathrel":
                return "<mrow></mrow>" if name == "displaystyle" else self.argument()
            case "mathrm":
                return self.argument().replace("<mi>", '<mi mathvariant="normal">')
        if name in ACCENTS:
            return f'<mover accent="true">{self.argument()}<mo>{ACCENTS[name]}</mo></mover>'
        if name in FUNCTIONS:
            return f"<mi>{name}</mi>"
        sign = name if not name.isalpha() else SIGNS.get(name) or html5[f"{name};"]
        return f"<mi>{sign}</mi>" if sign.isalpha() else f'<mo stretchy="false">{escape(sign)}</mo>'

    def delimiter(self, attribute: str = "") -> str:
        token = self.tokens.pop(0)
        sign = {".": "", "\\langle": "⟨", "\\rangle": "⟩"}.get(token, token.removeprefix("\\"))
        return f"<mo{attribute}>{escape(sign)}</mo>"
