"""The command line: memdfa train | reproduce | profile | bench | sweep | explore."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import memdfa_lab as ml
from memdfa_lab import paper, sweep
from memdfa_lab.bench import ALL as BENCH_RULES
from memdfa_lab.bench import NETWORKS, bench, contenders, frontier
from memdfa_lab.experiments import OPTIMIZERS
from memdfa_lab.explore import explore
from memdfa_lab.feedback import DISTRIBUTIONS, KINDS
from memdfa_lab.files import write_text
from memdfa_lab.losses import LOSSES
from memdfa_lab.reproduce import reproduce

INTERRUPTED = 130  # what shells report after Ctrl-C


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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
    parser = _Parser(prog="memdfa", description=ml.__doc__)
    parser.add_argument("--version", action="version", version=f"memdfa_lab {ml.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)
    _add_train(commands)
    _add_reproduce(commands)
    _add_profile(commands)
    _add_bench(commands)
    _add_sweep(commands)
    _add_explore(commands)
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
        "  memdfa train --rule all --network mnist_conv --epochs 5 --lr 0.05 --feedback regenerated\n"
        "  torchrun --nproc-per-node 2 -m memdfa_lab train --rule memdfa    # two processes, half of each batch each\n",
    )
    add = command.add_argument
    add("--rule", nargs="+", default=["memdfa"], choices=[*ml.RULES, "all"], help="default: memdfa")
    add("--network", default="fc_relu", metavar="NAME", help=f"one of {', '.join(ml.models.names())}")
    add(
        "--dataset", default="mnist5k", help="mnist5k (default, no network needed), mnist, cifar10 or a path to an .npz"
    )
    add("--root", help="where data sets are kept (default: $MEMDFA_DATA, else the user's cache)")
    add("--epochs", type=int, help="default: the network's setting")
    add("--batch-size", type=int, help="default: the network's setting")
    add("--lr", type=float, help="learning rate; default: the network's setting, which is for its own optimizer")
    add("--optimizer", choices=OPTIMIZERS, help="default: the network's setting (momentum: sgd with momentum 0.9)")
    add("--weight-decay", type=float, help="default: the network's setting")
    add("--loss", choices=LOSSES, help="default: the network's setting")
    add("--feedback", choices=KINDS, default="stored", help="what is kept of the random matrices; default: stored")
    add("--distribution", choices=DISTRIBUTIONS, help="of the random matrices; default: the network's setting")
    add("--initialisation", choices=ml.models.INITIALISATIONS, help="of the weights; default: the network's setting")
    add("--scale", type=float, default=1.0, help="multiplies the random matrices; default: 1")
    add("--clip-norm", type=float, help="largest norm of one block's gradient; default: no clipping")
    add("--seed", type=int, default=0, help="of weights, feedback and the order of the data; default: 0")
    add("--device", default="cpu", help="cpu (default) or cuda")
    add("--out", type=Path, help="run folder; default: reports/runs/NETWORK-DATASET-seedSEED")
    add("--overwrite", action="store_true", help="start anew instead of going on with the run in the folder")
    add("--sync-batchnorm", action="store_true", help="under torchrun: BatchNorm's statistics over all ranks")
    seconds = "under torchrun: how long a rank waits for another before it gives up; default: 60"
    add("--dist-timeout", type=float, default=ml.distributed.TIMEOUT_S, metavar="S", help=seconds)


def _train(options: argparse.Namespace) -> None:
    with ml.distributed.ranks(options.device, options.dist_timeout) as group:
        try:
            _train_in(group, options)
        except KeyboardInterrupt:
            if group.rank == 0:  # it speaks for all
                raise
            sys.exit(INTERRUPTED)


def _train_in(group: ml.distributed.Group, options: argparse.Namespace) -> None:
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
            weight_decay=options.weight_decay,
            loss=options.loss,
            initialisation=options.initialisation,
            feedback_kind=options.feedback,
            distribution=options.distribution,
            scale=options.scale,
            clip_norm=options.clip_norm,
            device=group.device,
            group=group,
            sync_batchnorm=options.sync_batchnorm,
        )
        last = history.table.iloc[-1]
        rows.append({"rule": rule, **last, "seconds": history.table["seconds"].sum()})
    if group.rank == 0:
        print(pd.DataFrame(rows).astype({"epoch": int}).to_string(index=False, float_format="{:.4f}".format))
        print(f"histories and checkpoints are in {out}/")


def _add_reproduce(commands: Any) -> None:
    command = _add(
        commands,
        "reproduce",
        _reproduce,
        "run the numbered notebooks in order; executed notebooks, figures, tables and index.html go into a run folder",
        "  memdfa reproduce\n"
        "  memdfa reproduce --only 02,04 -p dataset mnist -p epochs 20 --out reports/runs/mnist\n"
        "  memdfa reproduce --out reports/runs/mnist    # goes on with that run, if it was cut or something failed\n"
        "  memdfa reproduce --paper --budget 2h         # the paper's comparison, as far as it goes in two hours\n"
        "  memdfa reproduce --paper --only mnist_2x800,mnist_7x240 --out reports/runs/paper\n",
    )
    add = command.add_argument
    add("--only", type=lambda text: text.split(","), default=[], metavar="02,04", help="these notebooks; default: all")
    add("--paper", action="store_true", help="instead: run the comparison; --only then names experiments of it")
    add("--budget", type=paper.plan.seconds, metavar="2h", help="with --paper: its time, such as 90m or 1h30m")
    add("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter, its value as in YAML")
    out = "run folder, of a run to go on with or a new one; default: reports/runs/<time>, with --paper reports/paper"
    add("--out", type=Path, help=out)
    add("--overwrite", action="store_true", help="start anew what the folder already has")
    add("--timeout", type=float, default=900, metavar="S", help="seconds that one notebook may take; default: 900")


def _reproduce(options: argparse.Namespace) -> None:
    import yaml

    if options.paper:
        return _reproduce_paper(options)
    if options.budget is not None:
        raise ValueError("--budget goes with --paper: notebooks have --timeout")
    try:
        parameters = {name: yaml.safe_load(value) for name, value in options.p} or None
    except yaml.YAMLError as problem:
        raise ValueError(f"-p takes a value as in YAML, such as 3, true, mnist or [bp, dfa]: {problem}") from problem
    out = reproduce(options.out, options.only, parameters, overwrite=options.overwrite, timeout_s=options.timeout)
    print(f"figures and numbers are in {out / 'index.html'}, executed notebooks beside it")


def _reproduce_paper(options: argparse.Namespace) -> None:
    if options.p or options.overwrite:
        raise ValueError("-p and --overwrite do not go with --paper: another --out starts anew, in an empty folder")
    out = options.out or Path("reports/paper")
    paper.runs.run(out, options.only, options.budget, say=partial(print, flush=True))
    if not (out / "depth.csv").exists():
        print("memory tables, predicted: some minutes", flush=True)
        paper.memory.measure(out)
    print(f"tables are in {out}/: notebook 07_paper_figures draws them, with runs={str(out)!r}")


def _add_profile(commands: Any) -> None:
    command = _add(
        commands,
        "profile",
        _profile,
        "say what one training step holds in memory, rule by rule, measured or predicted",
        "  memdfa profile --network long_fc --batch 128 --rules all\n"
        "  memdfa profile --network '784-[800]x32-10' --batch 10000 --predict --plot profile.svg\n",
    )
    add = command.add_argument
    add(
        "--network",
        default="long_fc",
        metavar="NAME",
        help=f"a ReLU MLP such as 784-[800]x32-10, or {', '.join(ml.models.names())}",
    )
    add("--batch", type=int, default=128, help="batch size; default: 128")
    add("--rules", nargs="+", default=list(ml.RULES), choices=[*BENCH_RULES, "all"], help="default: bp fa dfa memdfa")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="default: sgd")
    add("--feedback", choices=KINDS, default="regenerated", help="default: regenerated")
    add("--predict", action="store_true", help="do not run the step: any size, in seconds")
    add("--csv", type=Path, help="write every birth and free to this file")
    add("--plot", type=Path, help="draw the profiles into this file (svg and png beside it)")


def _profile(options: argparse.Namespace) -> None:
    import pandas as pd

    from memdfa_lab.memory import CATEGORIES

    rules = list(BENCH_RULES) if "all" in options.rules else list(dict.fromkeys(options.rules))
    traces = {
        rule: ml.experiments.profile(
            rule, options.network, options.batch, options.optimizer, options.feedback, measured=not options.predict
        )
        for rule in rules
    }
    rows = [
        {"rule": rule, "peak": trace.peak_bytes, **trace.peak_by_category, "at rest": trace.resting_bytes}
        for rule, trace in traces.items()
    ]
    table = pd.DataFrame(rows).fillna(0)
    table = table[[name for name in ("rule", "peak", *CATEGORIES, "at rest") if name in table]]
    how = "predicted" if options.predict else "measured"
    print(f"{options.network}, batch {options.batch}, {options.optimizer}: bytes, {how}; the peak is above rest")
    print(table.to_string(index=False, float_format="{:.0f}".format))
    if options.csv:
        timelines = [trace.timeline.assign(rule=rule) for rule, trace in traces.items()]
        write_text(options.csv, pd.concat(timelines).to_csv(index=False))
    if options.plot:
        labels = {ml.figures.STYLES[rule][0]: trace.timeline for rule, trace in traces.items()}
        ml.figures.save(ml.figures.memory_profiles(labels), options.plot)


def _add_bench(commands: Any) -> None:
    command = _add(
        commands,
        "bench",
        _bench,
        "time steps of the rules side by side, in turns, and give the peak beside each",
        "  memdfa bench\n"
        "  memdfa bench --network '784-[800]x32-10' --batch 128 --rules bp memdfa --rounds 21 --out bench\n"
        "  memdfa bench --network liao_cifar --frontier --out frontier\n",
    )
    add = command.add_argument
    add("--network", nargs="+", metavar="NAME", help=f"default: {', '.join(NETWORKS)}")
    add("--batch", type=int, help="batch size; default: 128, 2048, 512, 100, 100, 32 for these, else 128")
    add("--rules", nargs="+", default=["all"], choices=[*BENCH_RULES, "all"], help="default: all, with the baselines")
    add("--feedback", nargs="+", choices=KINDS, default=["regenerated"], help="one or more; default: regenerated")
    add("--frontier", action="store_true", help="instead of the rules: MEM-DFA's keep_bytes beside checkpointing")
    add("--channels-last", action="store_true", help="lay out images and filters so, for all of them")
    add("--rounds", type=int, default=9, help="steps of each that count; default: 9")
    add("--out", type=Path, help="write bench.csv and the figure (svg, png) into this folder")


def _bench(options: argparse.Namespace) -> None:
    import pandas as pd

    rules = list(BENCH_RULES) if "all" in options.rules else options.rules
    tables = []
    for network in options.network or NETWORKS:
        batch = options.batch or NETWORKS.get(network, 128)
        if options.frontier:
            against = frontier(network, batch, options.feedback[0])
        else:
            against = contenders(rules, options.feedback)
        tables.append(bench(network, batch, against, rounds=options.rounds, channels_last=options.channels_last))
        if len(tables) == 1:
            print(
                f"torch {tables[0]['torch'][0]}, {tables[0]['threads'][0]} threads, {options.rounds} rounds, in turns"
            )
        shown = tables[-1].assign(peak_mib=tables[-1]["peak_bytes"] / 2**20)
        print(f"\n{network}, batch {batch}: seconds a step and ratio to BP (median, quartiles), peak above rest")
        columns = [
            "rule",
            "feedback",
            "setting",
            "median_s",
            "us_a_block",
            "ratio",
            "ratio_low",
            "ratio_high",
            "peak_mib",
        ]
        print(shown[columns].to_string(index=False, float_format="{:.3f}".format), flush=True)
        if options.out:  # after each network: a bench that is cut leaves what it has
            table = pd.concat(tables)
            write_text(options.out / "bench.csv", table.to_csv(index=False))
            ml.figures.save(ml.figures.frontier(table), options.out / "bench")


def _add_sweep(commands: Any) -> None:
    command = _add(
        commands,
        "sweep",
        sweep.command,
        "run a notebook or train once for each combination of parameters; finished runs are not run again",
        "  memdfa sweep sweep.yaml --jobs 4\n"
        "  memdfa sweep sweep.yaml --scheduler tcp://127.0.0.1:8786    # on the workers of a Dask cluster\n"
        "  memdfa sweep status sweep.yaml\n"
        "sweep.yaml, here 12 runs; run may be a notebook, too, then with table: NAME, the table that is its result:\n"
        "  run: train\n"
        "  parameters: {network: '784-[100]x3-10', epochs: 5}\n"
        "  grid: {rule: [bp, memdfa], lr: [0.003, 0.01, 0.03], seed: [0, 1]}\n",
    )
    add = command.add_argument
    add("status", nargs="?", choices=["status"], help="only say how far it is")
    add("file", help="a sweep file; after status, it may be the folder of all runs")
    add("--out", type=Path, help="folder of all runs; default: reports/runs/NAME for NAME.yaml")
    add("--jobs", type=int, help="runs at a time on this machine; default: as many as it has cores for")
    add("--scheduler", metavar="ADDRESS", help="of a Dask cluster that shares the folder, such as tcp://HOST:8786")


def _add_explore(commands: Any) -> None:
    command = _add(
        commands,
        "explore",
        lambda options: explore(options.port, options.browser, partial(print, flush=True)),
        "open the explorers as a page of their own in your browser, served on this machine alone",
        "  memdfa explore\n  memdfa explore --port 8866 --no-browser\n",
    )
    command.add_argument("--port", type=int, help="default: one that is free")
    command.add_argument("--no-browser", dest="browser", action="store_false", help="only say where the page is")


if __name__ == "__main__":
    sys.exit(main())
