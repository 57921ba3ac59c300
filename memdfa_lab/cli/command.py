"""What all commands share: one-line errors, and options made from the table of settings."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from memdfa_lab.core.rules import ALL_RULES, RULES
from memdfa_lab.lab.settings import RunSettings, setting

INTERRUPTED = 130  # what shells report after Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def add_command(commands: Any, name: str, run: Any, help: str, examples: str) -> Parser:
    """Return the parser of a new command; the command calls run(options)."""
    command: Parser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of every error")
    command.set_defaults(run=run)
    return command


def add_settings(command: Parser, *names: str, **defaults: Any) -> None:
    """Add an option for each of these settings of a run; `defaults` replace the defaults of the table."""
    for name in names:
        kind, table, default, description = setting(RunSettings, name)
        option = f"--{name.replace('_', '-')}"
        if name in defaults:
            default, description = defaults[name], str(description).partition("; default: ")[0]
        if kind is bool:
            command.add_argument(option, action="store_true", help=description)
            continue
        command.add_argument(
            option,
            type=kind,
            choices=None if table is None else list(table),
            default=default,
            help=description if default is None else f"{description}; default: {default}",
        )


def given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options with these names that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def add_rules(command: Parser, name: str, default: list[str], all_of: str) -> None:
    """Add an option that takes one or more rules; `all_of` names those that `all` stands for."""
    names = [*ALL_RULES, "all"]
    help = f"one or more of {', '.join(names)}; all: {all_of}; default: {' '.join(default)}"
    command.add_argument(name, nargs="+", default=default, choices=names, metavar="RULE", help=help)


def chosen_rules(names: list[str], every: list[str] | None = None) -> list[str]:
    """Return the chosen rules, each once; `all` stands for `every`, by default the four rules."""
    return (every or list(RULES)) if "all" in names else list(dict.fromkeys(names))


def add_model(command: Parser) -> None:
    """Add --model and --input, for a network of the user's own in place of --network."""
    command.set_defaults(network=None, default_network=command.get_default("network"))
    help = (
        "in place of --network: a function without arguments that returns a model; MODULE may be a file in this folder"
    )
    command.add_argument("--model", metavar="MODULE:FUNCTION", help=help)
    command.add_argument("--input", metavar="SHAPE", help="the shape of one example for --model, such as 3x224x224")


def named_network(options: argparse.Namespace) -> Any:
    """Return --network, or --model and --input as one name. Raises ValueError for both, and for --input alone."""
    if options.model is not None and options.network is not None:
        raise ValueError("--model replaces --network: leave one of them out")
    if options.input is not None and options.model is None:
        raise ValueError("--input goes with --model: a network of --network has its own input shape")
    if options.model is not None:
        return options.model if options.input is None else f"{options.model}@{options.input}"
    return options.default_network if options.network is None else options.network
