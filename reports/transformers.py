"""Train the two transformers by each rule, and go on where that was cut: `python reports/transformers.py`.

CIFAR-10 is looked for where `ml.datasets.load` does ($MEMDFA_DATA); the text is Python's own documentation. Runs are in
reports/runs/transformers; the tables that they make, in reports/paper: transformers.csv (a row an epoch) and
transformers_choices.csv (a row a trial of a learning rate, on held-out training examples).
"""

import hashlib
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import pandas as pd
import torch
import torch.nn.functional as F

import memdfa_lab as ml
from memdfa_lab.core.rules import ALL_RULES

REPORTS = Path(__file__).resolve().parent
RUNS, TABLES = REPORTS / "runs" / "transformers", REPORTS / "paper"
LENGTH, LRS, SEARCH_EPOCHS = 64, (3e-4, 1e-3, 3e-3, 1e-2), 2
EPOCHS, BATCH = {"gpt": 6, "vit": 3}, {"gpt": 32, "vit": 64}
LOSS = {"gpt": ml.losses.token_cross_entropy, "vit": F.cross_entropy}
NETWORK = {"gpt": partial(ml.models.gpt, 128, LENGTH), "vit": partial(ml.models.vit, (3, 32, 32), 10)}
# in order of value: network, rule, seed
PLAN = [(network, rule, 0) for network in ("vit", "gpt") for rule in ("bp", "memdfa")]
PLAN += [(network, rule, 0) for rule in ("dfa", "last_layer", "fa") for network in ("gpt", "vit")]
PLAN += [("gpt", rule, seed) for seed in (1, 2) for rule in ("bp", "memdfa", "fa", "last_layer")]


@cache
def data(network, searching):
    """Return (x, y) to train on and to test on; in a search, both are of the training examples."""
    if network == "gpt":
        letters = torch.tensor(list(" ".join(topics.values()).encode("ascii", "replace")))
        n = (len(letters) - 1) // LENGTH
        x, y = letters[: n * LENGTH].view(n, LENGTH), letters[1 : n * LENGTH + 1].view(n, LENGTH)
        end = n * 9 // 10  # the last tenth is the test
        start, end = (end * 9 // 10, end) if searching else (end, n)
        return (x[:start], y[:start]), (x[start:end], y[start:end])
    images = ml.datasets.load("cifar10").subset(train=5_000 if searching else 10_000, test=2_000)
    images = images.holdout(0.2) if searching else images
    return (images.x_train, images.y_train), (images.x_test, images.y_test)


def train(network, rule, seed, lr, epochs, searching):
    """Return the history of a run as a table; it is read, if the run was made before."""
    folder = RUNS / network / f"{rule}-{seed}-{lr:g}-{'search' if searching else epochs}"
    if not (folder / "history.csv").exists():
        examples, test = data(network, searching)
        learner = ALL_RULES[rule](
            NETWORK[network](seed=seed),
            partial(torch.optim.Adam, lr=lr),
            loss_fn=LOSS[network],
            feedback=ml.feedback.Regenerated(seed),
        )
        steps = epochs * -(-len(examples[0]) // BATCH[network])
        history = ml.fit(
            learner,
            examples,
            epochs,
            BATCH[network],
            test=test,
            seed=seed,
            metrics={"loss": LOSS[network]},
            scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
            scheduler_each="batch",
            checkpoint=folder / "checkpoint.pt",
            progress=False,
        )
        state = b"".join(p.detach().numpy().tobytes() for p in learner.blocks.parameters())
        history.table.assign(weights=hashlib.sha256(state).hexdigest()[:16]).to_csv(folder / "history.csv", index=False)
        (folder / "checkpoint.pt").unlink()
    return pd.read_csv(folder / "history.csv")


def of_counts(before):
    """Return the test loss of a table of counts: how often a letter follows the one or two (`before`) before it."""
    (x, y), (x_test, y_test) = data("gpt", False)
    row, row_test = x, x_test
    if before == 2:
        row, row_test = (z + 128 * F.pad(z, (1, 0))[:, :-1] for z in (x, x_test))
    counts = torch.full((128**before, 128), 0.01)  # no letter is impossible
    counts.view(-1).index_add_(0, (128 * row + y).flatten(), torch.ones(y.numel()))
    return F.cross_entropy(counts[row_test.flatten()].log(), y_test.flatten()).item()


def main():
    print("loss of tables of counts:", of_counts(1), of_counts(2))
    histories, choices = [], []
    for network, rule, seed in PLAN:
        tried = "dfa" if rule == "memdfa" else rule  # their updates are the same
        found = {lr: train(network, tried, 0, lr, SEARCH_EPOCHS, True)["test_loss"].iloc[-1] for lr in LRS}
        if (network, tried) not in [row[:2] for row in choices]:
            choices += [(network, tried, lr, loss) for lr, loss in found.items()]
        best = min(found, key=found.get)
        print(network, rule, seed, found, flush=True)
        table = train(network, rule, seed, best, EPOCHS[network], False)
        print(table.drop(columns="weights").iloc[-1].to_dict(), flush=True)
        histories.append(table.assign(network=network, rule=rule, seed=seed, lr=best))
        table = pd.concat(histories, ignore_index=True)
        first = ["network", "rule", "seed", "lr"]
        table[[*first, *table.columns.drop(first)]].to_csv(TABLES / "transformers.csv", index=False)
        choices_table = pd.DataFrame(choices, columns=["network", "rule", "lr", "held_out_loss"])
        choices_table.to_csv(TABLES / "transformers_choices.csv", index=False)


if __name__ == "__main__":
    main()
