"""The command line: memdfa train | reproduce."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import memdfa_lab as ml
from memdfa_lab.experiments import OPTIMIZERS
from memdfa_lab.feedback import DISTRIBUTIONS, KINDS
from memdfa_lab.losses import LOSSES

INTERRUPTED = 130  # what shells report after Ctrl-C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _say("interrupted: what was finished is kept, the same command goes on from there", INTERRUPTED)
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
    parser = _Parser(prog="memdfa", description=ml.__doc__)
    parser.add_argument("--version", action="version", version=f"memdfa_lab {ml.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)
    _add_train(commands)
    _add_reproduce(commands)
    return parser


def _add(commands: Any, name: str, run: Any, help: str, examples: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    command.set_defaults(run=run)
    return command


def _add_train(commands: Any) -> None:
    command = _add(
        commands,
        "train",
        _train,
        "train a network with one rule or several, from the same seeds",
        "  memdfa train --rule memdfa --network fc_relu --dataset mnist --epochs 3\n"
        "  memdfa train --rule all --network mnist_conv --epochs 5 --lr 0.05 --feedback regenerated\n",
    )
    add = command.add_argument
    add("--rule", nargs="+", default=["memdfa"], choices=[*ml.RULES, "all"], help="default: memdfa")
    add("--network", default="fc_relu", metavar="NAME", help=f"one of {', '.join(ml.models.names())}")
    add(
        "--dataset", default="mnist5k", help="mnist5k (default, no network needed), mnist, cifar10 or a path to an .npz"
    )
    add("--root", help="where data sets are kept (default: $MEMDFA_DATA, else the user's cache)")
    add("--epochs", type=int, default=5, help="default: 5")
    add("--batch-size", type=int, help="default: the network's setting")
    add("--lr", type=float, help="learning rate; default: the network's setting, which is for sgd")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: sgd (momentum: sgd with momentum 0.9)")
    add("--loss", choices=LOSSES, help="default: the network's setting")
    add("--feedback", choices=KINDS, default="stored", help="what is kept of the random matrices; default: stored")
    add("--distribution", choices=DISTRIBUTIONS, default="he_normal", help="default: he_normal, the authors'")
    add("--scale", type=float, default=1.0, help="multiplies the random matrices; default: 1")
    add("--clip-norm", type=float, help="largest norm of one block's gradient; default: no clipping")
    add("--seed", type=int, default=0, help="of weights, feedback and the order of the data; default: 0")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--out", type=Path, help="run folder; default: reports/runs/NETWORK-DATASET-seedSEED")
    add("--overwrite", action="store_true", help="start anew instead of going on with the run in the folder")


def _train(options: argparse.Namespace) -> None:
    import pandas as pd

    rules = list(ml.RULES) if "all" in options.rule else list(dict.fromkeys(options.rule))
    data = ml.experiments.load_for(options.network, options.dataset, options.root)
    out = options.out or Path("reports/runs") / f"{options.network}-{data.name}-seed{options.seed}"
    rows = []
    for rule in rules:
        _, history = ml.experiments.train(
            rule,
            options.network,
            data,
            options.epochs,
            options.batch_size,
            folder=out / rule,
            overwrite=options.overwrite,
            seed=options.seed,
            lr=options.lr,
            optimizer=options.optimizer,
            loss=options.loss,
            feedback_kind=options.feedback,
            distribution=options.distribution,
            scale=options.scale,
            clip_norm=options.clip_norm,
            device=options.device,
        )
        last = history.table.iloc[-1]
        rows.append({"rule": rule, **last, "seconds": history.table["seconds"].sum()})
    print(pd.DataFrame(rows).astype({"epoch": int}).to_string(index=False, float_format="{:.4f}".format))
    print(f"histories and checkpoints are in {out}/")


def _add_reproduce(commands: Any) -> None:
    command = _add(
        commands,
        "reproduce",
        _reproduce,
        "run the numbered notebooks and write figures and tables into a run folder",
        "  memdfa reproduce\n  memdfa reproduce --only 02 -p dataset mnist -p epochs 20 --out reports/runs/mnist\n",
    )
    add = command.add_argument
    add("--only", type=lambda text: text.split(","), default=[], metavar="02,04", help="these notebooks; default: all")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter, its value as in YAML")
    add("--out", type=Path, help="run folder; default: reports/runs/<time>")


def _reproduce(options: argparse.Namespace) -> None:
    import yaml

    try:
        parameters = {name: yaml.safe_load(value) for name, value in options.p}
    except yaml.YAMLError as problem:
        raise ValueError(f"-p takes a value as in YAML, such as 3, true, mnist or [bp, dfa]: {problem}") from problem
    out = ml.experiments.reproduce(options.out, options.only, parameters)
    print(f"executed notebooks, figures and tables are in {out}/")


if __name__ == "__main__":
    sys.exit(main())
