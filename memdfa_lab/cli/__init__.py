"""The command line: memdfa train | reproduce | profile | bench | sweep | explore."""

import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from memdfa_lab.cli import bench, explore, profile, reproduce, sweep, train
from memdfa_lab.cli.command import INTERRUPTED, Parser
from memdfa_lab.core.checks import of_an_extra

COMMANDS = (train, reproduce, profile, bench, sweep, explore)
PACKAGE = Path(__file__).parents[1]
ABOUT = (
    "Train networks with BP, FA, DFA and MEM-DFA, and measure or predict their memory. "
    "`memdfa COMMAND --help` lists the options of a command."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.

    An error that the package or the system raises on purpose is shown in one line. Any other error is a fault in the
    package or in a library, and is shown with its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a Windows console lacks some characters
    options = _parser().parse_args(arguments)
    try:
        with of_an_extra():
            options.run(options)
    except KeyboardInterrupt as stop:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the exit
        text = str(stop) or "interrupted: finished work is kept, and the same command resumes from there"
        return _show(text, INTERRUPTED)
    except Exception as problem:
        if options.debug:
            raise
        of_system = isinstance(problem, (OSError, MemoryError)) or "allocate memory" in str(problem)
        if not (of_system or _is_reported(problem)):
            traceback.print_exc()
        text = " ".join(str(problem).split()) or type(problem).__name__
        status = 2 if isinstance(problem, (ValueError, TypeError)) and _is_reported(problem) else 1
        return _show(text if len(text) < 1000 else f"{text[:1000]} ...", status)
    return 0


def _is_reported(problem: Exception) -> bool:
    """Tell whether a `raise` statement of this package raised the error."""
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    return PACKAGE in Path(frame.filename).parents and str(frame.line).startswith("raise ")


def _show(text: str, status: int) -> int:
    print(f"memdfa: {text}", file=sys.stderr)
    return status


def _parser() -> Parser:
    parser = Parser(prog="memdfa", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"memdfa_lab {version('memdfa_lab')}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
