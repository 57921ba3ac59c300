"""Write the repository's address, as pyproject.toml has it, wherever else it stands: make address."""

import re
import tomllib
from pathlib import Path

from memdfa_lab.lab.files import write_text

ROOT = Path(__file__).resolve().parent.parent
SITES = r"(github\.com|colab\.research\.google\.com/github|mybinder\.org/v2/gh)"


def addressed(text: str, name: str, before: str) -> str:
    """Return a text in which the repository `before`, OWNER/NAME, has another name on all sites."""
    return re.sub(rf"{SITES}/{re.escape(before)}(?=[^\w.-]|$)", rf"\1/{name}", text)


def main() -> None:
    """Change CITATION.cff, the notebooks and the rest of pyproject.toml."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    name = urls["Repository"].removeprefix("https://github.com/")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (before,) = re.findall(r'^repository-code: "https://github\.com/([^"]+)"$', citation, re.MULTILINE)
    files = [ROOT / "CITATION.cff", ROOT / "pyproject.toml", ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        if (changed := addressed(text, name, before)) != text:
            write_text(file, changed)
            print(file.relative_to(ROOT))


if __name__ == "__main__":
    main()
