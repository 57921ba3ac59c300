"""A training run: its position, its next step, and everything needed to resume from there."""

import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import MemDFA
from memdfa_lab.lab import checkpoints
from memdfa_lab.lab.best import Best
from memdfa_lab.lab.checkpoints import Scheduler
from memdfa_lab.lab.datasets import as_input, as_target
from memdfa_lab.lab.distributed import Group
from memdfa_lab.lab.evaluation import evaluate
from memdfa_lab.lab.examples import Batches, Examples
from memdfa_lab.lab.schedules import step_all
from memdfa_lab.lab.tasks import Task

TRAIN_ACCURACY_ON = 10_000  # metrics of training are on this many examples, the first ones


class Run:
    """The training of a rule on examples, between one step and the next."""

    PROGRESS = ("epoch", "batch", "examples", "loss_sum", "seconds", "rows")

    def __init__(self, rule: Rule, train: Examples, test: Examples | None):
        self.rule, self.train, self.test = rule, train, test
        self.group = rule.group if isinstance(rule.group, Group) else Group()
        self.batches = train.batches_in_epoch
        self.coming: Batches | None = None  # the rest of this epoch's batches
        self.losses: Generator[Tensor, None, None] | None = None  # of the steps on them
        self.taken: deque[tuple[int, str]] = deque()  # size and fingerprint of each batch that was read for a step
        self.last = ""  # fingerprint of the last step's batch
        self.task: Task | None = None
        self.metrics: dict[str, Any] = {}
        self.best: Best | None = None
        self.schedulers: list[Scheduler] = []
        self.each_batch = False  # whether the schedulers step after each batch
        self.epoch = self.batch = self.examples = 0
        self.loss_sum = self.seconds = 0.0
        self.rows: list[dict[str, float]] = []

    def step(self) -> bool:
        """Train on the next batch of this epoch; return False if there is none."""
        started = time.perf_counter()
        if self.losses is None:
            self.coming = self.train.batches(self.epoch, self.batch)
            self.losses = _losses(self.rule, self._parts(self.coming))
        loss = next(self.losses, None)
        if loss is None:
            return False
        n, self.last = self.taken.popleft()
        self.group.idle = False
        self.loss_sum += loss.item() * n
        self.examples += n
        if self.each_batch:
            step_all(self.schedulers, loss.item())
        self.seconds += time.perf_counter() - started
        self.batch += 1
        return True

    def _parts(self, batches: Batches) -> Batches:
        """Yield this rank's part of each batch. With several ranks, the first batch must be the same on all of them."""
        group, like = self.group, next(self.rule.blocks.parameters())
        for batch, (x, y) in enumerate(batches, self.batch):
            self.taken.append((len(x), self.train.last))
            if group.size > 1:
                if batch == 0:
                    group.agree(**{"the first batch": self.train.last})
                mine = group.part(torch.arange(len(x)))
                x, y = x[mine], y[mine]
            group.draw_apart(self.train.seed, self.epoch, batch)
            yield as_input(x, like), as_target(y, like)

    def close(self) -> None:
        """End the processes that load batches."""
        for generator in (self.losses, self.coming):
            if generator is not None:
                generator.close()
        self.losses = self.coming = None

    def finish_epoch(self, on_epoch: Callable[[Rule, int], Mapping[str, float] | None] | None) -> None:
        """Evaluate, then step the schedulers and add a row to the history; only the evaluation may be interrupted."""
        loss = self.loss_sum / self.examples
        self.group.share_buffers(self.rule.blocks)
        row = {"epoch": self.epoch + 1, "loss": loss}
        batches = {"train": self.train.first(TRAIN_ACCURACY_ON), "test": () if self.test is None else self.test.first()}
        score = partial(evaluate, self.rule, self.metrics, self.task, self.group)
        scores = {part: score(of_part) for part, of_part in batches.items()}
        row |= {f"{part}_{name}": scores[part][name] for name in self.metrics for part in scores}
        if not self.each_batch:
            step_all(self.schedulers, loss)
        self.epoch += 1
        row["seconds"] = self.seconds
        if on_epoch is not None:
            row |= {name: float(value) for name, value in (on_epoch(self.rule, self.epoch) or {}).items()}
        self.rows.append(row)
        if self.best is not None:
            self.best.see(row, self.rule.blocks)
        self.batch, self.examples, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0
        self.close()

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        progress = {name: getattr(self, name) for name in self.PROGRESS}
        progress |= {"last": self.last, "best": vars(self.best) if self.best is not None else None}
        checkpoints.write(path, settings, self.rule, self.schedulers, progress)

    def load(self, path: Path, settings: dict[str, Any], epochs: int) -> None:
        progress = checkpoints.restore(path, settings, self.rule, self.schedulers, epochs)
        self.last, best = progress.pop("last"), progress.pop("best")
        if self.best is not None:
            self.best = Best(**best)
        self.train.last = self.last
        for name, value in progress.items():
            setattr(self, name, value)


def _losses(rule: Rule, batches: Batches) -> Generator[Tensor, None, None]:
    """Learn from each batch, and yield its loss. With a store, `sweep` loads the weights only once per step."""
    if isinstance(rule, MemDFA) and rule.store.offloads and rule.clip_global_norm is None:
        yield from rule.sweep(batches)
    else:
        for x, y in batches:
            yield rule.step(x, y)
