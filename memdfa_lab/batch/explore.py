"""The explorers as a page of their own, without code: notebook 06 served by Voila, on this machine alone."""

import importlib.util
import os
import secrets
import signal
import socket
import tempfile
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

import nbformat

from memdfa_lab.batch.notebooks import notebooks_folder

NOTEBOOK = "06_explore.ipynb"
TEMPLATES = Path(__file__).with_name("templates")  # Voila finds voila/templates/memdfa there


def explore(port: int | None = None, browser: bool = True, say: Callable[[str], object] = print) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        port: Where to serve it; None: a port that is free.
        browser: Open the page in a browser, too.
        say: Called with the address of the page, which has a secret token, and with other news.

    Raises:
        ValueError: If Voila is not installed, or the port is taken.
    """
    if importlib.util.find_spec("voila") is None:
        raise ValueError('memdfa explore needs Voila, which is not installed: pip install "memdfa_lab[explore]"')
    chosen, token = _free(port), secrets.token_urlsafe(16)
    address = f"http://127.0.0.1:{chosen}/?token={token}"

    def listening() -> None:
        say(f"the explorer is at {address} (Ctrl-C stops it)")
        if browser:
            webbrowser.open(address)

    # Windows removes no folder in which a kernel still is.
    with tempfile.TemporaryDirectory(prefix="memdfa-explore-", ignore_cleanup_errors=True) as folder:
        shown = Path(folder, "explore.ipynb")
        nbformat.write(page(nbformat.read(notebooks_folder() / NOTEBOOK, as_version=4)), shown)
        options = [str(shown), "--template=memdfa", f"--port={chosen}", "--Voila.ip=127.0.0.1", f"--token={token}"]
        options += ["--Voila.port_retries=0", "--Voila.log_level=ERROR", "--show_tracebacks=False"]
        if os.name == "posix":
            options.append("--KernelManager.transport=ipc")  # sockets of this user, not open ports
        paths = os.pathsep.join([str(TEMPLATES), *filter(None, [os.environ.get("JUPYTER_PATH")])])
        os.environ["JUPYTER_PATH"] = paths
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # else its kernels would go on
        server: Any = import_module("voila.app").Voila.instance()
        server.launch_browser = listening
        with suppress(KeyboardInterrupt):  # that is how it ends
            server.initialize(options)
            server.start()
    say("stopped")


def page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a notebook of the explorers only: without parameters, exercises, and pictures of them."""
    cells, before = [], None
    for cell, after in zip_longest(notebook.cells, notebook.cells[1:]):
        if cell.source.startswith("## How it answers"):
            break
        is_exercise = {"exercise", "solution"} & {*cell.metadata.get("tags", [])}
        if is_exercise or cell.source.startswith(("## Parameters", "**Exercise ")):
            continue
        if cell.source.startswith("# "):  # the title and what it promises; links to other notebooks lead nowhere
            cell.source = "\n\n".join(cell.source.split("\n\n")[:2])
        of_picture = cell.source.startswith("*") and (_is_picture(before) or _is_picture(after))  # its caption
        if not _is_picture(cell) and not of_picture:
            cells.append(cell)
        before = cell
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


def _is_picture(cell: Any) -> bool:
    drawn = ("report.figure(", "report.table(")
    return bool(cell) and cell.cell_type == "code" and any(call in cell.source for call in drawn)


def _free(port: int | None) -> int:
    with socket.socket() as asked:
        try:
            asked.bind(("127.0.0.1", port or 0))
        except (OSError, OverflowError) as problem:
            raise ValueError(
                f"port {port} cannot be used ({problem}): choose another, or leave --port out"
            ) from problem
        return int(asked.getsockname()[1])
