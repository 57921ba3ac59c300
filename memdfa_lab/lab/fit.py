"""Epochs over a dataset: batches in a repeatable order, evaluation, history, checkpoints that resume bit for bit."""

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from memdfa_lab.core.checks import check_int, check_type
from memdfa_lab.core.rule import Rule
from memdfa_lab.lab import checkpoints
from memdfa_lab.lab.checkpoints import Scheduler
from memdfa_lab.lab.datasets import check_data
from memdfa_lab.lab.distributed import Group, digest
from memdfa_lab.lab.files import locked, write_text
from memdfa_lab.lab.interrupt import interrupt_after_step

if TYPE_CHECKING:
    import pandas as pd

    from memdfa_lab.lab.datasets import Data

TRAIN_ACCURACY_ON = 10_000  # as many training examples, the first ones, tell the training accuracy


@dataclass
class History:
    """What came of each epoch, a dict a row: epoch, loss (mean over the epoch), accuracies, seconds of training."""

    rows: list[dict[str, float]] = field(default_factory=list)

    @property
    def table(self) -> "pd.DataFrame":
        """The rows as a pandas table."""
        import pandas as pd

        columns = dict.fromkeys(["epoch", "loss", "train_accuracy", "test_accuracy", "seconds"])
        columns |= dict.fromkeys(name for row in self.rows for name in row)  # what on_epoch adds
        return pd.DataFrame(self.rows, columns=list(columns)).astype({"epoch": int})

    def to_csv(self, path: str | Path) -> None:
        """Write the table, whole or not at all."""
        write_text(path, self.table.to_csv(index=False))


def fit(
    rule: Rule,
    data: "Data",
    epochs: int,
    batch_size: int = 100,
    *,
    seed: int = 0,
    scheduler: Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    checkpoint: str | Path | None = None,
    overwrite: bool = False,
    save_every_s: float = 60.0,
    progress: bool = True,
    on_epoch: Callable[[Rule, int], Mapping[str, float]] | None = None,
) -> History:
    """Train for `epochs` epochs and return the history.

    The order of the examples depends on (seed, epoch) alone; dropout draws from torch's global generator, so call
    `torch.manual_seed` before building the rule. The last batch of an epoch may be shorter. `scheduler` makes a
    learning-rate scheduler for an optimizer; it steps once an epoch, ReduceLROnPlateau by the epoch's loss.
    `checkpoint`: a file that is written after each epoch, every `save_every_s` seconds within one, and on Ctrl-C, after
    the running step. If it is there already, training goes on where it stopped, with the result of a run that was never
    cut; `overwrite=True` starts anew. The network trains in training mode, on the device and in the dtype of its
    weights. `on_epoch(rule, epoch)` is called after each epoch, from 1 on; the numbers that it returns by name become
    columns of the history.

    If `rule.group` has several ranks (`ml.distributed`), each calls this with the same arguments and takes its part of
    every batch; `batch_size`, loss and accuracies are of the whole. The first rank writes the checkpoint and all read
    it; a run may go on with another number of ranks. Dropout is then drawn from (seed, epoch, batch, rank), and
    evaluation is with the first rank's BatchNorm statistics.

    Raises ValueError for sizes below 1, a checkpoint that is damaged or belongs to another setting, or ranks that
    differ in settings or weights; RankLost if another rank ends; and whatever `rule.step` raises.
    """
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        check_int(name, value, least)
    if not isinstance(rule, Rule):
        raise TypeError(f"fit takes a rule, such as ml.MemDFA(model, optimizer), not a {type(rule).__name__}")
    check_data("fit", data)
    for name, function in (("scheduler", scheduler), ("on_epoch", on_epoch)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not a {type(function).__name__}")
    group = rule.group if isinstance(rule.group, Group) else Group()
    run = _Run(rule, group, [scheduler(made) for made in rule.optimizers if made is not None] if scheduler else [])
    for made in run.schedulers:
        check_type("what scheduler returns", made, Scheduler, "a scheduler of torch.optim.lr_scheduler")
    settings = checkpoints.settings_of(rule, run.schedulers, data, batch_size, seed)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.is_dir():
        raise ValueError(f"checkpoint {path} is a folder: name a file in it, such as {path / 'checkpoint.pt'}")
    group.agree(**settings, epochs=epochs)
    if path is not None and path.exists() and not overwrite:
        run.load(path, settings, epochs)
    if group.size > 1:  # nothing is written before all have read
        group.agree(**{"where training begins": (run.epoch, run.batch), "weights": digest(*rule.blocks.parameters())})
    written = path if group.rank == 0 else None
    rule.blocks.train()

    like = next(rule.blocks.parameters())
    batches = -(-len(data.x_train) // batch_size)
    saved_at = time.monotonic()
    lock = nullcontext() if written is None else locked(written)
    shown = progress and group.rank == 0
    with lock, interrupt_after_step() as interrupt, _bar(epochs * batches, shown) as bar:
        bar.update(run.epoch * batches + run.batch)
        while run.epoch < epochs:
            order = _order(len(data.x_train), seed, run.epoch)
            while run.batch < batches:
                chosen = order[run.batch * batch_size : (run.batch + 1) * batch_size]
                started = time.perf_counter()
                mine = group.part(chosen)
                group.draw_apart(seed, run.epoch, run.batch)
                group.asked = interrupt.asked
                loss = rule.step(data.x_train[mine].to(like), data.y_train[mine].to(like.device))
                group.idle = False
                run.loss_sum += loss.item() * len(chosen)
                run.seconds += time.perf_counter() - started
                run.batch += 1
                bar.update()
                stop = interrupt.asked if group.size == 1 else group.stop
                if written is not None and (stop or time.monotonic() - saved_at > save_every_s):
                    run.save(written, settings)
                    saved_at = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
            run.finish_epoch(data, on_epoch)
            bar.set_postfix(loss=run.rows[-1]["loss"], test=run.rows[-1]["test_accuracy"])
            if written is not None:
                run.save(written, settings)
                saved_at = time.monotonic()
            if interrupt.asked and group.size == 1:  # while the epoch was evaluated; ranks stop together, after a step
                raise KeyboardInterrupt
    return History(run.rows)


def predict(model: Rule | nn.Module, x: Tensor, batch_size: int = 1000) -> Tensor:
    """Return the network's output (N, C) for x (N, ...), in eval mode and in batches; the mode is put back."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor (N, ...), not a {type(x).__name__}: use torch.as_tensor")
    check_int("batch_size", batch_size)
    blocks = model.blocks if isinstance(model, Rule) else model
    like = next(blocks.parameters())
    modes = [(module, module.training) for module in blocks.modules()]
    blocks.eval()
    try:
        with torch.no_grad():
            return torch.cat([blocks(batch.to(like)) for batch in x.split(batch_size)])
    finally:
        for module, training in modes:
            module.training = training


def accuracy(model: Rule | nn.Module, x: Tensor, y: Tensor, batch_size: int = 1000) -> float:
    """Return the part of the examples x (N, ...) whose largest output is the label y (N,).

    Raises ValueError if there is no example, or not a label for each.
    """
    if not isinstance(y, Tensor) or y.shape != (len(x),) or not len(x):
        given = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise ValueError(f"y must be a tensor of {len(x)} labels, one or more, one for each example; got {given}")
    return (predict(model, x, batch_size).argmax(1).cpu() == y.cpu()).float().mean().item()


@dataclass
class _Run:
    """Where a training run is, and all that it takes to go on from there."""

    rule: Rule
    group: Group
    schedulers: list[Scheduler]
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)

    def finish_epoch(self, data: "Data", on_epoch: Callable[[Rule, int], Mapping[str, float]] | None) -> None:
        loss = self.loss_sum / len(data.x_train)
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()
        self.epoch += 1
        self.group.share_buffers(self.rule.blocks)
        seen = slice(TRAIN_ACCURACY_ON)
        row = {
            "epoch": self.epoch,
            "loss": loss,
            "train_accuracy": self._accuracy(data.x_train[seen], data.y_train[seen]),
            "test_accuracy": self._accuracy(data.x_test, data.y_test),
            "seconds": self.seconds,
        }
        if on_epoch is not None:
            row |= {name: float(value) for name, value in on_epoch(self.rule, self.epoch).items()}
        self.rows.append(row)
        self.batch, self.loss_sum, self.seconds = 0, 0.0, 0.0

    def _accuracy(self, x: Tensor, y: Tensor) -> float:
        """Return the accuracy on all examples, of which each rank looks at a part."""
        group = self.group
        x, y = (tensor.tensor_split(group.size)[group.rank] for tensor in (x, y))
        return group.mean(accuracy(self.rule, x, y) if len(x) else 0.0, len(x))

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        progress = {name: getattr(self, name) for name in ("epoch", "batch", "loss_sum", "seconds", "rows")}
        checkpoints.write(path, settings, self.rule, self.schedulers, progress)

    def load(self, path: Path, settings: dict[str, Any], epochs: int) -> None:
        state = checkpoints.read(path, settings, epochs)
        self.rule.load_state_dict(state["rule"])
        for scheduler, value in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(value)
        torch.set_rng_state(state["generators"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["generators"]["cuda"])
        for name, value in state["progress"].items():
            setattr(self, name, value)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def _bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm
    from tqdm.notebook import tqdm_notebook

    seen = sys.stderr.isatty() or issubclass(tqdm, tqdm_notebook)  # in a log file, a bar is noise
    wanted = progress and seen and not os.environ.get("TQDM_DISABLE")  # tqdm.notebook ignores it
    return tqdm(total=total, disable=not wanted, unit="batch", leave=False)
