"""Every classification model of torchvision, once; the table goes on where it stopped.

    python tests/torchvision_models.py  # reports/torchvision.csv

Each at the smallest image that it takes, batch 2, its dropout as it is: whether the blocks compute what it computes,
whether MEM-DFA's step is DFA's, bit for bit, and whether the predicted peak is the measured one.
"""

from __future__ import annotations

import csv
import warnings
from functools import partial
from pathlib import Path

import torch
from torchvision import models

import memdfa_lab as ml

TABLE = Path(__file__).parents[1] / "reports" / "torchvision.csv"
SMALLEST = {"vit": 224, "swin": 64, "maxvit": 224, "inception": 75, "alexnet": 64, "densenet": 64, "vit_h": 518}
COLUMNS = ["model", "image", "blocks", "same_outputs", "memdfa_is_dfa", "predicted_is_measured", "problem"]
SGD = partial(torch.optim.SGD, lr=1e-3)


def row(name: str) -> list[object]:
    """Return one model's line of the table."""
    size = [size for prefix, size in SMALLEST.items() if name.startswith(prefix)]
    size = size[-1] if size else 32
    given = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    found: list[object] = [name, size]
    try:
        torch.manual_seed(0)
        model, x, y = models.get_model(name, num_classes=10, **given), torch.randn(2, 3, size, size), torch.arange(2)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        blocks = ml.as_blocks(model.eval())
        with torch.no_grad():
            found += [len(blocks), torch.equal(blocks(x), model(x))]
        model.train()
        states = []
        for rule in (ml.DFA, ml.MemDFA):
            model.load_state_dict(before)
            learner = rule(model, SGD, feedback=ml.feedback.Regenerated(seed=0))
            torch.manual_seed(1)
            learner.step(x, y)
            states.append({key: value.clone() for key, value in model.state_dict().items()})
        found.append(all(torch.equal(value, states[1][key]) for key, value in states[0].items()))
        feedback = ml.feedback.Regenerated(seed=0)
        predicted = ml.memory.predict("memdfa", model, tuple(x.shape), SGD, feedback)
        found.append(predicted.peak_bytes == ml.memory.measure(learner, x, y).peak_bytes)
    except Exception as problem:  # the table says what stops a model
        found += [""] * (6 - len(found)) + [" ".join(f"{type(problem).__name__}: {problem}".split())[:200]]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    done = [line[0] for line in csv.reader(TABLE.open())] if TABLE.exists() else []
    names = models.list_models(module=models)
    for name in names:
        if name in done or any(large in name for large in ("regnet_y_128", "vit_h", "vit_l", "vgg")):
            continue
        with TABLE.open("a", newline="") as file:
            if not done:
                csv.writer(file).writerow(COLUMNS)
                done = COLUMNS
            csv.writer(file).writerow(row(name))
