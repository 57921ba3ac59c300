"""The tables in README, the book and reports, made from predictions, committed csv files and the notebooks: make tables.

Each function prints Markdown. cog puts it in place: `python -m cogapp -r -P -I reports -p "import tables" README.md`.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import memdfa_lab as ml
from memdfa_lab.figures import STYLES

REPORTS = Path(__file__).resolve().parent
LABELS = {rule: label for rule, (label, _) in STYLES.items()}
PEAKS_OF = {"784-[800]x32-10": 128, "784-[256]x64-10": 2048, "long_fc": 100, "liao_cifar": 100, "mnist_conv": 100}
paper = ml.paper.tables


def show(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(map(str, row))} |")


def options() -> None:
    """Options against options: ✓ both work, · the option in the row or the column changes nothing, ✗ refused."""
    table = pd.read_csv(REPORTS / "options.csv")
    signs = {"works": "✓", "no effect": "·", "refused": "✗"}
    cells = {(one, other): signs[found.partition(":")[0]] for one, other, found in table.to_numpy()}
    names = list(dict.fromkeys([*table["one"], *table["other"]]))
    rows = [[f"{i} {one}", *(cells.get((one, other), "") for other in names[1:])] for i, one in enumerate(names, 1)]
    show(["", *(str(i) for i in range(2, len(names) + 1))], [*rows[:-1], [f"{len(names)} {names[-1]}", *[""] * (len(names) - 1)]])


ASKED = {"same_outputs": "same outputs", "memdfa_is_dfa": "MEM-DFA = DFA", "predicted_is_measured": "predicted = measured"}


def torchvision() -> None:
    """torchvision's classification models by family: how many there are, into how many blocks they are cut, what holds."""
    table = pd.read_csv(REPORTS / "torchvision.csv")
    rows = []
    for family, models in table.groupby(table["model"].str.extract("([a-z]+)", expand=False)):
        least, most = models["blocks"].min(), models["blocks"].max()
        blocks = least if least == most else f"{least} to {most}"
        rows.append([family, len(models), blocks, *((models[name] == True).sum() for name in ASKED)])  # noqa: E712, or empty
    rows.append(["all", len(table), "", *((table[name] == True).sum() for name in ASKED)])  # noqa: E712
    show(["family", "models", "blocks", *ASKED.values()], rows)


def other_models() -> None:
    """Models of timm and Hugging Face, and what stops those that are not cut."""
    table = pd.read_csv(REPORTS / "other_models.csv").astype(object).fillna("")
    signs = {True: "✓", False: "✗", "": ""}
    rows = [
        [row["model"], row["blocks"] and int(row["blocks"]), *(signs[row[name]] for name in ASKED), "".join(re.findall("`.*`", row["problem"]))]
        for row in table.to_dict("records")
    ]
    show(["model", "blocks", *ASKED.values(), "the line that stops it"], rows)


def peaks() -> None:
    """The predicted peak of each rule in MiB, and what it is made of by the categories' first letters."""
    rows = []
    for rule in (*ml.RULES, *ml.LOCAL_RULES, *ml.paper.memory.COMPARED[len(ml.RULES) :]):
        cells = []
        for network, batch in PEAKS_OF.items():
            trace = ml.experiments.profile(rule, network, batch)
            parts = [f"{name[0]} {value / 2**20:.2f}" for name, value in trace.peak_by_category.items()]
            parts = [part for part in parts if not part.endswith(" 0.00")]
            cells.append(f"**{trace.peak_bytes / 2**20:.2f}** ({', '.join(parts)})")
        rows.append([LABELS[rule], *cells])
    show(["rule", *(f"{network}, N={batch}" for network, batch in PEAKS_OF.items())], rows)


def authors_mnist() -> None:
    """Test accuracy of fc_relu at the authors' setting, over seeds, and minutes a run."""
    table = pd.read_csv(REPORTS / "mnist_fc_relu" / "histories.csv")
    rows = []
    for rule, runs in table.groupby("rule", sort=False):
        at = [100 * runs[runs["epoch"] == epoch]["test_accuracy"] for epoch in (5, 20)]
        minutes = runs.groupby("seed")["seconds"].sum().mean() / 60
        rows.append([LABELS[str(rule)], *(f"{x.mean():.2f} ± {x.std():.2f}" for x in at), f"{minutes:.1f}"])
    show(["rule", "test accuracy after 5 epochs, %", "after 20 epochs, %", "training, minutes a run"], rows)


def three_numbers() -> None:
    """README's numbers: memory, test error and time of MEM-DFA, each with its limit."""
    network, batch = "784-[256]x64-10", PEAKS_OF["784-[256]x64-10"]
    steps = {rule: ml.experiments.profile(rule, network, batch) for rule in ("bp", "dfa", "checkpoint", "memdfa")}
    mib = {rule: step.peak_bytes / 2**20 for rule, step in steps.items()}
    kept = steps["bp"].peak_by_category["activations"] / 2**20
    ways = paper.against_memory(histories()).set_index(["network", "learner"])["error"]
    conv, dense, normalised, standardised = (ways[name] for name in ("mnist_conv", "nokland_7x240", "liao_cifar_bn", "liao_cifar"))
    plain = paper.errors(histories()).query("experiment == 'cifar10_liao'").set_index("rule")["error"]
    table = pd.read_csv(REPORTS / "bench" / "bench.csv", keep_default_na=False)
    ratios = table[(table["rule"] == "memdfa") & (table["feedback"] == "regenerated")]["ratio"]
    checkpointing = table[table["rule"] == "checkpoint_step_in_backward"]["ratio"]
    narrowed = pd.read_csv(REPORTS / "bench" / "pass1" / "float32" / "bench.csv", keep_default_na=False)
    narrowed = narrowed[(narrowed["rule"] == "memdfa") & (narrowed["threads"] == 2)]
    exact, cheap = (narrowed[narrowed["setting"] == setting]["ratio"] for setting in ("", "pass1=bfloat16"))
    print(
        f"- **Memory: {mib['memdfa']:.1f} MiB instead of {mib['bp']:.0f}.** This is the peak of one step of an MLP with 64 hidden layers of\n"
        f"  width 256 at batch {batch:,}, above what rests between steps. {kept:.0f} of BP's {mib['bp']:.0f} MiB are activations. DFA takes {mib['dfa']:.0f},\n"
        f"  BP with checkpointing {mib['checkpoint']:.0f}. MEM-DFA's number is the same at any depth. *Limit:* weights and optimizer state\n"
        "  come on top and grow with depth, unless they are [kept on disk](reports/index.md#weights-on-disk).\n"
        f"- **Test error: {conv['memdfa']:.2f} % instead of {conv['bp']:.2f} %** on MNIST with convolutions ({dense['memdfa']:.2f} instead of {dense['bp']:.2f} % with seven dense\n"
        f"  layers), {normalised['memdfa']:.1f} instead of {normalised['bp']:.1f} % on CIFAR-10 with BatchNorm, and {plain['memdfa']:.1f} instead of {plain['bp']:.1f} %\n"
        f"  without it. If the [matrices learn](reports/index.md#nearer-to-bp-block-by-block): {conv['memdfa learned']:.2f} % on MNIST, {normalised['memdfa learned']:.1f} % with\n"
        f"  BatchNorm, and {standardised['memdfa learned']:.1f} % without it if each step standardises the weights (BP then has {standardised['bp']:.1f} %).\n"
        "  *Limit:* CIFAR-10 mostly has one seed.\n"
        f"- **Time: {ratios.min():.2f} to {ratios.max():.2f} times BP's step** on [six networks](reports/index.md#time). It runs forward twice, but does not\n"
        f"  send the error back through the layers. Checkpointing with a step in backward takes {checkpointing.min():.2f} to {checkpointing.max():.2f}.\n"
        f"  On a processor with bfloat16, [a first pass in it](reports/index.md#a-cheap-first-pass) takes {cheap.min():.2f} to {cheap.max():.2f}, an exact one {exact.min():.2f} to {exact.max():.2f}."
    )


def times() -> None:
    """Step time over BP's, median over rounds with quartiles, of the committed bench."""
    table = pd.read_csv(REPORTS / "bench" / "bench.csv", keep_default_na=False)
    rows = []
    for label, rule, kind in (
        ("FA, B stored", "fa", "stored"),
        ("DFA", "dfa", "regenerated"),
        ("MEM-DFA", "memdfa", "regenerated"),
        (LABELS["checkpoint_step_in_backward"], "checkpoint_step_in_backward", "none"),
    ):
        found = table[(table["rule"] == rule) & (table["feedback"] == kind)]
        rows.append([label, *(f"{ratio(run)} ({run['ratio_low']:.2f} to {run['ratio_high']:.2f})" for _, run in found.iterrows())])
    networks = table[["network", "batch_size"]].drop_duplicates().itertuples(index=False)
    show(["step time / BP's", *(f"{network}, {batch}" for network, batch in networks)], rows)


def ratio(row: pd.Series, name: str = "ratio") -> str:
    """Return a ratio of a bench, with an asterisk if the run was noisy."""
    return f"{row[name]:.2f}" + "*" * (str(row["noisy"]) == "True")


def plain() -> None:
    """Step time over that of BP as a rule: a plain loop and MEM-DFA, and MEM-DFA over the plain loop, by threads."""
    table = pd.read_csv(REPORTS / "bench" / "plain" / "bench.csv", keep_default_na=False)
    rows = []
    for (network, batch), of in table.groupby(["network", "batch_size"], sort=False):
        row = [f"{network}, {batch}"]
        for _, found in of.groupby("threads"):
            loop = found[found["setting"] == "plain loop"].iloc[0]
            memdfa = found[found["rule"] == "memdfa"].iloc[0].copy()
            memdfa["over_loop"] = memdfa["median_s"] / loop["median_s"]
            row += [ratio(loop), ratio(memdfa), ratio(memdfa, "over_loop")]
        rows.append(row)
    names = "plain loop / BP", "MEM-DFA / BP", "MEM-DFA / plain loop"
    show(["network, batch", *(f"{name}, {threads}" for threads in ("1 thread", "2 threads") for name in names)], rows)


PASSES = {"": "exact", "pass1=bfloat16": "bfloat16", "pass1=int8": "int8"}
ALL_BFLOAT16 = ["precision=bfloat16", "precision=bfloat16, pass1=int8"]  # settings of MEM-DFA


def pass1() -> None:
    """Step time of MEM-DFA over BP's in one run: an exact pass 1, bfloat16 and int8, by threads; and peaks."""
    runs = _of_pass1("float32", "wide")
    rows = []
    for (network, batch), of in runs[runs["rule"] == "memdfa"].groupby(["network", "batch_size"], sort=False):
        row = [f"{network}, {batch}"]
        for _, found in of.groupby("threads"):
            row += [ratio(found.set_index("setting").loc[setting]) for setting in PASSES]
        peaks = found.set_index("setting")["peak_bytes"]
        rows.append([*row, ", ".join(f"{peaks[setting] / 2**20:.2f}" for setting in PASSES)])
    head = [f"{name}, {threads}" for threads in ("1 thread", "2 threads") for name in PASSES.values()]
    show(["network, batch", *head, "peaks, MiB"], rows)


def _of_pass1(*folders: str) -> pd.DataFrame:
    return pd.concat([pd.read_csv(REPORTS / "bench" / "pass1" / name / "bench.csv", keep_default_na=False) for name in folders])


def all_bfloat16() -> None:
    """Step time of MEM-DFA over BP's, both in bfloat16, with two kinds of pass 1, and the peaks of both."""
    rows = []
    for (network, batch), of in _of_pass1("all_bfloat16").groupby(["network", "batch_size"], sort=False):
        bp, memdfa = (of[of["rule"] == rule].set_index("setting") for rule in ("bp", "memdfa"))
        peaks = bp.loc["precision=bfloat16", "peak_bytes"], memdfa.loc["precision=bfloat16", "peak_bytes"]
        times = [ratio(memdfa.loc[setting], "ratio_alike") for setting in ALL_BFLOAT16]
        rows.append([f"{network}, {batch}", *times, *(f"{peak / 2**20:.2f}" for peak in peaks)])
    show(["network, batch", "pass 1 in bfloat16", "pass 1 in int8", "BP's peak, MiB", "MEM-DFA's"], rows)


# at most this much of BP's time, on one thread; aimed at before pass 1 was made cheap
TIME_GOALS = {"784-[800]x32-10": 0.80, "784-[256]x64-10": 0.85, "784-[512]x32-10": 0.88, "784-[2048]x8-10": 0.80}
TIME_GOALS |= {"mnist_conv": 1.05, "liao_cifar": 0.95, "vgg_16": 0.92, "64-[64]x10000-10": 1.1}
BFLOAT16_GOALS = dict.fromkeys(list(TIME_GOALS)[:-1], 0.95)  # the same, where BP runs in bfloat16, too


def time_goals() -> None:
    """The goals for MEM-DFA's step time over BP's on one thread, and the least that any kind of pass 1 reached."""
    alike = _of_pass1("all_bfloat16")
    alike = alike[alike["setting"].isin(ALL_BFLOAT16)].assign(ratio=alike["ratio_alike"])
    rows = []
    for network in TIME_GOALS:
        row = [network]
        for goals, table in ((TIME_GOALS, _of_pass1("float32", "wide", "deep")), (BFLOAT16_GOALS, alike)):
            found = table[(table["network"] == network) & (table["rule"] == "memdfa") & (table["threads"] == 1)]
            goal, best = goals.get(network), found.nsmallest(1, "ratio")
            met = "" if goal is None else "not run" if best.empty else "yes" if round(best["ratio"].item(), 2) <= goal else "no"
            row += ["" if goal is None else f"{goal:.2f}", "" if best.empty else ratio(best.iloc[0]), met]
        rows.append(row)
    show(["network", "goal", "reached", "met", "all in bfloat16: goal", "reached", "met"], rows)


def kept() -> None:
    """Step time of MEM-DFA over BP's and its peak in MiB, by what it keeps of pass 1 and by what pass 1 runs in."""
    table = pd.read_csv(REPORTS / "bench" / "kept.csv", keep_default_na=False)
    table["cell"] = [f"{r.ratio:.2f}, {r.peak_bytes / 2**20:.1f}" for r in table.itertuples()]
    rows = []
    for (network, batch, keeps), of in table[table["keeps"] != ""].groupby(["network", "batch_size", "keeps"], sort=False):
        for rule, cells in of.groupby("rule", sort=False):
            label = keeps + (", packed" if rule == "packed" else "")
            rows.append([f"{network}, {batch}", label, *cells.set_index("pass1")["cell"][["exact", "bfloat16", "int8"]]])
    show(["network, batch", "keeps", "exact", "bfloat16", "int8"], rows)


def narrowing() -> None:
    """Print, as a sentence, what part of a step narrowing weights takes, and what part a cheap pass 1 saves."""
    table = pd.read_csv(REPORTS / "bench" / "narrowing.csv")
    said = []
    for pass1, of in table.groupby("pass1", sort=False):
        share, saved = (100 * of[name] for name in ("narrowing_share", "saved_share"))
        said.append(f"{share.min():.1f} to {share.max():.1f} % in {pass1}, which saves {saved.min():.0f} to {saved.max():.0f} %")
    print(f"Of an exact step's time, narrowing the weights of these networks takes {', and '.join(said)}.")


def packing() -> None:
    """The fastest setting of MEM-DFA that packs, and the fastest that does not at no larger a peak: time over BP's."""
    table = pd.read_csv(REPORTS / "bench" / "kept.csv", keep_default_na=False)
    rows = []
    for (network, batch), of in table.groupby(["network", "batch_size"], sort=False):
        packed = of[of["rule"] == "packed"].nsmallest(1, "ratio").iloc[0]
        plain = of[(of["rule"] == "memdfa") & (of["peak_bytes"] <= packed["peak_bytes"])].nsmallest(1, "ratio").iloc[0]
        cells = [f"{one['ratio']:.2f} ({one['keeps']}, {one['pass1']})" for one in (packed, plain)]
        rows.append([f"{network}, {batch}", f"{packed['peak_bytes'] / 2**20:.1f}", *cells])
    show(["network, batch", "peak, MiB", "packed", "not packed, no larger peak"], rows)


def packed_accuracy() -> None:
    """Test accuracy in percent, mean and standard deviation over seeds, by what activations are packed to."""
    table = pd.read_csv(REPORTS / "pass1" / "packed.csv")
    found = (100 * table.set_index(["network", "pack", "seed"])["test_accuracy"]).groupby(level=[0, 1], sort=False)
    cells = found.agg(lambda of: f"{of.mean():.1f} ± {of.std():.1f}").unstack()[["exact", "int8", "4bit"]]
    show(["network", *cells.columns], [[network, *row] for network, row in zip(cells.index, cells.values, strict=True)])


def depth() -> None:
    """Microseconds a block and peak of BP and MEM-DFA against depth, of the committed bench on one thread."""
    table = pd.read_csv(REPORTS / "bench" / "deep" / "bench.csv")
    table["mark"] = table["noisy"].map({True: "*", False: ""})
    table["mib"] = table["peak_bytes"] / 2**20
    rows = []
    for network, runs in table.groupby("network", sort=False):
        by = runs.set_index("rule")
        times = [f"{by['us_a_block'][rule]:,.0f}{by['mark'][rule]}" for rule in ("bp", "memdfa")]
        rows.append([network, *times, *(f"{by['mib'][rule]:,.3f}" for rule in ("bp", "memdfa"))])
    show(["MLP", "BP, µs a block", "MEM-DFA, µs a block", "BP, peak in MiB", "MEM-DFA, peak in MiB"], rows)


def resident() -> None:
    """Peak resident memory of a process against depth, in MiB: BP, MEM-DFA in memory, MEM-DFA with weights on disk."""
    table = pd.read_csv(REPORTS / "offload" / "resident.csv")
    kinds = {"bp": "BP", "memdfa": "MEM-DFA", "offloaded": "MEM-DFA, offloaded"}
    rows = []
    for (kind, optimizer), runs in table.groupby(["kind", "optimizer"], sort=False):
        last = runs.iloc[-1]
        moved = [f"{last[name]:,.0f}" if kind == "offloaded" else "" for name in ("read_mib_a_step", "written_mib_a_step")]
        rows.append([kinds[kind], optimizer, *(f"{peak:,.0f}" for peak in runs["peak_resident_mib"]), *moved])
    depths = runs[["depth", "weights_mib"]].to_numpy()
    head = [f"{depth:.0f} layers ({weights:,.0f} MiB)" for depth, weights in depths]
    show(["", "optimizer", *head, "read, most layers", "written"], rows)


def large() -> None:
    """Training of networks that do not fit into memory: a row a batch."""
    table = pd.read_csv(REPORTS / "offload" / "large.csv")
    head = ["weights, GiB", "memory, GiB", "layers", "batch number", "s", "read, GiB", "written, GiB",
            "process's own memory, MiB", "loss"]
    names = ["weights_gib", "limit_gib", "layers", "step", "seconds", "read_gib", "written_gib", "peak_anonymous_mib", "loss"]
    digits = [1, 1, 0, 0, 0, 1, 1, 0, 3]
    show(head, [[f"{value:.{n}f}" for value, n in zip(row, digits)] for row in table[names].to_numpy()])


def speed() -> None:
    """The time of a step with weights on the disk beside that in memory, against the batch."""
    table = pd.read_csv(REPORTS / "offload" / "speed.csv")
    names = {"batch": "batch", "in_memory_s": "in memory, s", "in_memory_sweep_s": "by a sweep, s", "offloaded_s": "offloaded, s",
             "committed_each_step_s": "committed each step, s", "disk_read_gib_s": "disk reads, GiB/s",
             "disk_write_gib_s": "writes", "disk_alone_s": "disk alone, s", "offloaded_over_memory": "over memory",
             "offloaded_over_larger": "over the larger"}
    rows = [[f"{v:.2f}" if name != "batch" else f"{v:.0f}" for name, v in zip(names, row)] for row in table[list(names)].to_numpy()]
    show(list(names.values()), rows)


def claims() -> None:
    """The abstract's four claims and what the tables have of each."""
    table = paper.claims(paper.load(REPORTS / "paper")).drop(columns="figure")
    show(list(table), table.to_numpy())


def all_errors() -> None:
    """Test errors of all experiments."""
    table = paper.beside_published(histories())
    table = table[table["source"].str.startswith("here")]
    show([LABELS.get(name, name) for name in table], table.to_numpy())


def goals() -> None:
    """The plan's goals and what was reached."""
    table = paper.goals(histories()).replace({"rule": LABELS})
    show(list(table), table.to_numpy())


def near() -> None:
    """Test error and what is held at the peak, on the networks on which other ways than BP and a fixed B were run."""
    table = paper.against_memory(histories())
    table = table[table["learner"].isin(["bp", "memdfa", "memdfa learned", *ml.LOCAL_RULES])]
    table = table[(~table["learner"].isin(["bp", "memdfa"])).groupby([table["dataset"], table["network"]]).transform("any")]
    table = table.sort_values(["dataset", "network"], kind="stable")
    names = {**LABELS, "memdfa": "MEM-DFA, B fixed", "memdfa learned": "MEM-DFA, B learns"}
    rows = []
    for row in table.to_dict("records"):
        spread = "" if row["seeds"] == 1 else f" ± {row['spread']:.2f}"
        error, held = f"{row['error']:.2f}{spread} ({row['seeds']})", f"{row['held_bytes'] / 2**20:.1f}"
        place = row["dataset"], row["network"].partition("@")[0], names[row["learner"]]
        rows.append([*place, error, held, row["optimizer"], row["weights"], row["epochs"]])
    show(["dataset", "network", "way", "test error, %", "held, MiB", "optimizer", "weights", "epochs"], rows)


def learned_by_rivals() -> None:
    """Test error, and what is held at the peak, of each way on the network on which all of them were run."""
    table = paper.against_memory(histories())
    table = table[table["network"].isin(["[400 tanh]x8 classes@1x28x28", "reversible-784-[400]x14-10"])].sort_values("error")
    names = {**LABELS, "memdfa": "MEM-DFA, B fixed", "memdfa learned": "MEM-DFA, B learns"}
    rows = []
    for row in table.to_dict("records"):
        error, held = f"{row['error']:.2f} ± {row['spread']:.2f} ({row['seeds']})", f"{row['held_bytes'] / 2**20:.2f}"
        rows.append([names[row["learner"]], row["network"].partition("@")[0], error, held, f"{row['peak_bytes'] / 2**20:.2f}"])
    show(["way", "network", "test error, %", "held, MiB", "of it above rest"], rows)


def readouts_memory() -> None:
    """All that a step with Adam holds at its peak, in MiB: local readouts with and without the similarity loss."""
    rows = []
    for network, batch in (("liao_cifar", 100), ("liao_cifar_bn", 100), ("mnist_conv", 128), ("[800 tanh dropout0.2]x2 classes@1x28x28", 32)):
        ways = {"BP": ("bp", {}), "MEM-DFA, B fixed": ("memdfa", {})}
        ways |= {f"local readouts, similarity {weight}": ("local_readout", {"similarity": weight}) for weight in (0.0, 0.9)}
        steps = [ml.experiments.profile(rule, network, batch, "adam", **options) for rule, options in ways.values()]
        rows.append([network.partition("@")[0], *(f"{(s.peak_bytes + s.resting_bytes) / 2**20:.1f}" for s in steps)])
    show(["network", *ways], rows)


def largest_rates() -> None:
    """Print, as a sentence, the searches that chose the largest of several rates, for the weights or for B."""
    ended: dict[str, list[str]] = {}
    for (experiment, rule), of in paper.load(REPORTS / "paper")["choices"].groupby(["experiment", "rule"], sort=False):
        tried = pd.DataFrame(json.loads(settings) for settings in of["settings"])
        best = tried.iloc[of["held_out_accuracy"].to_numpy().argmax()]
        rates = [name for name in ("lr", "feedback_lr") if name in tried and tried[name].nunique() > 1]
        if any(best[name] == tried[name].max() for name in rates):
            ended.setdefault(LABELS[rule], []).append(f"`{experiment}`")
    print("; ".join(f"{rule} on {', '.join(experiments)}" for rule, experiments in ended.items()) + ".")


def missing() -> None:
    """What of the plan has not been run: seeds by rule."""
    table = paper.missing(histories())
    show([LABELS.get(name, name) for name in table], table.to_numpy())


def growth() -> None:
    """What was tried against ReLUs that grow: error on held-out images, and how much larger the last hidden output is."""
    table = pd.read_csv(REPORTS / "learning" / "growth.csv")
    rows = []
    for row in table.to_dict("records"):
        settings = ast.literal_eval(row["settings"])
        told = [f"{name} {value:g}" for name, value in settings.items() if isinstance(value, float) and (name, value) != ("lr", 0.001)]
        rule = LABELS[row["rule"]] + (f", B {settings['distribution']}" if "distribution" in settings else "")
        rows.append([rule, row["weights"], ", ".join(told), f"{row['error']:.1f}", f"{row['growth']:,.0f}"])
    show(["rule", "weights", "settings", "error (%)", "growth"], rows)


def bilateral() -> None:
    """The error of mnist_conv on 2,000 images of CIFAR-10, plain and noisy, as they are and filtered."""
    table = pd.read_csv(REPORTS / "neighbours" / "bilateral.csv").pivot(index="images", columns="rule", values="error")
    order = ["as they are", "as they are, filtered", "noisy", "noisy, filtered"]
    show(["images", "BP, error (%)", "DFA, error (%)"], [[name, *(f"{table[rule][name]:.1f}" for rule in ("bp", "dfa"))] for name in order])


def superseded() -> None:
    """Runs that others replaced: their last test errors in percent, mean over seeds."""
    table = pd.read_csv(REPORTS / "paper" / "superseded.csv")
    earlier = histories().query("epoch == epochs")
    longest = earlier.groupby(["experiment", "rule"])["epochs"].transform("max")
    table = pd.concat([table, earlier[earlier["epochs"] < longest]])
    table["batch"] = table["settings"].map(lambda settings: json.loads(settings)["batch_size"])
    table["error"] = 100 * (1 - table["test_accuracy"])
    groups = table.groupby(["experiment", "batch", "epochs", "rule"], sort=False)["error"]
    means = groups.mean().map("{:.2f}".format).unstack("rule").fillna("").reset_index()
    rules = [rule for rule in ml.RULES if rule in means]
    names = [*means.columns[:3], *(LABELS[rule] for rule in rules)]
    show(names, means[[*means.columns[:3], *rules]].to_numpy())


def rivals(*networks: str) -> None:
    """Step time over BP's and peak of the frontier's contenders, a column a network; in brackets how each is set."""
    table = pd.read_csv(REPORTS / "bench" / "frontier" / "bench.csv", keep_default_na=False)
    table = table[table["network"].isin(networks)]
    table["way"] = table["rule"].map(LABELS) + table["pass1"].map(lambda pass1: f", pass 1 in {pass1}" if pass1 else "")
    table["place"] = table.groupby(["network", "way"]).cumcount()
    settings = table["setting"].map(lambda setting: f" ({setting})" if setting else "")
    table["cell"] = table["ratio"].map("{:.2f}, ".format) + (table["peak_bytes"] / 2**20).map("{:.2f}".format) + settings
    wide = table.pivot(index=["way", "place"], columns="network", values="cell").fillna("")
    order = sorted(wide.index, key=lambda key: (list(table["way"].unique()).index(key[0]), key[1]))
    show(["", *networks], [[way, *wide.loc[(way, place), list(networks)]] for way, place in order])


def beside_memdfa() -> None:
    """Peak and time over those of MEM-DFA that keeps nothing, of the methods that hold nearly as little."""
    table = pd.read_csv(REPORTS / "bench" / "frontier" / "bench.csv", keep_default_na=False)
    mine = table[(table["setting"] == "keeps 0%") & (table["pass1"] == "")].set_index("network")
    rivals = table[table["rule"].isin(["binomial", "activation_offload", "reversible"])]
    fewest = rivals.drop_duplicates(["network", "rule"]).copy()  # the fewest snapshots come first
    for name in ("peak_bytes", "ratio"):
        fewest[name] /= fewest["network"].map(mine[name])
    fewest["cell"] = fewest["peak_bytes"].map("{:.1f}, ".format) + fewest["ratio"].map("{:.2f}".format)
    wide = fewest.pivot(index="network", columns="rule", values="cell").fillna("")
    ways = {"binomial": "BP, binomial, fewest snapshots", "activation_offload": "BP, activations on disk", "reversible": "BP, reversible"}
    show(["", *ways.values()], [[network, *wide.loc[network, list(ways)]] for network in table["network"].unique()])


def packages() -> None:
    """Allocator's peak and time of reversible networks: ours, and the packages'."""
    table = pd.read_csv(REPORTS / "rivals" / "packages.csv")
    rows = []
    for (width, couplings, batch), runs in table.groupby(["width", "couplings", "batch"], sort=False):
        cells = [f"{run.allocator_bytes / 1e6:.2f}, {run.ratio:.2f}" for run in runs.itertuples()]
        rows.append([f"{width} x {couplings}, {batch}", *cells])
    show(["width x couplings, batch", *table["name"].unique()], rows)


def estimators() -> None:
    """What torchinfo and MemTracker say that a step with Adam takes, in MiB, beside our ledger and torch's allocator."""
    table = pd.read_csv(REPORTS / "rivals" / "estimators.csv")
    names = ["torchinfo", "tracker", "ledger", "allocator", "rest"]
    cells = (table[names] / 2**20).map(lambda mib: "refuses" if pd.isna(mib) else f"{mib:.1f}")
    places = table["network"] + ", " + table["batch_size"].astype(str)
    rows = [[place, LABELS[rule], *row] for place, rule, row in zip(places, table["rule"], cells.to_numpy(), strict=True)]
    show(["network, batch", "rule", "torchinfo", "MemTracker", "ledger", "allocator", "of it at rest"], rows)


def course() -> None:
    """The course: minutes to read and time of a run, as each notebook says, and its words, figures and exercises."""
    rows, totals = [], [0] * 4
    for path in sorted((REPORTS.parent / "notebooks").glob("[0-9]*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        tags = [cell["metadata"].get("tags", []) for cell in cells]
        text = "\n".join(re.sub(r"<details>.*?</details>", "", one, flags=re.DOTALL) for one in texts)
        outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
        pictures = sum("image/png" in data or "data:image/" in "".join(data.get("text/html", "")) for data in outputs)
        runs = re.search(r"runs\s+in\s+([^.,;]*?)(?:\s+on\s+two\s+cores)?[.,;]", texts[0])
        minutes = re.search(r"Reading time:\*\*\s+(\d+)\s+minutes", texts[0])
        numbers = [int(minutes[1]) if minutes else 0, len(text.split()), pictures, sum("exercise" in tag for tag in tags)]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        title = texts[0].partition("\n")[0].removeprefix("# ")
        rows.append([f"[{title}](../{path.name})", numbers[0], " ".join(runs[1].split()) if runs else "", *(f"{n:,}" for n in numbers[1:])])
    rows.append(["all", totals[0], "", *(f"{total:,}" for total in totals[1:])])
    show(["notebook", "minutes to read", "it runs in", "words", "figures", "exercises"], rows)


def histories() -> pd.DataFrame:
    table: pd.DataFrame = paper.load(REPORTS / "paper")["histories"]
    return table


def transformers() -> None:
    """The two transformers after their last epoch: learning rate, loss and error on what is held out, predicted peak."""
    table = pd.read_csv(REPORTS / "paper" / "transformers.csv")
    words = {"x_dtype": torch.long, "y_shape": (32, 64), "y_dtype": torch.long, "loss_fn": ml.losses.token_cross_entropy}
    steps = {
        "gpt": ("GPT, letters", ml.models.gpt, (32, 64), words),
        "vit": ("ViT, CIFAR-10", partial(ml.models.vit, (3, 32, 32), 10), (64, 3, 32, 32), {}),
    }
    rows = []
    for (network, rule), runs in table.groupby(["network", "rule"], sort=False):
        label, make, shape, how = steps[network]
        last = runs[runs["epoch"] == runs["epoch"].max()]
        peak = ml.memory.predict(rule, make, shape, torch.optim.Adam, ml.feedback.Regenerated(0), **how).peak_bytes
        error = 100 * (1 - last["test_accuracy"])
        spread = f" ± {error.std():.1f}" if len(last) > 1 else ""
        loss, lr = last["test_loss"].mean(), f"{last['lr'].iloc[0]:g}"
        rows.append([label, LABELS[rule], lr, f"{loss:.2f}", f"{error.mean():.1f}{spread} ({len(last)})", f"{peak / 2**20:.1f}"])
    order = {label: i for i, label in enumerate(LABELS.values())}
    rows.sort(key=lambda row: (row[0], order[row[1]]))
    show(["network", "rule", "learning rate", "test loss", "test error, %", "peak, MiB"], rows)


def large_models() -> None:
    """Predicted peaks above rest of torchvision's models, the largest batch in 8 GiB, and B, in GiB."""
    models, rows = ("resnet50", "vit_b_16", "convnext_tiny"), []
    tables = {name: pd.read_csv(REPORTS / "large_models" / f"{name}.csv", index_col="rule") for name in models}
    coarse = {name: pd.read_csv(REPORTS / "large_models" / f"{name}_grid4.csv", index_col="rule") for name in models}
    for rule in tables[models[0]].index:
        rows.append([LABELS[rule], *(_sized(table.loc[rule]) for table in tables.values())])
    rows.append(["MEM-DFA, grid=4", *(_sized(table.loc["memdfa"]) for table in coarse.values())])
    for label, found in (("B", tables), ("B, grid=4", coarse)):
        rows.append([label, *(f"{table.loc['memdfa', 'B'] / 2**30:.2f}" for table in found.values())])
    show(["", *models], rows)


def model_times() -> None:
    """Step time over BP's, median and quartiles, and measured peak of two of torchvision's models."""
    table = pd.read_csv(REPORTS / "large_models" / "times" / "bench.csv", keep_default_na=False)
    rows = []
    for (rule, feedback), runs in table.groupby(["rule", "feedback"], sort=False):
        label = LABELS[rule] + ("" if feedback == "none" else f", B {feedback}")
        cells = [
            f"{run['ratio']:.2f} ({run['ratio_low']:.2f} to {run['ratio_high']:.2f}), {run['peak_bytes'] / 2**20:.1f} MiB"
            for run in runs.to_dict("records")
        ]
        rows.append([label, *cells])
    names = [network.partition(":")[2].partition("@")[0] for network in table["network"].unique()]
    show(["step time / BP's, peak", *names], rows)


def _sized(row: pd.Series) -> str:
    return f"{row['peak'] / 2**30:.2f} ({row['largest batch']:.0f})"


def grids() -> None:
    """Test accuracy and angles of the first blocks with B on a grid, mean and standard deviation over seeds."""
    rows = []
    for network in ("mnist_conv", "liao_cifar_bn"):
        table = pd.read_csv(REPORTS / "grid" / f"{network}.csv", keep_default_na=False)
        for grid, runs in table.groupby("grid", sort=False):
            accuracy = 100 * runs["test_accuracy"]
            spread = f" ± {accuracy.std():.2f}" if len(runs) > 1 else ""
            angles = [f"{runs[f'angle_{i}_deg'].mean():.0f}" for i in (1, 2, 3)]
            size = f"{runs['B_bytes'].iloc[0]:,}"
            rows.append([network, grid, size, f"{accuracy.mean():.2f}{spread} ({len(runs)})", *angles])
    show(["network", "grid", "bytes of B", "test accuracy, % (seeds)", *(f"block {i}, °" for i in (1, 2, 3))], rows)
