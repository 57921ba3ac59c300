"""The command line: memdfa train | reproduce | profile | bench | sweep | explore."""

import argparse
import sys
from collections.abc import Sequence

import memdfa_lab as ml
from memdfa_lab.cli import bench, explore, profile, reproduce, sweep, train
from memdfa_lab.cli.command import INTERRUPTED, Parser

COMMANDS = (train, reproduce, profile, bench, sweep, explore)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt as stop:
        text = str(stop) or "interrupted: what was finished is kept, the same command goes on from there"
        return _say(text, INTERRUPTED)
    except (ValueError, TypeError) as problem:
        return _fail(options, problem, 2)
    except Exception as problem:
        return _fail(options, problem, 1)
    return 0


def _fail(options: argparse.Namespace, problem: Exception, status: int) -> int:
    if options.debug:
        raise problem
    text = " ".join(str(problem).split()) or type(problem).__name__
    return _say(text if len(text) < 1000 else f"{text[:1000]} ...", status)


def _say(text: str, status: int) -> int:
    print(f"memdfa: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="memdfa", description=ml.__doc__)
    parser.add_argument("--version", action="version", version=f"memdfa_lab {ml.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=Parser)
    for command in COMMANDS:
        command.add_to(commands)
    return parser
