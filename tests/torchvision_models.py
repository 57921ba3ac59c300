"""Every classification model of torchvision, once; the table goes on where it stopped.

    python tests/torchvision_models.py  # reports/torchvision.csv

Each at the smallest image that it takes, batch 2, its dropout as it is: whether the blocks compute what it computes,
whether MEM-DFA's step is DFA's, bit for bit, and whether the predicted peak is the measured one.
"""

from __future__ import annotations

import copy
import csv
import warnings
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import nn
from torchvision import models

import memdfa_lab as ml

TABLE = Path(__file__).parents[1] / "reports" / "torchvision.csv"
SMALLEST = {"swin": 64, "maxvit": 224, "inception": 75, "alexnet": 64, "densenet": 64}  # of others: 32, two patches
LIMIT = 12 * 2**30  # bytes
COLUMNS = ["model", "image", "blocks", "same_outputs", "memdfa_is_dfa", "predicted_is_measured", "problem"]
SGD = partial(torch.optim.SGD, lr=1e-3)


def made(name: str) -> tuple[nn.Module, int]:
    """Return a model of 10 classes, and the side of the smallest image that it takes."""
    size = next((size for prefix, size in SMALLEST.items() if name.startswith(prefix)), 32)
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    if name.startswith("vit"):
        size = 2 * int(name.split("_")[-1])
        options = {"image_size": size}
    return models.get_model(name, num_classes=10, **options), size


def row(name: str) -> list[object] | None:
    """Return one model's line of the table; None if what others use leaves no memory for it."""
    torch.manual_seed(0)
    model, size = made(name)
    found: list[object] = [name, size]
    try:
        x, y, feedback = torch.randn(2, 3, size, size), torch.arange(2), ml.feedback.Regenerated(seed=0)
        predicted = ml.memory.predict("memdfa", model, tuple(x.shape), SGD, feedback)
        copies = 2 * sum(value.nbytes for value in model.state_dict().values())
        needed = ml.memory.predict("dfa", model, tuple(x.shape), SGD, feedback)
        if needed.peak_bytes + needed.resting_bytes + copies > LIMIT:
            raise MemoryError("the test needs more than 12 GiB")
        if needed.peak_bytes + needed.resting_bytes + copies > psutil.virtual_memory().available - 2**30:
            return None
        before = copy.deepcopy(model.state_dict())
        blocks = ml.as_blocks(model.eval())
        with torch.no_grad():
            found += [len(blocks), torch.equal(blocks(x), model(x))]
        model.train()
        for rule in (ml.DFA, ml.MemDFA):
            learner = rule(model, SGD, feedback=feedback)
            torch.manual_seed(1)
            learner.step(x, y)
            if rule is ml.DFA:
                dfas = {key: value.clone() for key, value in model.state_dict().items()}
                model.load_state_dict(before)
        found.append(all(torch.equal(value, dfas[key]) for key, value in model.state_dict().items()))
        found.append(predicted.peak_bytes == ml.memory.measure(learner, x, y).peak_bytes)
        found.append("")
    except Exception as problem:  # the table says what stops a model
        found += [""] * (6 - len(found)) + [" ".join(f"{type(problem).__name__}: {problem}".split())[:200]]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    done = [line[0] for line in csv.reader(TABLE.open())] if TABLE.exists() else []
    names = [name for name in models.list_models(module=models) if name not in done]
    for name in sorted(names, key=lambda name: models.get_model_weights(name).DEFAULT.meta["num_params"]):
        line = row(name)
        if line is not None:
            with TABLE.open("a", newline="") as file:
                if not done:
                    csv.writer(file).writerow(COLUMNS)
                    done = COLUMNS
                csv.writer(file).writerow(line)
