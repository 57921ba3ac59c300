"""Rules that teach each block in a single forward pass, without waiting for the network's output.

| rule         | signal at the output of block i                            | in memory at once        |
|--------------|------------------------------------------------------------|--------------------------|
| LocalReadout | the gradient of the loss of a small classifier on h_i      | one block's h_{i-1}, h_i |
| DRTP         | the targets through a random B_i, in place of the error    | one block's h_{i-1}, h_i |

The last block learns from the loss, as everywhere. Sources: local readouts, Nøkland and Eidnes 2019;
direct random target projection, Frenkel, Lefebvre and Bol 2021.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from memdfa_lab.core.checks import check_finite, check_int, check_labels, check_number
from memdfa_lab.core.feedback import Feedback
from memdfa_lab.core.local import BlockGradient, block_gradient
from memdfa_lab.core.one_pass import OnePass, Shapes
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.readout import Readout, View, check_fit, view_of, warn_of
from memdfa_lab.core.recompute import generators_restored
from memdfa_lab.core.rule import Loss, Rule
from memdfa_lab.core.rules import ALL_RULES
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.signal import Signal
from memdfa_lab.core.state import OptimizerFactory, follow_settings, optimizer_tensors
from memdfa_lab.core.watcher import has_data

Sizes = tuple[int, int, Sequence[int] | None]  # of a readout: inputs, classes, the shape of the second layer's weights


class LocalReadout(OnePass):
    """Each block learns from the loss of a readout of its own, a linear classifier of the block's output h_i.

    Logits without positions, (N, C): h_i is averaged to `positions` along each spatial dimension, then one linear layer
    sees it whole. Logits with positions, such as words (N, T, V) and (N, T, d) or pixels (N, V, H, W) and (N, d, H, W):
    the same linear layer, (V, d), classifies each position by itself, from h_i at this position alone. Images of
    another size than the logits are classified at their own positions, and the result is interpolated. Any other h_i is
    seen whole; there is a warning if it has as many dimensions as the logits, since a causal network's position would
    see later ones. A batch of another length or size is taken if no layer would be of another size.

    `similarity`: the weight, from 0 to 1, of a second loss, for labels (N,); the first loss has the weight
    1 - similarity (0.99 is "predsim" of Nøkland and Eidnes 2019). The second loss compares two similarities of each
    pair of examples, of features and of one-hot labels: both are cosines of centred vectors, and the loss is their mean
    squared difference. A second layer of the readout makes the features from h_i: a dense one, of each word's units
    where h_i is (N, T, d), or on images a 3 x 3 convolution. The feature of a unit is its standard deviation over
    positions, where there are any.

    `seed`: of the readouts' weights. They are made in the first step, initialised as torch's layers, and learn with the
    block, by an optimizer of the same kind; each group of its parameters has the settings of the block's group of that
    number, such as the scheduled learning rate. `clip_norm` limits the gradient of a block, and that of a readout. Of
    `feedback` only `positions` is used, which says where units and classes are. With "shared" the units of (N, T, d)
    are last, but of a block whose last layer is nn.Conv1d they are first; with "dense" all readouts see h_i whole.

    Raises ValueError for clip_global_norm, pass1, pack, float16, offload, and penalties on weights in the loss; if the
    classes may be in either dimension; and if `optimizer` makes other numbers of groups for a readout and its block.
    Raises TypeError for a y other than labels with similarity.
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
        self.views: Mapping[Shapes, list[View]] = {}  # for the shapes of the blocks' outputs
        self.readout_optimizers: list[torch.optim.Optimizer] = []
        super().__init__(blocks, optimizer, loss_fn, feedback, clip_norm, **options)

    def prepare(self, x: Tensor, y: Tensor) -> None:
        if self.similarity:
            check_labels("similarity compares", y, "leave it out")
        super().prepare(x, y)
        if self.shapes not in self.views:
            *outputs, logits = self.shapes
            self.feedback.class_dim((0, *logits), *((0, *shape) for shape in outputs))  # one answer for all blocks
            how = logits, self.positions, self.feedback
            views = [view_of(block, shape, *how) for block, shape in zip(self.chain, outputs, strict=False)]
            if self.readouts:
                check_fit(self.readouts, views, x)
            else:
                if has_data(x):
                    warn_of(views, self.similarity > 0, self.feedback.positions != "dense")
                self._make((*view.sizes(), view.mixed() if self.similarity else None) for view in views)
            self.views = {**self.views, self.shapes: views}
        for i, optimizer in enumerate(self.readout_optimizers):  # a block may have been unfrozen
            self._check_groups(i, optimizer)

    def _check_groups(self, i: int, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError if a readout's optimizer cannot follow its block's, group by group."""
        of_block = self.optimizers[i]
        if of_block is not None and len(of_block.param_groups) != len(optimizer.param_groups):
            raise ValueError(
                f"groups of parameters: block {i}'s optimizer has {len(of_block.param_groups)}, its readout's has "
                f"{len(optimizer.param_groups)}, and they are to learn alike, one by one; let optimizer make as many "
                "of any parameters, empty ones too; no weight was changed"
            )

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
                follow_settings(optimizer, of_block)  # as scheduled
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return label("error", signal)

    def _gradients(self, i: int, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of readout i's loss with respect to h (N, ...) and to each of its parameters."""
        readout, what, view = self.readouts[i], f"the loss of block {i}'s readout", self.views[self.shapes][i]

        def part(weight: float, loss_fn: Loss, out: Tensor) -> tuple[Any, Tensor]:
            """Return where `out` is in the graph, and its gradient; its numbers are not needed after that."""
            return get_gradient_edge(out), self.whole_gradient(what, loss_fn, out, y).mul_(weight)

        parts = [part(1 - self.similarity, self.loss_fn, readout.classify(h, view))]
        if self.similarity:
            parts.append(part(self.similarity, readout.dissimilarity, readout.features(h, view)))
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
        self.views = {}
        super().load_state_dict({name: saved[name] for name in saved if name not in (*self.own_settings, "readouts")})
        shapes = [{name: tuple(value.shape) for name, value in state.items()} for state, _ in saved["readouts"]]
        self._make((*reversed(of["weight"]), of.get("mix.weight")) for of in shapes)
        own = zip(saved["readouts"], self.readouts, self.readout_optimizers, strict=True)
        for (state, kept), readout, optimizer in own:
            readout.load_state_dict(state)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": copy.deepcopy(kept)})

    def _make(self, sizes: Iterable[Sizes]) -> None:
        """Make the readouts of these sizes anew, in the weights' dtype and on their device."""
        like = next(self.blocks.parameters())
        readouts, optimizers = [], []
        with generators_restored(like.device):
            for i, (inputs, classes, mixed) in enumerate(sizes):
                torch.manual_seed(mix(self.seed, i))
                readouts.append(Readout(inputs, classes, mixed).to(like))
                optimizers.append(self._make_optimizer(list(readouts[-1].parameters())))
                self._check_groups(i, optimizers[-1])
        self.readouts, self.readout_optimizers = readouts, optimizers


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
