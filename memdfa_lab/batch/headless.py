"""A papermill engine for notebooks with widgets, run without a browser.

nbclient answers for Output widgets in a headless run, and now and then waits for ever (nbclient issue 312). Our
notebooks draw into images, so the engine simply does not take part in widgets' talk. Progress bars are off: in a file
they are noise. The kernel is reached through a socket of this user's, not through an open port. The time limit is for
the whole notebook, where papermill's own is for each cell.
"""

import os
import tempfile
import time
from typing import Any

from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from traitlets.config import Config

ENGINE = "memdfa_headless"


class HeadlessEngine(NBClientEngine):
    """papermill's own engine, deaf to widgets."""

    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **kwargs: Any) -> Any:
        end = time.monotonic() + kwargs.get("notebook_timeout", 3600)
        with tempfile.TemporaryDirectory(prefix="memdfa-") as folder:
            socket = {"transport": "ipc", "ip": f"{folder}/kernel"}  # without a place, in the working directory
            client = PapermillNotebookClient(
                nb_man,
                timeout_func=lambda cell: max(1.0, end - time.monotonic()),
                iopub_timeout=60,  # nbclient's own 4 s are short on a busy machine
                startup_timeout=kwargs.get("start_timeout", 60),
                kernel_name=kernel_name,
                log_output=False,
                extra_arguments=["--log-level=50"],  # else the kernel says on stderr what the notebook says, too
                config=Config({"KernelManager": socket} if os.name == "posix" else {}),
            )
            client.comm_open_handlers = {}
            return client.execute(env={**os.environ, "TQDM_DISABLE": "1"})


papermill_engines.register(ENGINE, HeadlessEngine)
