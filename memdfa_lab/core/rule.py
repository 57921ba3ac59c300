"""What the four rules have in common: a network as blocks, an optimizer a block, and the parts of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core import state
from memdfa_lab.core.blocks import as_blocks, run_block
from memdfa_lab.core.checks import check_batch, check_finite, check_number, check_type, scalar_loss
from memdfa_lab.core.feedback import Feedback, Stored
from memdfa_lab.core.group import Group
from memdfa_lab.core.local import BlockGradient, block_gradient
from memdfa_lab.core.phases import phase
from memdfa_lab.core.signal import Signal

Loss = Callable[[Tensor, Tensor], Tensor]


class Rule(ABC):
    """A network, one optimizer a block, and a way to learn from a batch.

    `blocks`: a model as `as_blocks` takes it. `optimizer`: called with the parameters of each block, for example
    `partial(torch.optim.SGD, lr=0.05)`. `loss_fn(logits, y)`: a scalar, a mean over the batch. `feedback`: the random
    matrices, `Stored(seed=0)` if not given; BP does not use them. `clip_norm`: the largest norm of one block's
    gradient, all its parameters together; a larger one is scaled down.

    Raises TypeError if the model cannot be cut into blocks or an argument is of another kind; ValueError for an
    optimizer that needs the whole network at once (LBFGS), and what `as_blocks` refuses.
    """

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: state.OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
    ):
        feedback = Stored() if feedback is None else feedback
        check_type("feedback", feedback, Feedback, "a Feedback, such as ml.feedback.Stored(seed=0)")
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, or_more=False)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of logits and y, such as ml.losses.mse, not {loss_fn!r}")
        self.blocks = as_blocks(blocks)
        self.chain = list(self.blocks)  # nn.Sequential counts up to its i-th module each time
        self.loss_fn = loss_fn
        self.feedback = feedback
        self.clip_norm = clip_norm
        self.group = Group()
        self.parameters = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self.optimizers = [state.make_optimizer(optimizer, block) if block else None for block in self.parameters]
        self.check()

    def check(self) -> None:  # noqa: B027, few rules have something to check
        """Raise ValueError if the rule cannot train this network."""

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch, x (N, ...) and y as the loss takes it; return the loss before the update, 0-d.

        Gradients that the parameters hold from before are dropped. Raises, before any weight changes,
        FloatingPointError if x, the loss or e are not finite, TypeError or ValueError if x is not a batch or the loss
        does not take y.
        """

    def begin(self, x: Tensor) -> Tensor:
        """Return x without a graph, checked; drop old gradients."""
        with phase("begin"):
            check_batch(x)
        for block in self.parameters:
            for parameter in block:
                parameter.grad = None
        return x.detach()

    def forward(self, i: int, h: Tensor) -> Tensor:
        """Return block i's output on h (N, ...), with its graph."""
        with phase("forward", i):
            return run_block(self.chain[i], h)

    def keep(self, i: int, h: Tensor) -> BlockGradient:
        """Run block i on h (N, ...), and return it with what its gradient needs."""
        with phase("forward", i):
            block = block_gradient(self.chain[i], h)
            block.forward()
            return block

    def recompute(self, i: int, h: Tensor) -> BlockGradient:
        """Return the same for the second time that h passes the block, which will run while it is taught."""
        return block_gradient(self.chain[i], h, phase("recompute", i))

    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d and detached, and e = dloss/dlogits, of the logits' shape (N, C)."""
        with phase("error"):
            loss, e = self.group.error(self.loss_fn, self._loss_and_e, logits.detach(), y)
            check_finite("the loss or its gradient is not finite", loss, e)
            return loss, e

    def _loss_and_e(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = scalar_loss(self.loss_fn, logits, y)
        (e,) = torch.autograd.grad(loss, logits)
        # contiguous: the gradient of a sum is one number, expanded, and could not be changed in place
        return loss.detach(), e.contiguous()

    def backward(self, h: Tensor, e: Tensor) -> None:
        """Leave the gradient of every block in its parameters, through the graph of the output h."""
        with phase("backward"):
            h.backward(e)

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return what DFA and MEM-DFA teach block i: e B_i, or e itself for the last block."""
        last = i == len(self.chain) - 1
        return Signal(i, e, None if last else self.feedback)

    def teach(self, i: int, block: BlockGradient, e: Tensor) -> Tensor:
        """Form block i's signal, turn it into the gradient of its weights, update them, and return its output."""
        if self.parameters[i]:
            block.begin()
            self.group.finish_sum()  # of the block before, whose gradients were exchanged meanwhile
            alone = self.clip_norm is None and self.group.size == 1
            with phase("local gradient", i):
                block.learn(self.signal(i, e), self.optimizers[i] if alone else None)
            self.group.start_sum(self.parameters[i], partial(self.update, i))
        if i == len(self.chain) - 1:
            self.group.finish_sum()
        return block.output()

    def update(self, i: int) -> None:
        """Update block i's weights by the gradients they hold, and free those."""
        optimizer = self.optimizers[i]
        if optimizer is None:
            return
        self.group.sum(self.parameters[i])
        with phase("update", i):
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters[i], self.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return what the rule keeps between steps, by the category under which the profilers count it."""
        return {
            "parameters": list(self.blocks.parameters()),
            "buffers": list(self.blocks.buffers()),
            "optimizer state": state.optimizer_tensors(self.optimizers),
            "feedback": list(self.feedback.matrices.values()),
            "gradients": self.group.send_buffers,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers, the state of each optimizer, and the feedback; tensors are not copied."""
        return state.save(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a copy of a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        state.load(self, saved)
