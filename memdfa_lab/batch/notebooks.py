"""The numbered notebooks: where they are, what their source is, and which of their parameters are paths."""

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
    """Return where the numbered notebooks are: beside the package in a checkout, inside it when installed."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "notebooks", here / "_notebooks"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError("the notebooks are not installed: install memdfa_lab from its repository or its wheel")


def numbered() -> dict[str, Path]:
    """Return the numbered notebooks by name, such as 02_mnist_mlp, in their order."""
    return {path.stem: path for path in sorted(notebooks_folder().glob("[0-9][0-9]_*.ipynb"))}


def source_of(notebook: Path) -> str:
    """Return a hash of the notebook's cells without their outputs."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def parameters_of(notebook: Path) -> dict[str, dict[str, str]]:
    """Return what papermill finds in the cell tagged `parameters`: by name the type, the default and the comment."""
    import papermill

    found: dict[str, dict[str, str]] = papermill.inspect_notebook(str(notebook))
    return found


def resolved(parameters: dict[str, Any], comments: Mapping[str, str], folder: str | Path) -> dict[str, Any]:
    """Return the parameters with relative paths resolved from a folder.

    Paths are the values of parameters whose comment begins with path, folder or file, and every data set that is an
    .npz. What exists on the disk does not matter: `mnist` is a name wherever there is a folder of that name.
    """

    def is_path(name: str, value: Any) -> bool:
        return isinstance(value, str) and bool(PATH_COMMENT.match(comments.get(name, "")) or value.endswith(".npz"))

    return {k: os.path.join(folder, v) if is_path(k, v) else v for k, v in parameters.items()}


def completed(threads: Iterable["Future[T]"]) -> Iterator["Future[T]"]:
    """Yield each as it ends, as `concurrent.futures.as_completed` does, where Windows hears no Ctrl-C meanwhile."""
    waiting = set(threads)
    while waiting:
        done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
        yield from done


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
