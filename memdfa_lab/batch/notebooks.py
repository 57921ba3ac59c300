"""The numbered notebooks: where they are, a hash of their source, and which of their parameters are paths."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATH_COMMENT = re.compile(r"(an? |the )?(path|folder|file)\b")


def notebooks_folder() -> Path:
    """Return the folder of the numbered notebooks: beside the package in a checkout, inside it when installed.

    Raises FileNotFoundError if neither folder exists.
    """
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "notebooks", here / "_notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the notebooks are not installed: install memdfa_lab from its repository or its wheel")


def numbered() -> dict[str, Path]:
    """Return name -> path of the numbered notebooks, in order. A name is, for example, 02_mnist_mlp."""
    return {path.stem: path for path in sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))}


def source_of(notebook: Path) -> str:
    """Return a hash of the notebook's cells without their outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def parameters_of(notebook: Path) -> dict[str, dict[str, str]]:
    """Return name -> type, default and comment of each parameter, as papermill finds them in the tagged cell."""
    import papermill

    found: dict[str, dict[str, str]] = papermill.inspect_notebook(str(notebook))
    return found


def resolved(parameters: dict[str, Any], comments: Mapping[str, str], folder: str | Path) -> dict[str, Any]:
    """Return the parameters with relative paths resolved from a folder.

    A text is a path if the comment of its parameter begins with path, folder or file, or if it ends in .npz. Files on
    the disk do not matter: `mnist` is the name of a data set even if there is a folder of that name.
    """

    def is_path(name: str, value: Any) -> bool:
        return isinstance(value, str) and bool(PATH_COMMENT.match(comments.get(name, "")) or value.endswith(".npz"))

    return {k: os.path.join(folder, v) if is_path(k, v) else v for k, v in parameters.items()}


def completed(threads: Iterable["Future[T]"]) -> Iterator["Future[T]"]:
    """Yield each future as it ends. Unlike `concurrent.futures.as_completed`, this notices Ctrl-C on Windows."""
    waiting = set(threads)
    while waiting:
        done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
        yield from done


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
