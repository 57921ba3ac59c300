"""Rules that teach a block as the batch passes it, once: nothing waits for the network's output.

| rule         | signal at the output of block i                            | in memory at once        |
|--------------|------------------------------------------------------------|--------------------------|
| LocalReadout | the gradient of the loss of a small classifier on h_i      | one block's h_{i-1}, h_i |
| DRTP         | the targets through a random B_i, in place of the error    | one block's h_{i-1}, h_i |

The last block learns from the loss, as everywhere. Sources: local readouts, Nøkland and Eidnes 2019 ("predsim"
without its similarity loss); direct random target projection, Frenkel, Lefebvre and Bol 2021.
"""

import copy
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.checks import check_finite, check_int
from memdfa_lab.core.contract import check_lengths, rows
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.local import BlockGradient, block_gradient
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.recompute import forward_without_trace, generators_restored
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.signal import Signal
from memdfa_lab.core.state import OptimizerFactory, optimizer_tensors
from memdfa_lab.core.terms import OWN

POOLS = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}


class OnePass(Rule):
    """What the rules of one pass have in common.

    A block has learned before the next one runs. So what is wrong with the loss of a batch, such as labels out of
    range, is noticed when all blocks but the last have learned from it; the first batch of a shape is tried before.
    Penalties on weights in the loss are refused: it is known when those weights have learned.
    """

    teaches_blocks = True
    so_far = "blocks that came before have learned"
    prepares = True  # the first step does what later ones do not
    shapes: tuple[tuple[int, ...], ...] = ()  # of each block's output for one example, once they are known

    def check(self) -> None:
        given = {"clip_global_norm": self.clip_global_norm, "pass1": self.pass1}
        given |= {"float16": self.precision == "float16", "feedback that learns": self.feedback.learns}
        needless = [name for name, value in given.items() if value]
        if needless:
            raise ValueError(f"{type(self).__name__} goes through the blocks once: leave {needless[0]} out")

    def begin_updates(self) -> None:
        super().begin_updates()
        if self.group.size > 1:
            raise ValueError(f"{type(self).__name__} is for one process: take MemDFA on several")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last, lengths = self.begin(x, y), len(self.chain) - 1, []
        self.prepare(h)
        for i in range(last):
            block = self.run(i, h)
            h = self.teach(i, block, self.local_error(i, block, y)) if self.parameters[i] else block.output()
            lengths.append(rows(h))
        block = self.keep(last, h)
        check_lengths(self.chain, [*lengths, rows(block.output())])
        loss, e = self.error(block.output(), y)
        self.teach(last, block, e)
        return loss

    def prepare(self, x: Tensor) -> None:
        """Find the shapes of the blocks' outputs on x (N, ...), and make what depends on them, unless that is done."""
        if not self.shapes:
            shapes: list[tuple[int, ...]] = []
            forward_without_trace(self.chain, x, see=lambda way, h: shapes.append(tuple(h.shape[1:])))
            self.shapes = tuple(shapes)

    def run(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...)."""
        return self.keep(i, h)

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Return from what block i's signal is made, as e is for DFA."""
        raise NotImplementedError

    def _loss_and_error(self, logits: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        loss, e = super()._loss_and_error(logits, y)
        if self._terms is not None and self._terms.leaves.keys() - {OWN}:
            raise ValueError(
                f"the loss has a penalty on weights, which have learned by then: {type(self).__name__} leaves it out; "
                "set the optimizer's weight_decay, or take MemDFA"
            )
        return loss, e


class LocalReadout(OnePass):
    """Each block learns from the loss of a readout of its own: h_i, averaged to few positions, then one linear layer.

    `positions`: how many a readout sees along each dimension of images and the like. `seed`: of the readouts' weights,
    which begin as torch's nn.Linear does and learn with the block, by an optimizer of the same kind, which follows the
    block's learning rate. They are made in the first step. `clip_norm` is of a block's gradient, and of a readout's.
    `feedback` is not used. Raises ValueError for clip_global_norm, pass1, float16, offload, penalties on weights in the
    loss, and several ranks.
    """

    uses_feedback = False

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
        *,
        positions: int = 4,
        seed: int = 0,
        **options: Any,
    ):
        self.positions, self.seed = check_int("positions", positions), check_int("seed", seed, 0, LARGEST_SEED)
        self.readouts: list[nn.Linear] = []
        self.readout_optimizers: list[torch.optim.Optimizer] = []
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, **options)

    def prepare(self, x: Tensor) -> None:
        super().prepare(x)
        if not self.readouts:
            sizes = [(shape[0] * prod(self._positions(shape)), prod(self.shapes[-1])) for shape in self.shapes[:-1]]
            self._make(sizes, next(self.blocks.parameters()))

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return what block i is taught, which is e already."""
        return Signal(i, super().signal(i, e).e, None)

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Let block i's readout learn, and return the gradient of its loss by h_i, of h_i's shape."""
        readout, optimizer, of_block = self.readouts[i], self.readout_optimizers[i], self.optimizers[i]
        with torch.enable_grad(), phase("readout", i):
            h = block.output().detach().requires_grad_()
            loss = self.loss_fn(readout(self._seen(h)).view(len(h), *self.shapes[-1]), y)
            signal, *gradients = torch.autograd.grad(loss, [h, *readout.parameters()])
            check_finite(f"the loss of block {i}'s readout is not finite", loss, signal, so_far=self.so_far)
            if of_block is not None:  # else the rule is only asked for its signals
                for parameter, gradient in zip(readout.parameters(), gradients, strict=True):
                    parameter.grad = label("gradients", gradient)
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(readout.parameters(), self.clip_norm)
                settings = {name: value for name, value in of_block.param_groups[0].items() if name != "params"}
                optimizer.param_groups[0].update(settings)  # which a scheduler may have changed
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return label("error", signal)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return what the rule keeps between steps, readouts included."""
        found = super().tensors()
        found["parameters"] += [parameter for readout in self.readouts for parameter in readout.parameters()]
        found["optimizer state"] += optimizer_tensors(self.readout_optimizers)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's state, readouts and their optimizers included; tensors are not copied."""
        own = zip(self.readouts, self.readout_optimizers, strict=True)
        readouts = [(readout.state_dict(), optimizer.state_dict()["state"]) for readout, optimizer in own]
        return {**super().state_dict(), "positions": self.positions, "readouts": readouts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a copy of a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        if not isinstance(saved, dict) or "readouts" not in saved:
            raise ValueError("this state has no readouts: it is of another rule")
        if saved["positions"] != self.positions:
            raise ValueError(f"this state's readouts see {saved['positions']} positions, the rule's {self.positions}")
        readouts = saved["readouts"]
        super().load_state_dict({name: saved[name] for name in saved if name not in ("positions", "readouts")})
        self.readouts, self.readout_optimizers = [], []
        sizes = [tuple(reversed(state["weight"].shape)) for state, _ in readouts]
        self._make(sizes, next(self.blocks.parameters()))
        for (state, kept), readout, optimizer in zip(readouts, self.readouts, self.readout_optimizers, strict=True):
            readout.load_state_dict(state)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(kept)})

    def _make(self, sizes: Iterable[tuple[int, ...]], like: Tensor) -> None:
        """Make the readouts of these (inputs, classes), with the dtype and on the device of a tensor."""
        with generators_restored(like.device):
            for i, (inputs, classes) in enumerate(sizes):
                torch.manual_seed(mix(self.seed, i))
                readout = nn.Linear(inputs, classes).to(like)
                self.readouts.append(readout)
                self.readout_optimizers.append(self._make_optimizer(list(readout.parameters())))

    def _positions(self, shape: tuple[int, ...]) -> list[int]:
        """Return how many positions a readout sees along each dimension but the first of an output (channels, ...)."""
        return [min(self.positions, size) if len(shape) + 1 in POOLS else size for size in shape[1:]]

    def _seen(self, h: Tensor) -> Tensor:
        """Return what a readout sees of h (N, ...), (N, inputs)."""
        size = self._positions(tuple(h.shape[1:]))
        pool: Any = POOLS.get(h.dim())
        return (h if pool is None else pool(h, size if len(size) > 1 else size[0])).flatten(1)


class DRTP(OnePass):
    """Direct random target projection: a block is taught the targets, one hot, through a random B_i.

    The sign of the error is that of the prediction less the target, so the target alone says where a unit should go.
    For labels (N,) of classes. Raises TypeError for another y, and ValueError as LocalReadout does.
    """

    def run(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...), which runs while it is taught."""
        return block_gradient(self.chain[i], h, phase("forward", i))

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Return minus the targets, one hot, over N: (N, C)."""
        if y.dim() != 1 or y.is_floating_point():
            raise TypeError(f"DRTP projects labels (N,), and y is {tuple(y.shape)} {y.dtype}: take MemDFA")
        classes = torch.arange(prod(self.shapes[-1]), device=y.device)
        return label("error", (y[:, None] == classes).to(next(self.blocks.parameters())).div_(-len(y)))


LOCAL_RULES: dict[str, type[Rule]] = {"local_readout": LocalReadout, "drtp": DRTP}
ALL_RULES.update(LOCAL_RULES)
