"""Every classification model of torchvision, once; the table goes on where it stopped.

    python tests/torchvision_models.py  # reports/torchvision.csv

Each at the smallest image that it takes, batch 2, its dropout as it is: whether the blocks compute what it computes,
whether MEM-DFA's step is DFA's, bit for bit, and whether the predicted peak is the measured one.
"""

from __future__ import annotations

import copy
import csv
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models

import memdfa_lab as ml

TABLE = Path(__file__).parents[1] / "reports" / "torchvision.csv"
SMALLEST = {"swin": 64, "maxvit": 224, "inception": 75, "alexnet": 64, "densenet": 64}  # of others: 32, two patches
RULES = ("dfa", "memdfa")
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


def answers(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Any = F.cross_entropy) -> list[object] | None:
    """Return the columns from `blocks` on; None if what others use leaves no memory for it."""
    found: list[object] = []
    try:
        feedback = ml.feedback.Regenerated(seed=0)
        shapes = {"x_shape": tuple(x.shape), "x_dtype": x.dtype, "y_shape": tuple(y.shape), "y_dtype": y.dtype}
        foreseen = [
            ml.memory.predict(n, model, optimizer=SGD, feedback=feedback, loss_fn=loss_fn, **shapes) for n in RULES
        ]
        copies = 2 * sum(value.nbytes for value in model.state_dict().values())
        needed = foreseen[0].peak_bytes + foreseen[0].resting_bytes + copies
        if needed > LIMIT:
            raise MemoryError(f"this needs {needed / 2**30:.1f} GiB, more than 12: not run")
        if needed > psutil.virtual_memory().available - 2**30:
            return None
        before = copy.deepcopy(model.state_dict())
        blocks = ml.as_blocks(model.eval())
        with torch.no_grad():
            found += [len(blocks), torch.equal(blocks(x), model(x))]
        model.train()
        states = []
        for name in RULES:
            model.load_state_dict(before)
            learner = ml.RULES[name](model, SGD, loss_fn=loss_fn, feedback=feedback)
            torch.manual_seed(1)
            learner.step(x, y)
            states.append(model.state_dict() if states else copy.deepcopy(model.state_dict()))
        found.append(all(torch.equal(value, states[1][key]) for key, value in states[0].items()))
        found.append(foreseen[1].peak_bytes == ml.memory.measure(learner, x, y).peak_bytes)
        return [*found, ""]
    except Exception as problem:  # the table says what stops a model
        why = re.sub(r"/\S*site-packages/", "", " ".join(str(problem).split()))
        return found + [""] * (4 - len(found)) + [why.partition("; pass a list")[0]]


def row(name: str) -> list[object] | None:
    """Return one model's line of the table, if there is memory for it."""
    torch.manual_seed(0)
    model, size = made(name)
    found = answers(model, torch.randn(2, 3, size, size), torch.arange(2))
    return found and [name, size, *found]


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
