"""Run notebooks from top to bottom and keep what they put out as it is committed, without noise: make notebooks."""

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill

from memdfa_lab.batch.headless import ENGINE
from memdfa_lab.batch.sweep_file import from_yaml
from memdfa_lab.lab.files import write_whole

HOOKS = Path(__file__).resolve().parent.parent / ".pre-commit-config.yaml"


def steady(notebook: nbformat.NotebookNode) -> None:
    """Give styled tables the same ids each time and objects no address, so that a change shows what has changed."""
    for cell in notebook.cells:
        table = f"T_{hashlib.sha256(cell.id.encode()).hexdigest()[:5]}"
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = re.sub(r'\bT_[0-9a-f]{5}(?=[\s_"])', table, data["text/html"])
            if "text/plain" in data:
                data["text/plain"] = re.sub(r"\b0x[0-9a-f]{6,16}\b", "0x000000", data["text/plain"])


def run(path: Path) -> None:
    """Run the notebook where it lies and write it, whole or not at all."""
    hooks = from_yaml(HOOKS.read_text(encoding="utf-8"))["repos"][0]["hooks"]
    strip = next(hook["args"] for hook in hooks if hook["id"] == "nbstripout")
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / path.name
        papermill.execute_notebook(
            str(path), str(executed), engine_name=ENGINE, kernel_name="python3", cwd=path.parent, progress_bar=False
        )
        notebook = nbformat.read(executed, as_version=4)
        notebook.metadata.language_info = {"name": "python"}  # not which Python: that would change with each of them
        for cell in notebook.cells:
            if not cell.metadata.get("tags"):
                cell.metadata.pop("tags", None)  # papermill leaves empty lists
        steady(notebook)
        nbformat.write(notebook, executed)
        subprocess.run([sys.executable, "-m", "nbstripout", *strip, str(executed)], check=True)
        write_whole(path, lambda temporary: temporary.write_bytes(executed.read_bytes()))


for name in sys.argv[1:]:
    print(f"{name}: ", end="", flush=True)
    try:
        run(Path(name))
    except papermill.PapermillExecutionError as problem:
        sys.exit(f"left as it was, since it failed: {problem.ename}: {problem.evalue}")
    print("done", flush=True)
