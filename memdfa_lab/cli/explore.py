"""memdfa explore: the explorers as a page."""

import argparse
from functools import partial
from typing import Any

from memdfa_lab.cli.command import add_command


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "explore",
        _explore,
        "open the explorers as a page of their own in your browser, served on this machine alone",
        "  memdfa explore\n  memdfa explore --port 8866 --no-browser\n",
    )
    command.add_argument("--port", type=int, help="default: one that is free")
    command.add_argument("--no-browser", dest="browser", action="store_false", help="only say where the page is")


def _explore(options: argparse.Namespace) -> None:
    from memdfa_lab.batch.explore import explore

    explore(options.port, options.browser, partial(print, flush=True))
