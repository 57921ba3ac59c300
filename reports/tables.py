"""The tables in README and reports, made from predictions and committed csv files: make tables.

Each function prints a Markdown table. cog puts it in place: `python -m cogapp -r -P -I reports -p "import tables" README.md reports/index.md`.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import memdfa_lab as ml
from memdfa_lab.core.rules import ALL_RULES
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
    for rule in ALL_RULES:
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


def errors(*experiments: str) -> None:
    """Test errors of some experiments in percent, mean and standard deviation over seeds (how many)."""
    table = paper.beside_published(histories()).set_index("source").loc[[f"here, {name}" for name in experiments]]
    head = ["data", "network", "epochs", *(LABELS[rule] for rule in ml.RULES)]
    show(head, table[["dataset", "network", "epochs", *ml.RULES]].to_numpy())


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
        rows.append([label, *(f"{r.ratio:.2f} ({r.ratio_low:.2f} to {r.ratio_high:.2f})" for r in found.itertuples())])
    networks = table[["network", "batch_size"]].drop_duplicates().itertuples(index=False)
    show(["step time / BP's", *(f"{network}, {batch}" for network, batch in networks)], rows)


def pass1() -> None:
    """Step time of MEM-DFA over BP's in one run: an exact pass 1, bfloat16 and int8, by threads; and all in bfloat16."""
    folder = REPORTS / "bench" / "pass1"
    runs = pd.concat([pd.read_csv(folder / name / "bench.csv", keep_default_na=False) for name in ("float32", "wide")])
    alike = pd.read_csv(folder / "all_bfloat16" / "bench.csv", keep_default_na=False)
    passes = {"": "exact", "pass1=bfloat16": "bfloat16", "pass1=int8": "int8"}
    rows = []
    for (network, batch), of in runs[runs["rule"] == "memdfa"].groupby(["network", "batch_size"], sort=False):
        row = [f"{network}, {batch}"]
        for _, found in of.groupby("threads"):
            row += [f"{found.set_index('setting')['ratio'][setting]:.2f}" for setting in passes]
        own = alike[(alike["network"] == network) & (alike["rule"] == "memdfa")].set_index("setting")["ratio_alike"]
        names = "precision=bfloat16", "precision=bfloat16, pass1=int8"
        rows.append(row + [f"{own[name]:.2f}" if len(own) else "" for name in names])
    head = [f"{name}, {threads} threads" for threads in (1, 2) for name in passes.values()]
    show(["network, batch", *head, "all bfloat16", "and pass 1 int8"], rows)


def depth() -> None:
    """Microseconds a block and peak of BP and MEM-DFA against depth, of the committed bench on one thread."""
    table = pd.read_csv(REPORTS / "bench" / "deep" / "bench.csv")
    table["mib"] = table["peak_bytes"] / 2**20
    rows = []
    for network, runs in table.groupby("network", sort=False):
        by = runs.set_index("rule")
        times = [f"{by['us_a_block'][rule]:,.0f}" for rule in ("bp", "memdfa")]
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
