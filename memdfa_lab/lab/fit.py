"""Training over epochs: batches in a repeatable order, evaluation, history, checkpoints that resume bit for bit."""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, check_type, lookup
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.seeds import LARGEST_SEED
from memdfa_lab.lab import checkpoints
from memdfa_lab.lab.ahead import look_ahead
from memdfa_lab.lab.best import Best
from memdfa_lab.lab.checkpoints import Scheduler
from memdfa_lab.lab.distributed import digest
from memdfa_lab.lab.examples import examples_of
from memdfa_lab.lab.history import History
from memdfa_lab.lab.run import Run
from memdfa_lab.lab.schedules import schedulers_of
from memdfa_lab.lab.terminal import BlockShown, LoadingInterrupted, ctrl_c_noted, progress_bar


def fit(
    rule: Rule,
    data: Any,
    epochs: int,
    batch_size: int | None = None,
    *,
    test: Any = None,
    seed: int = 0,
    drop_last: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    task: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], Scheduler] | None = None,
    scheduler_each: str = "epoch",
    stop_after: int | None = None,
    monitor: str = "test_loss",
    checkpoint: str | Path | None = None,
    overwrite: bool = False,
    save_every_s: float = 60.0,
    progress: bool = True,
    on_epoch: Callable[[Rule, int], Mapping[str, float] | None] | None = None,
) -> History:
    """Train for `epochs` epochs and return the history.

    `data`: (x, y), tensors or arrays; a torch Dataset with items (x, y); a DataLoader; or what `ml.datasets.load`
    returns. `test`: data of these kinds, by default the test part of data from `ml.datasets`. The network trains in
    training mode, on the device and in the dtype of its weights; inputs of whole numbers are not converted. Batches
    have `batch_size` examples, 100 by default; the last one of an epoch may be shorter, and `drop_last` leaves it out.
    A DataLoader has its own order and sizes. `augment`: a function of a batch x, such as
    `ml.datasets.flip_and_crop()`.

    `task`: one of `ml.tasks.TASKS`; default: that of a loss of torch or `ml.losses`, and none for any other loss.
    `metrics`: a dict by name. A metric is an object with update(outputs, y), compute() and reset(), as in torchmetrics,
    which gets the classes in dimension 1 and labels as whole numbers; or a function of outputs and y that returns a
    mean over the batch, such as F.cross_entropy. Each adds the columns train_NAME and test_NAME to the history.

    `scheduler` makes a learning-rate scheduler for an optimizer. It steps after each epoch, ReduceLROnPlateau by the
    epoch's loss, or with `scheduler_each="batch"` after each batch, as OneCycleLR and a warm-up do. A B that learns
    keeps its own learning rate.

    `stop_after`: end after this many epochs without a better value of `monitor`, a test column of the history. For
    test_loss the loss becomes a metric; any other metric needs an attribute `higher_is_better`. At the end, the weights
    and buffers of the best epoch are restored from a copy. Data used in this way is no longer test data: use
    `data.holdout()`.

    The order of the examples depends only on (seed, epoch). What the items of a Dataset, a DataLoader and `augment`
    draw from the generators of torch, numpy and Python depends on (seed, epoch, batch); a DataLoader's own generator,
    if it has one, is seeded from that and its initial seed. Dropout draws from torch's global generator, so call
    `torch.manual_seed` before building the rule.

    `checkpoint`: a file that is written after each epoch, every `save_every_s` seconds within one, and on Ctrl-C after
    the running step. If it exists, training resumes from it, with the result of an uninterrupted run, bit for bit;
    `overwrite=True` starts anew. A DataLoader reads the epoch again from its start to where it stopped. The result may
    differ if batches depend on anything else, such as the state of persistent workers, a sampler with its own
    generator of numpy, or a stream. A warning is given if the last batch has changed. For a rule with `offload`,
    `checkpoint` must be the store's folder, which then keeps the run together with the network.
    `on_epoch(rule, epoch)` is called after each epoch, from 1 on; the numbers that it returns by name, if any, become
    columns of the history.

    If `rule.group` has several ranks (`ml.distributed`), each calls this with the same arguments, reads the same
    batches and takes its part of each; `batch_size`, loss and metrics are of the whole batch. The first rank writes
    the checkpoint and all read it; a run may resume with another number of ranks. Dropout is then drawn from (seed,
    epoch, batch, rank), and evaluation uses the first rank's BatchNorm statistics.

    Raises, before the first step, TypeError for a rule, data, metric or function of another type, such as a generator,
    which can be read only once; ValueError for sizes below 1, a batch size beside a DataLoader's own, x and y of
    different lengths, outputs or labels that do not fit the task or a metric, a last batch that is too short for
    BatchNorm, a checkpoint that is damaged or belongs to another setting, or ranks that differ; FloatingPointError
    for NaN or inf in data in memory, or in the first batch of others. Later RankLost if another rank ends;
    KeyboardInterrupt on Ctrl-C, after the checkpoint; and whatever `rule.step` raises.
    """
    epochs = check_int("epochs", epochs)
    if batch_size is not None:
        batch_size = check_int("batch_size", batch_size)
    seed = check_int("seed", seed, 0, LARGEST_SEED)
    check_type("rule", rule, Rule, "a rule, such as ml.MemDFA(model, optimizer)")
    check_type("drop_last", drop_last, bool, "True or False")
    for name, function in (("scheduler", scheduler), ("on_epoch", on_epoch), ("augment", augment)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function, not a {type(function).__name__}")
    lookup("scheduler_each", scheduler_each, dict.fromkeys(("epoch", "batch")))
    check_int("stop_after", 1 if stop_after is None else stop_after)
    check_type("metrics", metrics or {}, Mapping, 'a dict such as {"name": metric}')
    train = examples_of(data, batch_size, seed, drop_last, augment)
    held_out = data if test is None and hasattr(data, "x_test") else test
    run = Run(rule, train, None if held_out is None else examples_of(held_out, batch_size, part="test"))
    run.each_batch, steps = scheduler_each == "batch", epochs * (run.batches or 0)
    run.schedulers = schedulers_of(scheduler, rule, scheduler_each, steps if run.each_batch else epochs)
    settings = checkpoints.settings_of(rule, run.schedulers, train)
    settings |= {"scheduler_each": scheduler_each, "stop_after": stop_after and f"{stop_after} by {monitor}"}
    path = checkpoints.checked(checkpoint, rule, stop_after)
    group = run.group
    group.agree(**settings, epochs=epochs)
    rule.blocks.train()
    by_loss = {"loss": rule.loss_fn} if stop_after is not None and monitor == "test_loss" else {}
    run.task, run.metrics = look_ahead(rule, train, run.test, group, task, by_loss | dict(metrics or {}))
    if stop_after is not None:
        run.best = Best.of(monitor, run.metrics, stop_after, run.test)
    if path is not None and checkpoints.is_there(path, rule) and not overwrite:
        run.load(path, settings, epochs)
    if group.size > 1:  # nothing is written before all have read
        group.agree(**{"where training begins": (run.epoch, run.batch), "weights": digest(*rule.blocks.parameters())})
    written = path if group.rank == 0 else None

    saved_at = time.monotonic()
    kept, bar = checkpoints.kept(written, rule), progress_bar(steps or None, progress and group.rank == 0)
    with kept, ctrl_c_noted() as ctrl_c, bar, BlockShown(bar, len(rule.chain)), closing(run):
        bar.update(run.epoch * (run.batches or 0) + run.batch)
        for examples in (train, train if run.test is None else run.test):
            examples.ctrl_c = ctrl_c
        while run.epoch < epochs and not (run.best is not None and run.best.is_over(run.epoch)):
            group.asked = bool(ctrl_c)
            try:
                within_epoch = run.step()
                if within_epoch:
                    bar.update()
                else:
                    run.finish_epoch(on_epoch)
                    row = run.rows[-1]
                    bar.set_postfix({name: row[name] for name in ("loss", "test_accuracy") if name in row})
            except LoadingInterrupted:  # nothing has changed since the last step
                if group.size > 1:
                    raise
            # Ranks stop together, after a step before which one of them was asked to stop.
            stop = bool(ctrl_c) if group.size == 1 else within_epoch and group.stop
            save = stop or not within_epoch or rule.store.due or time.monotonic() - saved_at > save_every_s
            if written is not None and save:
                run.save(written, settings)
                saved_at = time.monotonic()
            if stop:
                raise KeyboardInterrupt
    if run.best is not None and run.best.weights:
        rule.blocks.load_state_dict(run.best.weights)
    return History(run.rows)
