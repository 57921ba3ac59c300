"""Compare the time and memory of rules, in one process and as ratios to BP.

A machine's speed drifts, and other processes use it too. Each round therefore gives every contender one step, in a new
random order, and a ratio compares two steps of the same round. The median over rounds is reported, with the quartiles.

Images may be stored with the channels last or contiguously. Each contender tries both, and is timed in the faster one.
"""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from memdfa_lab.core.checks import check_int, lookup
from memdfa_lab.core.devices import CPU, module_of
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import ALL_RULES, find_rule
from memdfa_lab.lab import models
from memdfa_lab.lab.example import FEEDBACK, example_step, kind_for
from memdfa_lab.memory import measure
from memdfa_lab.memory.predict import kept_bytes
from memdfa_lab.rivals.binomial import fewest_snapshots
from memdfa_lab.rivals.reversible import Coupling

# network -> batch size; what `memdfa bench` runs if nothing else is asked for
NETWORKS = {
    "784-[800]x32-10": 128,
    "784-[256]x64-10": 2048,
    "784-[512]x32-10": 512,
    "mnist_conv": 100,
    "liao_cifar": 100,
    "vgg_16": 32,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NOISE = 0.1  # limit on the relative variation of BP's time


@dataclass(frozen=True)
class Contender:
    """A rule with its options; `setting` describes the options in a table."""

    rule: str
    feedback: str = "none"
    setting: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)


PLAIN = Contender("bp", setting="plain loop")  # a `PlainLoop`


class PlainLoop:
    """BP as in a loop of one's own: loss.backward(), one optimizer for all weights, fused if it can be, and no checks.

    It trains the network of `rule`, with the rule's loss and an optimizer of the rule's kind.
    """

    def __init__(self, rule: Rule):
        self.blocks, self.loss_fn = rule.blocks, rule.loss_fn
        self.optimizer = rule._make_optimizer(list(self.blocks.parameters()))
        for group in self.optimizer.param_groups:
            group.update({"fused": True, "foreach": False} if "fused" in group else {})

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Train the network on a batch, x (N, ...) and y (N,), and return the loss."""
        loss = self.loss_fn(self.blocks(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def contenders(
    rules: Sequence[str], kinds: Sequence[str], options: Mapping[str, Any] | None = None, passes: Sequence[str] = ()
) -> list[Contender]:
    """Return BP and the rules as contenders; a rule that uses feedback appears once with each kind.

    "learned" is a kind, too; a rule that cannot teach B appears with a stored one in its place.
    If `options` are given, each contender appears again with them; DFA and MEM-DFA also appear with each of `passes` as
    their `pass1`. Raises ValueError for unknown names.
    """
    found = [Contender("bp")]
    for kind in kinds:
        lookup("feedback", kind, FEEDBACK)
    for rule in dict.fromkeys(rules):
        own = [kind_for(rule, kind) for kind in kinds] if find_rule(rule).uses_feedback else ["none"]
        found += [Contender(rule, kind) for kind in own]
    found = list(dict.fromkeys(found))
    for one in list(found):
        for pass1 in [None, *(passes if find_rule(one.rule).teaches_feedback else ())]:
            given = {**(options or {}), **({"pass1": pass1} if pass1 else {})}
            setting = ", ".join(f"{name}={value}" for name, value in given.items())
            found += [Contender(one.rule, one.feedback, setting, given)] if given else []
    return found


def frontier(
    network: str, batch_size: int, kind: str = "regenerated", points: int = 5, passes: Sequence[str] = ()
) -> list[Contender]:
    """Return contenders that trade memory against time: BP, MEM-DFA, checkpointing, and other rivals.

    MEM-DFA appears with `points` values of keep_bytes, from 0 to all, and with feedback of this `kind`; it appears
    again with each of `passes` as its `pass1`, except where everything is kept. Checkpointing appears with growing
    numbers of segments, binomial checkpointing with the fewest snapshots if a block may run again 1, ..., 5 times.
    `Reversible` appears for a network with couplings. Raises ValueError for unknown names, a batch size below 1, and
    fewer than two points.
    """
    blocks = models.build(network)
    check_int("batch size", batch_size)
    check_int("points", points, 2)
    x = torch.empty(batch_size, *models.input_shape(network), device="meta")
    everything = sum(kept_bytes(blocks, x))
    found = [Contender("bp")]
    for pass1 in [None, *passes]:
        for k in range(points - (pass1 is not None)):
            part = k / (points - 1)
            options: dict[str, Any] = {"keep_bytes": math.inf if k == points - 1 else int(part * everything)}
            options |= {"pass1": pass1} if pass1 else {}
            found.append(Contender("memdfa", kind, f"keeps {part:.0%}", options))
    root = round(math.sqrt(len(blocks)))
    for segments in sorted({min(2, len(blocks)), max(1, root // 2), root, min(2 * root, len(blocks)), len(blocks)}):
        for rule in ("checkpoint", "checkpoint_step_in_backward"):
            found.append(Contender(rule, "none", counted(segments, "segment"), {"segments": segments}))
    for snapshots in sorted({fewest_snapshots(len(blocks), most) for most in range(1, 6)}):
        found.append(Contender("binomial", "none", counted(snapshots, "snapshot"), {"snapshots": snapshots}))
    coupled = any(isinstance(block, Coupling) and block.reversible for block in blocks)
    return found + [Contender(rule) for rule in (*(["reversible"] if coupled else []), "activation_offload", "mezo")]


def counted(number: int, of: str) -> str:
    """Return a number with what it counts: "1 thread", "2 threads"."""
    return f"{number} {of}" if number == 1 else f"{number} {of}s"


def bench(
    network: str,
    batch_size: int,
    against: Sequence[Contender] | None = None,
    optimizer: Any = "sgd",
    rounds: int = 9,
    warm_up: int = 2,
    seed: int = 0,
    threads: int | None = None,
    device: str = CPU,
) -> pd.DataFrame:
    """Return a row per contender: step time in seconds and its ratio to BP's (median, quartiles), and measured peak.

    The first row is always BP's; then come those of `against` (default: all rules and baselines, with regenerated
    feedback). The loss is the network's own. `optimizer`: a name in `ml.experiments.OPTIMIZERS`, used with a negligible
    learning rate, or a factory as for a rule. `threads`: the number of threads of torch; default: the present one.
    `device`: where the networks are; a step ends when the device has finished it. Further columns:

    - `ratio_alike`: the median of the ratio to BP with the same precision.
    - `layout`: the memory layout of images and filters, that of the fastest step in `warm_up` rounds with each layout.
    - `moved`: how much the time varied between rounds: the 90 % quantile over the 10 % quantile, minus 1.
    - `noisy`: whether BP's time varied by more than a tenth.

    Raises ValueError for unknown names, sizes below 1, and a device that is not there.
    """
    given = torch.get_num_threads() if threads is None else threads
    for name, value in (("batch size", batch_size), ("rounds", rounds), ("threads", given)):
        check_int(name, value)
    check_int("warm_up", warm_up, 0)
    against = contenders(list(ALL_RULES), ["regenerated"]) if against is None else against
    every = list(dict.fromkeys([Contender("bp"), *against]))
    steps = []
    for one in every:
        kind = "stored" if one.feedback == "none" else one.feedback
        steps.append(example_step(one.rule, network, batch_size, optimizer, kind, seed, device=device, **one.options))
    rules: list[Any] = [
        PlainLoop(rule) if one == PLAIN else rule for one, (rule, _, _) in zip(every, steps, strict=True)
    ]
    x, y = steps[0][1:]
    images = any(parameter.dim() == 4 for parameter in rules[0].blocks.parameters())
    inputs = {name: x.to(memory_format=layout) for name, layout in LAYOUTS.items() if images or name == "contiguous"}
    least = [dict.fromkeys(inputs, math.inf) for _ in every]
    seconds: list[list[float]] = [[] for _ in every]

    def timed(k: int, layout: str) -> float:
        if images:
            rules[k].blocks.to(memory_format=LAYOUTS[layout])
        gc.collect()  # so that none runs within a step
        wait()
        started = time.perf_counter()
        rules[k].step(inputs[layout], y)
        wait()
        return time.perf_counter() - started

    wait = module_of(device).synchronize
    order, before = np.random.default_rng(seed), torch.get_num_threads()
    gc.collect()
    gc.freeze()  # later collections skip the objects that exist now
    torch.set_num_threads(given)
    try:
        for _ in range(warm_up):
            for k in order.permutation(len(every)):
                for layout, fastest in least[k].items():
                    least[k][layout] = min(fastest, timed(k, layout))
        layouts = [min(tried, key=lambda layout: tried[layout]) for tried in least]
        for _ in range(rounds):
            for k in order.permutation(len(every)):
                seconds[k].append(timed(k, layouts[k]))
    finally:
        torch.set_num_threads(before)
        gc.unfreeze()

    rows = []
    bps = {_alike(one): taken for one, taken in zip(every, seconds, strict=True) if one.rule == "bp" and one != PLAIN}
    for one, rule, layout, taken in zip(every, rules, layouts, seconds, strict=True):
        alike = bps.get(_alike(one), seconds[0])
        fastest, low, median, high, slowest = np.quantile(taken, (0.1, 0.25, 0.5, 0.75, 0.9))
        ratio_low, ratio, ratio_high = np.quantile(np.divide(taken, seconds[0]), (0.25, 0.5, 0.75))
        rows.append(
            {
                "network": network,
                "batch_size": batch_size,
                "rule": one.rule,
                "feedback": one.feedback,
                "setting": one.setting,
                "pass1": one.options.get("pass1", ""),
                "median_s": median,
                "low_s": low,
                "high_s": high,
                "us_a_block": 1e6 * median / len(rule.blocks),
                "ratio": ratio,
                "ratio_low": ratio_low,
                "ratio_high": ratio_high,
                "ratio_alike": np.median(np.divide(taken, alike)),
                "peak_bytes": measure(rule, inputs[layout], y).peak_bytes,
                "channels_last": layout == "channels_last",
                "layout": layout,
                "moved": slowest / fastest - 1,
            }
        )
    table = pd.DataFrame(rows).assign(rounds=rounds, threads=given, device=device, torch=torch.__version__)
    return table.assign(noisy=bool(table["moved"][0] > NOISE))


def _alike(one: Contender) -> tuple[Any, ...]:
    """Return the options that BP also has: a contender is compared with BP under the same options."""
    return tuple(one.options.get(name) for name in ("precision", "clip_global_norm"))
