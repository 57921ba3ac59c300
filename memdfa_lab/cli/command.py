"""What all commands share: errors in one line, and options from the table of settings."""

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
    """Return the parser of a new command, which calls run(options)."""
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
    """Add an option for each of these settings of a run; `defaults` differ from those of the table."""
    for name in names:
        kind, table, default, description = setting(RunSettings, name)
        default, option = defaults.get(name, default), f"--{name.replace('_', '-')}"
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
    """Return those of these options that were given, by name."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def add_rules(command: Parser, name: str, default: list[str], all_of: str) -> None:
    """Add an option of one rule or more; `all` stands for all of them."""
    names = [*ALL_RULES, "all"]
    help = f"one or more of {', '.join(names)} ({all_of}); default: {' '.join(default)}"
    command.add_argument(name, nargs="+", default=default, choices=names, metavar="RULE", help=help)


def chosen_rules(names: list[str], every: list[str] | None = None) -> list[str]:
    """Return the rules that were asked for, each once; `all` stands for `every` rule, the four if not given."""
    return (every or list(RULES)) if "all" in names else list(dict.fromkeys(names))


def add_model(command: Parser) -> None:
    """Add --model and --input, a network of the user's own in place of --network."""
    command.set_defaults(network=None, default_network=command.get_default("network"))
    help = "in place of --network: a function without arguments that returns a model"
    command.add_argument("--model", metavar="MODULE:FUNCTION", help=help)
    command.add_argument("--input", metavar="3x224x224", help="the shape of one example that --model takes")


def named_network(options: argparse.Namespace) -> Any:
    """Return --network, or --model and --input as one name. Raises ValueError for both, and for --input alone."""
    if options.model is not None and options.network is not None:
        raise ValueError("--model stands in place of --network: leave one of them out")
    if options.input is not None and options.model is None:
        raise ValueError("--input goes with --model: a network of the table has an input shape of its own")
    if options.model is not None:
        return options.model if options.input is None else f"{options.model}@{options.input}"
    return options.default_network if options.network is None else options.network
