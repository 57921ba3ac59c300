"""Results from the tables of the comparison, computed in seconds: test errors, goals, claims, and missing runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from memdfa_lab.batch.notebooks import notebooks_folder
from memdfa_lab.batch.paper import plan, runs
from memdfa_lab.core.rules import ALL_RULES, RULES
from memdfa_lab.lab import experiments
from memdfa_lab.lab.files import read_csv
from memdfa_lab.lab.losses import LOSSES
from memdfa_lab.lab.settings import RunSettings


def load(folder: str | Path = "reports/paper") -> dict[str, pd.DataFrame]:
    """Return name -> table: histories, choices, peaks, profiles and depth from a folder, and bench from ../bench.

    `find` looks for the folder. If the files of histories, choices or bench are missing, they have no rows.
    """
    place = find(folder)
    tables = {name: plan.current(runs.read(place, name)) for name in runs.TABLES}
    tables |= {name: read_csv(place / f"{name}.csv") for name in ("peaks", "profiles", "depth")}
    tables["profiles"] = tables["profiles"].fillna({"phase": ""})  # between two phases
    bench = place.parent / "bench" / "bench.csv"
    return tables | {"bench": read_csv(bench) if bench.exists() else pd.DataFrame()}


def find(folder: str | Path = "reports/paper") -> Path:
    """Return a folder of tables, relative to the working directory, to the notebooks, or to the folder above them.

    Raises ValueError if none of these has tables.
    """
    beside = notebooks_folder()
    for place in (Path(folder), beside / folder, beside.parent / folder):
        if (place / "depth.csv").exists():
            return place
    raise ValueError(
        f"no tables of the comparison in {str(folder)!r}: make them with `memdfa reproduce --paper --out FOLDER`, "
        "and give that folder as `runs`"
    )


def published() -> pd.DataFrame:
    """Return published test errors in percent, with their sources."""
    return read_csv(Path(__file__).with_name("published.csv"))


def longest(histories: pd.DataFrame) -> pd.DataFrame:
    """Keep the finished runs of each experiment and rule that have the most epochs."""
    run = ["experiment", "rule", "seed", "epochs"]
    ended = histories[histories["epoch"] == histories["epochs"]]
    most = ended.groupby(["experiment", "rule"], as_index=False)["epochs"].max()
    return histories.merge(ended[run].merge(most), on=run)


def errors(histories: pd.DataFrame) -> pd.DataFrame:
    """Return one row per experiment and rule: epochs, seeds, mean and standard deviation of the last test error (%)."""
    last = longest(histories).query("epoch == epochs")
    last = last.assign(error=100 * (1 - last["test_accuracy"]))
    groups = last.groupby(["experiment", "network", "dataset", "epochs", "rule"], sort=False)
    return groups.agg(seeds=("seed", "size"), error=("error", "mean"), spread=("error", "std")).reset_index()


def beside_published(histories: pd.DataFrame) -> pd.DataFrame:
    """Return test errors (%) as text, one column per rule: our mean ± deviation (seeds), and published ones."""
    found = errors(histories)
    rules = _rules(found)
    rows = []
    for (name, network, dataset), group in found.groupby(["experiment", "network", "dataset"], sort=False):
        apart = _apart(histories.loc[histories["experiment"] == name, "settings"])
        source = ", ".join([f"here, {name}", *apart])
        row = {"dataset": dataset, "network": network, "source": source, **dict.fromkeys(rules, "")}
        for one in group.itertuples():
            spread = "" if one.seeds == 1 else f" ± {one.spread:.2f}"
            row[str(one.rule)] = f"{one.error:.2f}{spread} ({one.seeds})"
        rows.append(row | {"epochs": ", ".join(map(str, sorted(set(group["epochs"]))))})
    others: list[dict[Any, Any]] = published().to_dict("records")
    for other in others:
        values = {rule: "" if pd.isna(other[rule]) else f"{other[rule]:.2f}" for rule in ("bp", "fa", "dfa")}
        how = "" if pd.isna(other["how"]) else f", {other['how']}"
        rows.append({**other, **values, "network": other["network"] + how})
    columns = ["dataset", "network", *rules, "epochs", "source"]
    table = pd.DataFrame(rows, columns=columns).fillna("")
    return table.sort_values("dataset", ascending=False, kind="stable", ignore_index=True)  # MNIST first


def _apart(settings: Iterable[str]) -> list[str]:
    """Return what sets an experiment's runs apart from others of the same network."""
    stated = {name: value for text in settings for name, value in json.loads(text).items()}
    weights = dict.fromkeys(json.loads(text).get("initialisation") for text in settings)
    notes = {
        "images": f"{stated.get('images', 0):,} training images",
        "initialisation": f"{' or '.join(map(str, weights))} initial weights",
        "standardise": "standardised weights",
        "feedback_lr": "B learned",
    }
    return [note for name, note in notes.items() if stated.get(name)]


def _rules(found: pd.DataFrame) -> list[str]:
    """Return the four rules, and after them the others that have runs."""
    return [*RULES, *(rule for rule in ALL_RULES if rule not in RULES and rule in set(found["rule"]))]


def against_memory(histories: pd.DataFrame) -> pd.DataFrame:
    """Return one row per network and learner: its test error (%), and the predicted bytes of its step.

    A `learner` is a rule, or MEM-DFA with a B that learns. FA and DFA are left out. If several experiments have the
    same network and learner, the one with the longest search counts; so learners can differ in their optimizer and
    `weights`, too. `held_bytes` is all memory at the peak: what is in memory between steps (weights, optimizer state, B
    and readouts), and `peak_bytes` above that.
    """
    searched = {one.name: one.search_epochs for one in plan.experiments()}
    settings = longest(histories).groupby(["experiment", "rule"])["settings"].first()
    rows: dict[tuple[str, str, str], tuple[dict[Any, Any], RunSettings]] = {}
    found: list[dict[Any, Any]] = errors(histories).query("rule not in ('fa', 'dfa')").to_dict("records")
    for one in sorted(found, key=lambda row: searched.get(row["experiment"], 0)):
        stated = json.loads(settings[one["experiment"], one["rule"]])
        run = plan.run_of(one["rule"], one["network"], one["dataset"], stated)
        learner = one["rule"] + (" learned" if run.feedback_lr else "")
        rows[one["dataset"], one["network"], learner] = {**one, "learner": learner}, run
    for row, run in rows.values():
        how = {"loss_fn": LOSSES[str(run.loss)], **experiments.options_of(run)}
        B = experiments.feedback_of(run)
        trace = experiments.profile(run.rule, run.network, int(run.batch_size or 0), str(run.optimizer), B, **how)
        row["optimizer"] = run.optimizer
        row["weights"] = f"{run.initialisation or ''}{', standardised' * run.standardise}"
        row["peak_bytes"] = trace.peak_bytes
        row["held_bytes"] = trace.resting_bytes + trace.peak_bytes
    return pd.DataFrame([row for row, _ in rows.values()])


def goals(histories: pd.DataFrame) -> pd.DataFrame:
    """Return one row per goal of the plan: test error (%) aimed at and reached, and whether the goal is met."""
    found = errors(histories).set_index(["experiment", "rule"])["error"].to_dict()
    rows = []
    for one in plan.experiments():
        for rule, goal in one.goal.items():
            error = found.get((one.name, rule))
            met = "not run yet" if error is None else "yes" if round(error, 4) <= goal else "no"  # from float32
            rows.append((one.name, one.network, rule, goal, "" if error is None else f"{error:.2f}", met))
    return pd.DataFrame(rows, columns=["experiment", "network", "rule", "at most (%)", "reached (%)", "met"])


def missing(histories: pd.DataFrame) -> pd.DataFrame:
    """Return one row per unfinished experiment of the plan: epochs, minutes, and by rule the seeds still to be run."""
    none: dict[str, list[int]] = {rule: [] for rule in RULES}
    rows = [
        {"experiment": one.name, "network": one.network, "dataset": one.dataset, "epochs": one.epochs}
        | {"about (min)": round(one.seconds / 60)}  # then the rules, of which other rows may have more
        | {rule: ", ".join(map(str, seeds)) for rule, seeds in {**none, **one.seeds}.items()}
        for one in plan.unfinished(plan.experiments(), histories)
    ]
    return pd.DataFrame(rows).fillna("")


def claims(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the abstract's four claims, the tables' evidence for each, and whether it supports the claim."""
    depth, histories, bench = tables["depth"], tables["histories"], tables["bench"]
    ours = depth[depth["rule"] == "memdfa"].groupby("network", sort=False)["peak_bytes"]
    growth = ours.last() / ours.first()
    constant = bool((ours.nunique() == 1).all())
    limits = {True: "shown, with limits", False: "not shown"}

    measured, theory = depth.dropna(subset="measured_bytes"), depth.dropna(subset="formula_bytes")
    as_measured = (measured["measured_bytes"] == measured["peak_bytes"]).sum()
    as_derived = (theory["formula_bytes"] == theory["peak_bytes"]).sum()
    agree = as_measured == len(measured) > 0 < as_derived == len(theory)

    of_four = histories[histories["rule"].isin(list(RULES))] if len(histories) else histories
    rules = of_four.groupby(["dataset", "network"])["rule"].nunique() if len(of_four) else pd.Series(dtype=int)
    compared = rules[rules == len(RULES)].reset_index().groupby("dataset").size() if len(rules) else rules
    on_both = {"mnist", "cifar10"} <= set(compared.index)
    lacking = ["some experiments are not run yet"] if len(missing(histories)) else []
    if len(histories):
        found = errors(histories).query("rule != 'dfa'")  # its updates are MEM-DFA's
        few = found.groupby("experiment")["seeds"].min() < 3
        lacking += [f"fewer than three seeds in {few.sum()} of {len(few)} experiments"] if few.any() else []
    seen = ", ".join(f"{count} network{'s' * (count > 1)} on {name}" for name, count in compared.items())

    times = extra_time(bench)
    ratios = ", ".join(f"{ratio:.2f} on {name}" for name, ratio in times.items())
    behind = _behind_bp(histories)
    ranges = [
        f"{rows.min():+.2f} to {rows.max():+.2f} points in {len(rows)} experiments on {name}"
        for name, rows in behind.groupby(level="dataset", sort=False)
    ]
    result = f"MEM-DFA's test error is above BP's in {(behind > 0).sum()} of {len(behind)} experiments"
    factors = ", ".join(f"{factor:.2f} ({name})" for name, factor in growth.items())
    first, last = depth["depth"].min(), depth["depth"].max()
    columns = {
        "claim": [
            "1. memory does not grow with the number of layers",
            "2. the price is one more forward pass",
            "3. four rules compared on MNIST and CIFAR-10, on several networks",
            "4. theory and experiment agree on memory",
        ],
        "what is seen": [
            f"MEM-DFA's peak above rest, at {last} layers divided by that at {first}: {factors}",
            f"step time, MEM-DFA / DFA: {ratios}; theory: 1.50, with three matrix products a layer, where DFA has two"
            if ratios
            else "not timed here: no bench.csv",
            f"all four trained: {seen or 'none'}; test error, MEM-DFA's minus BP's: {'; '.join(ranges) or 'none'}; "
            f"memory of {tables['peaks']['network'].nunique()} networks",
            f"equal to the prediction: {as_measured} of {len(measured)} measured peaks, {as_derived} of {len(theory)} "
            "closed forms",
        ],
        "limits": [
            "weights need memory besides, and grow with depth",
            "on one machine; theory counts matrix products alone" if ratios else "",
            "; ".join(["errors where BP, FA and MEM-DFA were trained", *lacking]),
            "closed forms are for MLPs",
        ],
        "figure": ["depth", "time", "curves, profiles", "depth"],
        "verdict": [
            limits[constant],
            limits[bool(times) and round(max(times.values()), 1) <= 1.5],
            f"{'' if on_both and not lacking else 'with limits: '}{result}" if len(behind) else "not shown",
            "shown" if agree else "not shown",
        ],
    }
    return pd.DataFrame(columns)


def _behind_bp(histories: pd.DataFrame) -> "pd.Series[float]":
    """Return MEM-DFA's test error minus BP's (points) by dataset and experiment, where FA was trained, too."""
    index = ["dataset", "experiment"]
    if not len(histories):
        return pd.Series(dtype=float, index=pd.MultiIndex.from_arrays([[], []], names=index))
    found = errors(histories).pivot_table(index=index, columns="rule", values="error", sort=False)
    found = found.reindex(columns=["bp", "fa", "memdfa"]).dropna()
    return found["memdfa"] - found["bp"]


def extra_time(bench: pd.DataFrame, over: str = "dfa") -> dict[str, float]:
    """Return network -> MEM-DFA's step time over that of a rule, from their ratios to BP; empty without a bench."""
    if not len(bench):
        return {}
    plain = bench[bench["setting"].isna() | (bench["setting"] == "")]
    times = plain.pivot_table(index="network", columns="rule", values="ratio", aggfunc="first", sort=False)
    if not {over, "memdfa"} <= set(times):
        return {}
    return {str(name): float(ratio) for name, ratio in (times["memdfa"] / times[over]).dropna().items()}
