"""Rules that teach each block in a single forward pass, without waiting for the network's output.

| rule         | signal at the output of block i                            | in memory at once        |
|--------------|------------------------------------------------------------|--------------------------|
| LocalReadout | the gradient of the loss of a small classifier on h_i      | one block's h_{i-1}, h_i |
| DRTP         | the targets through a random B_i, in place of the error    | one block's h_{i-1}, h_i |

The last block learns from the loss, as everywhere. Sources: local readouts, Nøkland and Eidnes 2019;
direct random target projection, Frenkel, Lefebvre and Bol 2021.
"""

import copy
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from memdfa_lab.core.checks import check_finite, check_int, check_labels, check_number
from memdfa_lab.core.contract import check_lengths, rows
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.local import BlockGradient, block_gradient
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.readout import Readout
from memdfa_lab.core.recompute import forward_without_trace, generators_restored
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.signal import Signal
from memdfa_lab.core.state import OptimizerFactory, optimizer_tensors
from memdfa_lab.core.terms import OWN, loss_and_error


class OnePass(Rule):
    """What the rules of one pass have in common.

    A block has learned before the next one runs. An error in the loss of a batch, such as labels out of range, is
    therefore noticed only after all blocks but the last have learned from it; the first batch of a shape is tried
    before. Penalties on weights in the loss are refused: they become known only after those weights have learned.
    """

    teaches_blocks = True
    so_far = "earlier blocks have learned"
    prepares = True  # the first step does what later ones do not
    shapes: tuple[tuple[int, ...], ...] = ()  # of each block's output for one example, once they are known

    def check(self) -> None:
        given = {"clip_global_norm": self.clip_global_norm, "pass1": self.pass1, "pack": self.pack}
        given |= {"float16": self.precision == "float16", "feedback that learns": self.feedback.learns}
        if needless := [name for name, value in given.items() if value]:
            raise ValueError(f"{type(self).__name__} goes through the blocks once: leave {needless[0]} out")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h, last, lengths = self.begin(x, y), len(self.chain) - 1, []
        self.prepare(h, y)
        for i in range(last):
            block = self.run(i, h)
            h = self.teach(i, block, self.local_error(i, block, y)) if self.parameters[i] else block.output()
            lengths.append(rows(h))
            del block  # with its input
        block = self.keep(last, h)
        check_lengths(self.chain, [*lengths, rows(block.output())])
        loss, e = self.error(block.output(), y)
        self.teach(last, block, e)
        return loss

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Find the shapes of the blocks' outputs on x (N, ...), and make what depends on them, unless that is done."""
        if not self.shapes:
            shapes: list[tuple[int, ...]] = []
            forward_without_trace(self.chain, x, see=lambda way, h: shapes.append(tuple(h.shape[1:])))
            self.shapes = tuple(shapes)

    def run(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...)."""
        return self.keep(i, h)

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Return the tensor from which block i's signal is made, in place of DFA's e."""
        raise NotImplementedError

    def whole_gradient(self, what: str, loss_fn: Loss, out: Tensor, y: Tensor) -> Tensor:
        """Return the gradient of the whole batch's loss, `what`, with respect to this process's `out` (n, ...)."""

        def compute(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return loss_and_error(loss_fn, out, y, self._owners)[:2]

        loss, e = self.group.error(loss_fn, compute, out.detach(), y)
        check_finite(f"{what} is not finite", loss, e, so_far=self.so_far)
        return e

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

    `positions`: how many positions a readout sees along each spatial dimension. `similarity`: the weight, from 0 to 1,
    of a second loss, for labels (N,); the first loss has the weight 1 - similarity (0.99 is "predsim" of Nøkland and
    Eidnes 2019). The second loss compares two similarities of each pair of examples, of features and of one-hot labels:
    both are cosines of centred vectors, and the loss is their mean squared difference. A second layer of the readout
    makes the features from h_i: a dense one or, on images, a 3 x 3 convolution and each channel's standard deviation.

    `seed`: of the readouts' weights. They are made in the first step, initialised as torch's layers, and learn with the
    block, by an optimizer of the same kind and learning rate. `clip_norm` limits the gradient of a block, and that of a
    readout. `feedback` is not used. Raises ValueError for clip_global_norm, pass1, pack, float16, offload, and
    penalties on weights in the loss; TypeError for a y other than labels with similarity.
    """

    own_settings = ("positions", "similarity")

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
        *,
        positions: int = 4,
        similarity: float = 0.0,
        seed: int = 0,
        **options: Any,
    ):
        self.positions, self.seed = check_int("positions", positions), check_int("seed", seed, 0, LARGEST_SEED)
        check_number("similarity", similarity, most=1)
        self.similarity = similarity
        self.readouts: list[Readout] = []
        self.readout_optimizers: list[torch.optim.Optimizer] = []
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, **options)

    def prepare(self, x: Tensor, y: Tensor) -> None:
        if self.similarity:
            check_labels("similarity compares", y, "leave it out")
        super().prepare(x, y)
        if not self.readouts:
            classes, found = prod(self.shapes[-1]), (Readout.sizes(shape, self.positions) for shape in self.shapes[:-1])
            self._make((inputs, classes, mixed if self.similarity else None) for inputs, mixed in found)

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return the signal of block i: e itself, which is already of h_i's shape."""
        return Signal(i, super().signal(i, e).e, None)

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Let block i's readout learn, and return the gradient of its loss with respect to h_i, of h_i's shape."""
        readout, optimizer, of_block = self.readouts[i], self.readout_optimizers[i], self.optimizers[i]
        parameters = list(readout.parameters())
        with torch.enable_grad(), phase("readout", i):
            h = block.output().detach().requires_grad_()
            signal, *gradients = self._gradients(i, h, y)
            check_finite(f"the loss of block {i}'s readout is not finite", signal, so_far=self.so_far)
            if of_block is not None:  # else only the signals are wanted
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = label("gradients", gradient)
                self.group.finish_sum()  # of the block before
                self.group.sum(parameters)
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, self.clip_norm)
                optimizer.param_groups[0].update({**of_block.param_groups[0], "params": parameters})  # as scheduled
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return label("error", signal)

    def _gradients(self, i: int, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of readout i's loss with respect to h (N, ...) and to each of its parameters."""
        readout, what = self.readouts[i], f"the loss of block {i}'s readout"

        def part(weight: float, loss_fn: Loss, out: Tensor) -> tuple[Any, Tensor]:
            """Return where `out` is in the graph, and its gradient; its numbers are not needed after that."""
            return get_gradient_edge(out), self.whole_gradient(what, loss_fn, out, y).mul_(weight)

        parts = [part(1 - self.similarity, self.loss_fn, readout(h).view(len(h), *self.shapes[-1]))]
        if self.similarity:
            parts.append(part(self.similarity, readout.dissimilarity, readout.features(h)))
        edges, errors = zip(*parts, strict=True)
        return torch.autograd.grad(edges, [h, *readout.parameters()], errors)

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
        return {**super().state_dict(), **{k: getattr(self, k) for k in self.own_settings}, "readouts": readouts}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a copy of a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        if not isinstance(saved, dict) or not {"readouts", *self.own_settings} <= saved.keys():
            raise ValueError("this state has no readouts: it is of another rule")
        for name in self.own_settings:
            if saved[name] != getattr(self, name):
                raise ValueError(f"this state's readouts have {name}={saved[name]}, not {getattr(self, name)}")
        super().load_state_dict({name: saved[name] for name in saved if name not in (*self.own_settings, "readouts")})
        self.readouts, self.readout_optimizers = [], []
        shapes = [{name: tuple(value.shape) for name, value in state.items()} for state, _ in saved["readouts"]]
        self._make((*reversed(of["weight"]), of.get("mix.weight")) for of in shapes)
        own = zip(saved["readouts"], self.readouts, self.readout_optimizers, strict=True)
        for (state, kept), readout, optimizer in own:
            readout.load_state_dict(state)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(kept)})

    def _make(self, sizes: Iterable[tuple[int, int, Sequence[int] | None]]) -> None:
        """Make the readouts of these inputs, classes and second layers, in the weights' dtype and on their device."""
        like = next(self.blocks.parameters())
        with generators_restored(like.device):
            for i, (inputs, classes, mixed) in enumerate(sizes):
                torch.manual_seed(mix(self.seed, i))
                readout = Readout(inputs, classes, self.positions, mixed).to(like)
                self.readouts.append(readout)
                self.readout_optimizers.append(self._make_optimizer(list(readout.parameters())))


class DRTP(OnePass):
    """Direct random target projection: a block is taught the targets, one hot, through a random B_i.

    For softmax outputs the error, prediction minus target, has a sign that the target alone determines. y must be
    labels (N,). Raises TypeError for any other y, and ValueError as LocalReadout does.
    """

    uses_feedback = True

    def run(self, i: int, h: Tensor) -> BlockGradient:
        """Return block i on h (N, ...); it runs only when it is taught."""
        return block_gradient(self.chain[i], h, phase("forward", i))

    def local_error(self, i: int, block: BlockGradient, y: Tensor) -> Tensor:
        """Return minus the one-hot targets, divided by the whole batch's N: (n, C)."""
        check_labels("DRTP projects", y, "take MemDFA")
        with phase("target", i):
            anywhere = next(self.blocks.parameters()).new_zeros(len(y), prod(self.shapes[-1]))
            return label("error", self.whole_gradient("the mean over labels", F.nll_loss, anywhere, y.long()))


LOCAL_RULES: dict[str, type[Rule]] = {"local_readout": LocalReadout, "drtp": DRTP}
ALL_RULES.update(LOCAL_RULES)
