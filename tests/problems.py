"""One list of small nets with data and loss, over which the tests parametrise; a new trap adds a problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core import feedback
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import losses
from memdfa_lab.rivals import BASELINES

CLASSES = 5


@dataclass(frozen=True)
class Problem:
    """A net, a batch and a loss; `build()` gives the same fresh net every time and leaves the global RNG alone."""

    name: str
    make: Callable[[], nn.Module] = field(repr=False)
    shape: tuple[int, ...]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    dtype: torch.dtype = torch.float32
    random: bool = False  # draws from the global RNG in each step
    twin: bool = False  # made of layers that reference.py has in numpy
    batch: int = 6
    marks: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.make().to(self.dtype)

    @property
    def x(self) -> Tensor:
        return torch.randn(self.batch, *self.shape, dtype=self.dtype, generator=torch.Generator().manual_seed(2))

    @property
    def y(self) -> Tensor:
        return torch.tensor(([0, 3, 4, 1, 2, 3] * -(-self.batch // 6))[: self.batch])

    def batches(self, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield another batch each step; every third one is short, as the last of an epoch is."""
        for step in range(steps):
            size = max(self.batch - 2, 2) if step % 3 == 2 else self.batch
            yield self.x.roll(step, 0)[:size] * (1 + 0.1 * step), self.y[:size]

    def double(self) -> Problem:
        return replace(self, dtype=torch.float64)


class Residual(nn.Module):
    """A residual unit: two convolutions and a skip, with a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, inplace: bool = False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=inplace),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)
        self.activation = nn.ReLU(inplace=inplace)

    def forward(self, h: Tensor) -> Tensor:
        return self.activation(self.body(h) + self.skip(h))


class Skip(nn.Sequential):
    """A residual unit of layers that keep the shape: a Sequential with a forward of its own, no chain."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class Partial(nn.Module):
    """A unit with a weight that it does not use, and one that it uses twice."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return self.used(torch.tanh(self.used(h)))


class ChannelsLast(nn.Conv2d):
    """A convolution that puts out channels-last images."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h).contiguous(memory_format=torch.channels_last)


class Words(nn.Module):
    """The mean over the words of a sentence (N, T) of what an embedding has for each."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.table = nn.Embedding(11, 6, sparse=sparse)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words.long()).mean(1)


class FlattenLinear(nn.Linear):
    """A block that begins with a feature map, so that e B_i is one."""

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.flatten(1))


# The nets, a list a block.


def _mlp(activation: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 10), activation(), nn.Linear(10, CLASSES))


def _conv_pool() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU()]
    second = [nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, stride=2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(6, CLASSES))


def _batchnorm(momentum: float | None) -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten()]
    second = [nn.Linear(16, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Sigmoid()]
    return nn.Sequential(*first, *second, nn.Linear(8, CLASSES))


def _leading() -> nn.Sequential:
    first = [nn.BatchNorm2d(2, momentum=None), nn.Flatten(), nn.Linear(18, 10), nn.Tanh()]
    return nn.Sequential(*first, nn.Linear(10, CLASSES))


def _dropout() -> nn.Sequential:
    first = [nn.Dropout(0.2), nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Dropout2d(0.4), nn.Flatten()]
    second = [nn.Linear(24, 12), nn.Dropout(0.5, inplace=True), nn.Tanh()]
    return nn.Sequential(*first, *second, nn.Linear(12, 10), nn.AlphaDropout(0.3), nn.Linear(10, CLASSES))


def _residual() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()]
    units = [Residual(4, 4), Residual(4, 6, stride=2, inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*first, *units, nn.Linear(6, CLASSES))


def _inplace() -> nn.Sequential:
    relu = partial(nn.ReLU, inplace=True)
    return nn.Sequential(nn.Conv2d(2, 4, 3), relu(), nn.Flatten(), nn.Linear(16, 8), relu(), nn.Linear(8, CLASSES))


def _conv_settings() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3, padding=(2, 1), groups=2, bias=False), nn.ReLU()]
    second = [nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1), nn.Tanh()]
    third = [nn.Conv2d(6, 6, 2, dilation=2, groups=3), nn.Flatten()]
    return nn.Sequential(*first, *second, *third, nn.Linear(48, CLASSES))


def _circular() -> nn.Sequential:
    first = [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()]
    second = [nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(48, CLASSES))


def _same(kernel: Any) -> nn.Sequential:
    first = [nn.Conv2d(2, 3, kernel, padding="same"), nn.Tanh()]
    second = [nn.Conv2d(3, 4, kernel, padding="same", dilation=(1, 2)), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Conv2d(4, 2, 3, padding="valid"), nn.Flatten(), nn.Linear(24, CLASSES))


def _conv1d() -> nn.Sequential:
    first = [nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.Tanh()]
    second = [nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(20, CLASSES))


def _conv3d() -> nn.Sequential:
    first = [nn.Conv3d(1, 3, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 0)), nn.ReLU()]
    second = [nn.Conv3d(3, 2, (2, 2, 1), padding=(0, 0, 1)), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(8, CLASSES))


def _transposed() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 2), nn.Tanh()]
    second = [nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2), nn.Tanh()]
    third = [nn.ConvTranspose2d(4, 3, (2, 3), padding=(0, 1), dilation=2, bias=False), nn.Flatten(2)]
    fourth = [nn.ConvTranspose1d(3, 2, 3, stride=3, padding=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, *third, *fourth, nn.Linear(376, CLASSES))


def _tokens() -> nn.Sequential:
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(15, CLASSES))


def _layernorm() -> nn.Sequential:
    on_tokens = [nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 4), nn.PReLU(), nn.Flatten()]
    return nn.Sequential(*on_tokens, nn.Linear(12, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, CLASSES))


def _everything() -> nn.Sequential:
    first = [nn.Conv2d(2, 4, 3, padding="same", bias=False), nn.BatchNorm2d(4, momentum=None), nn.ReLU(inplace=True)]
    second = nn.Sequential(Residual(4, 4, inplace=True), nn.Dropout2d(0.3))
    third = [nn.Conv2d(4, 4, 3, 2, 1, groups=2), nn.GroupNorm(2, 4), nn.PReLU(4), nn.MaxPool2d(2), nn.Flatten()]
    fourth = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.5))
    fifth = [nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Dropout(0.1), *first, second, *third, fourth, *fifth, nn.Linear(6, CLASSES))


def _nested() -> nn.Sequential:
    features = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), nn.Sequential(nn.MaxPool2d(2)))
    head = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, CLASSES)))
    return nn.Sequential(features, nn.Sequential(), head)


def _frozen(net: nn.Sequential, *prefixes: str) -> nn.Sequential:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return net


def _inplace_tokens() -> nn.Sequential:
    first = [nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Dropout(0.3, inplace=True)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(15, CLASSES))


# torch warns that it pads once more on one side, which is what is tested here
_EVEN = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

PROBLEMS = [
    Problem("mlp_relu", lambda: _mlp(nn.ReLU), (8,), twin=True),
    Problem("mlp_tanh_mse", lambda: _mlp(nn.Tanh), (8,), losses.mse, twin=True),
    Problem("mlp_sigmoid_bce", lambda: _mlp(nn.Sigmoid), (8,), losses.bce, twin=True),
    Problem("conv_pool", _conv_pool, (2, 8, 8), twin=True),
    Problem("batchnorm", lambda: _batchnorm(0.1), (2, 4, 4)),
    Problem("batchnorm_momentum_none", lambda: _batchnorm(None), (2, 4, 4)),
    Problem("leading_batchnorm", _leading, (2, 3, 3)),
    Problem("dropout", _dropout, (2, 4, 4), random=True),
    Problem("residual", _residual, (2, 4, 4)),
    Problem("inplace_relu", _inplace, (2, 4, 4)),
    Problem("conv_grouped_strided_dilated", _conv_settings, (2, 5, 5), twin=True),
    Problem("conv_circular", _circular, (2, 4, 4)),
    Problem("conv_same_odd", lambda: _same(3), (2, 6, 5), twin=True),
    Problem("conv_same_even", lambda: _same((2, 4)), (2, 6, 5), twin=True, marks=(_EVEN,)),
    Problem("conv1d", _conv1d, (2, 9), losses.mse, twin=True),
    Problem("conv3d", _conv3d, (1, 3, 4, 4), twin=True),
    Problem("conv_transposed", _transposed, (2, 4, 4), twin=True),
    Problem("linear_on_tokens", _tokens, (3, 4), twin=True),
    Problem("layernorm_gelu", _layernorm, (3, 4)),
    Problem("everything", _everything, (2, 8, 8), random=True),
    Problem("nested", _nested, (2, 4, 4), losses.bce, twin=True),
    # A part of the first block, and all of the one in the middle.
    Problem("partly_frozen", lambda: _frozen(_mlp(nn.Tanh), "0.bias", "2."), (8,)),
    # The first block's statistics go on.
    Problem("frozen_ends", lambda: _frozen(_batchnorm(0.1), "0.", "1.", "7."), (2, 4, 4)),
    # The bias of the frozen filters learns.
    Problem("frozen_filters", lambda: _frozen(_conv_pool(), "0.weight", "3.bias"), (2, 8, 8), dtype=torch.float64),
    Problem("inplace_on_tokens", _inplace_tokens, (3, 4), random=True),
    Problem("eval_mode", lambda: _batchnorm(0.1).eval(), (2, 4, 4)),
    Problem("float64", _conv_pool, (2, 8, 8), dtype=torch.float64),
    Problem("unused", lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Partial(), nn.Linear(8, CLASSES)), (8,)),
    Problem("channels_last", lambda: nn.Sequential(ChannelsLast(2, 3, 3), FlattenLinear(48, CLASSES)), (2, 6, 6)),
    Problem("bias_alone", lambda: _frozen(_mlp(nn.ReLU), "0.weight"), (8,)),
    # Autograd gives the gradient of this loss as one number, expanded, and by hand it is changed in place.
    Problem("sum", lambda: nn.Sequential(*_mlp(nn.ReLU), nn.Sigmoid()), (8,), lambda out, y: out.sum() / len(y)),
]
BY_NAME = {problem.name: problem for problem in PROBLEMS}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
STORAGES = feedback.KINDS
RULE_NAMES = list(RULES)
AS_BP = [name for name in BASELINES if name not in ("mezo", "last_layer")]  # which train as BP does, bit for bit
EVERY_RULE: dict[str, type[Rule]] = {**RULES, **BASELINES}
# which know the norm of all gradients never, or too late
WITHOUT_GLOBAL_NORM = tuple(name for name in BASELINES if name not in ("checkpoint", "last_layer"))
BY_GRADIENT = [name for name in EVERY_RULE if name != "mezo"]


def params(wanted: Callable[[Problem], bool] = lambda problem: True) -> list[Any]:
    """Return the problems as pytest parameters, with their marks."""
    return [pytest.param(p, id=p.name, marks=p.marks) for p in PROBLEMS if wanted(p)]


def rotated(
    names: str, items: Iterable[Any], *factors: Iterable[Any], turns: int = 1, quick: int | None = None
) -> pytest.MarkDecorator:
    """Parametrise a test over items, such as params(), each with some combinations of the factors' levels.

    Instead of the full product each item is met `turns` times, with another level of the first factor each time, so
    with as many turns as it has levels every item meets all of them. Every combination of the factors' levels is met by
    some items.

    Args:
        names: The test's arguments, the item's first.
        items: Values, or pytest parameters of one value with their marks.
        *factors: The levels of each factor.
        turns: How often each item is met.
        quick: In so many of the turns; the others are slow tests. None: in all of them.
    """
    given = [item if hasattr(item, "marks") else pytest.param(item, id=_label(item)) for item in items]
    levels, rows = list(product(*factors)), []
    for place, item in enumerate(given):
        for turn in range(turns):
            row = levels[(place + turn * len(levels) // turns) % len(levels)]
            label = "-".join([str(item.id), *map(_label, row)])
            slow = [pytest.mark.slow] * (quick is not None and turn >= quick)
            rows.append(pytest.param(*item.values, *row, id=label, marks=(*item.marks, *slow)))
    assert {row.values[1:] for row in rows} == set(levels), "some combinations are not met: take more turns"
    return pytest.mark.parametrize(names.split(), rows)


def _label(level: Any) -> str:
    """Return the level's name, which is the same in each process: a representation may have an address."""
    return str(next((getattr(level, name) for name in ("__name__", "name") if hasattr(level, name)), level))


def make_rule(
    rule: str | type[Rule], problem: Problem, optimizer: Any = "sgd", storage: Any = "stored", **options: Any
) -> Rule:
    """Return the rule on a fresh net of the problem; rule, optimizer and storage by name or as they are."""
    rule = EVERY_RULE[rule] if isinstance(rule, str) else rule
    optimizer = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    storage = STORAGES[storage](seed=3) if isinstance(storage, str) else storage
    return rule(problem.build(), optimizer, problem.loss, storage, **options)


@dataclass
class Record:
    """All that training leaves behind: losses, weights and buffers, optimizer state, the global RNG."""

    losses: list[Tensor]
    tensors: list[Tensor]
    optimizer: list[dict[str, Any]]
    rng: Tensor


def record(losses: list[Tensor], net: nn.Module, optimizers: list[Any]) -> Record:
    """Return copies, in the order of the net's parameters, however many optimizers there are."""
    states = {p: state for optimizer in optimizers if optimizer is not None for p, state in optimizer.state.items()}
    per_parameter = [deepcopy(states.get(p, {})) for p in net.parameters()]
    tensors = [tensor.detach().clone() for tensor in net.state_dict().values()]
    return Record(losses, tensors, per_parameter, torch.get_rng_state())


def train(rule: Rule, problem: Problem, steps: int = 4, each_step: Callable[[], object] | None = None) -> Record:
    """Train from a fixed global seed and return what came of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = []
        for x, y in problem.batches(steps):
            losses.append(rule.step(x, y))
            if each_step is not None:
                each_step()
        return record(losses, rule.blocks, rule.optimizers)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch work with this many threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
