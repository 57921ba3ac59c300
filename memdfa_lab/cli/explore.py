"""memdfa explore: the interactive explorers as a web page."""

import argparse
from functools import partial
from typing import Any

from memdfa_lab.cli.command import add_command


def add_to(commands: Any) -> None:
    command = add_command(
        commands,
        "explore",
        _explore,
        "show the interactive explorers of notebook 06 in your browser, on a page that only this machine can open",
        "  memdfa explore\n  memdfa explore --port 8866 --no-browser\n",
    )
    command.add_argument("--port", type=int, metavar="N", help="port of the page; default: a free one")
    command.add_argument(
        "--no-browser", dest="browser", action="store_false", help="print the address of the page, and open no browser"
    )


def _explore(options: argparse.Namespace) -> None:
    from memdfa_lab.batch.explore import explore

    explore(options.port, options.browser, partial(print, flush=True))
