"""The explorers as a web page without code: Voila serves notebook 06, to this machine only."""

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
        port: The port to serve it on; None: any free port.
        browser: Whether to open the page in a browser.
        say: Called with each message; the first has the address of the page, with its secret token.

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

    # Windows cannot remove a folder in which a kernel still runs.
    with tempfile.TemporaryDirectory(prefix="memdfa-explore-", ignore_cleanup_errors=True) as folder:
        shown = Path(folder, "explore.ipynb")
        nbformat.write(page(nbformat.read(notebooks_folder() / NOTEBOOK, as_version=4)), shown)
        options = [str(shown), "--template=memdfa", f"--port={chosen}", "--Voila.ip=127.0.0.1", f"--token={token}"]
        options += ["--Voila.port_retries=0", "--Voila.log_level=ERROR", "--show_tracebacks=False"]
        if os.name == "posix":
            options.append("--KernelManager.transport=ipc")  # sockets of this user, not open ports
        paths = os.pathsep.join([str(TEMPLATES), *filter(None, [os.environ.get("JUPYTER_PATH")])])
        os.environ["JUPYTER_PATH"] = paths
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise its kernels would keep running
        server: Any = import_module("voila.app").Voila.instance()
        server.launch_browser = listening
        with suppress(KeyboardInterrupt):  # this is how the server ends
            server.initialize(options)
            server.start()
    say("stopped")


def page(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the explorers of a notebook as a notebook, without parameters, exercises and static pictures."""
    cells, before = [], None
    for cell, after in zip_longest(notebook.cells, notebook.cells[1:]):
        if cell.source.startswith("## How it answers"):
            break
        is_exercise = {"exercise", "solution"} & {*cell.metadata.get("tags", [])}
        if is_exercise or cell.source.startswith(("## Parameters", "**Exercise ")):
            continue
        if cell.source.startswith("# "):  # the title and one paragraph; links to other notebooks would not work
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
