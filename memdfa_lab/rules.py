"""The four learning rules, one under the other: backpropagation, FA, DFA and MEM-DFA.

h_0 = x, block i makes h_i from h_{i-1}, the last h is the logits, and e = dloss/dlogits, of shape (N, C). The rules
differ in the signal that a block is taught, the error at its output, and in what they hold at once:

| rule    | signal at the output of block i          | held at once             |
|---------|------------------------------------------|--------------------------|
| BP      | the next block's, through W_{i+1}^T      | every h_i                |
| FA      | the next block's, through a random B     | every h_i                |
| DFA     | e B_i, straight from the output          | every h_i                |
| MEM-DFA | e B_i                                    | one block's h_{i-1}, h_i |

Sources: FA, Lillicrap et al. 2016; DFA, Nøkland 2016; MEM-DFA, Chu et al. 2020 (arXiv 2012.11745).
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.blocks import as_blocks, run_block
from memdfa_lab.feedback import Feedback, Stored
from memdfa_lab.recompute import forward_without_trace
from memdfa_lab.transport import FeedbackTransport

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Loss = Callable[[Tensor, Tensor], Tensor]


class Rule(ABC):
    """A network, one optimizer a block, and a way to learn from a batch.

    `blocks`: a model as `as_blocks` takes it. `optimizer`: called with a block's parameters, for each block, for
    example `partial(torch.optim.SGD, lr=0.05)`. `loss_fn(logits, y)`: a scalar, a mean over the batch. `feedback`:
    the random matrices, `Stored(seed=0)` if not given; BP has no use for them. `clip_norm`: the largest norm of one
    block's gradient (all its parameters together), scaled down to it if larger.

    Raises TypeError or ValueError for a model that cannot be cut into blocks, an optimizer that is not a factory, and
    one that needs the whole network at once (LBFGS).
    """

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
    ):
        if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
            raise TypeError(
                "optimizer must make one optimizer a block: pass partial(torch.optim.SGD, lr=0.05), not an optimizer"
            )
        if feedback is not None and not isinstance(feedback, Feedback):
            raise TypeError(f"feedback must be a Feedback, such as ml.feedback.Stored(seed=0), got {feedback!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, got {clip_norm!r}")
        self.blocks = as_blocks(blocks)
        self.loss_fn = loss_fn
        self.feedback = Stored() if feedback is None else feedback
        self.clip_norm = clip_norm
        self.parameters = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self.optimizers = [optimizer(block) if block else None for block in self.parameters]
        if any(isinstance(made, torch.optim.LBFGS) for made in self.optimizers):
            raise ValueError("LBFGS evaluates the whole network again in each step: choose SGD, Adam or another")

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch, x (N, ...) and y as the loss takes it; return the loss before the update, 0-d.

        Raises FloatingPointError if loss or error are not finite, before any weight changes.
        """

    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d and detached, and e = dloss/dlogits, of the logits' shape."""
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.loss_fn(logits, y)
        if loss.dim() != 0:
            raise ValueError(f"the loss must be a scalar, a mean over the batch; got shape {tuple(loss.shape)}")
        (e,) = torch.autograd.grad(loss, logits)
        if not (torch.isfinite(loss) and torch.isfinite(e).all()):
            raise FloatingPointError(
                f"the loss is {loss.item()} and its gradient not finite; no weight was changed: lower the learning "
                "rate, clip (clip_norm=...), or look for NaN and inf in the data"
            )
        return loss.detach(), e

    def signal(self, i: int, h: Tensor, e: Tensor) -> Tensor:
        """Return what DFA and MEM-DFA teach block i with output h: e B_i, or e itself for the last block."""
        return e if i == len(self.blocks) - 1 else self.feedback.project(i, e, h.shape[1:])

    def local_gradient(self, i: int, h: Tensor, e: Tensor) -> None:
        """Leave the gradient of block i's signal in its parameters, through the graph of its output h."""
        if self.parameters[i]:
            h.backward(self.signal(i, h, e))

    def update(self, i: int) -> None:
        """Change block i's weights by the gradients they hold, and free those."""
        optimizer = self.optimizers[i]
        if optimizer is None:
            return
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters[i], self.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers, the state of each optimizer, and the feedback; tensors are not copied."""
        optimizers = [None if made is None else made.state_dict() for made in self.optimizers]
        return {
            "rule": type(self).__name__,
            "blocks": self.blocks.state_dict(),
            "optimizers": optimizers,
            "feedback": self.feedback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        if state["rule"] != type(self).__name__:
            raise ValueError(f"this state is of {state['rule']}, the rule is {type(self).__name__}")
        ours = {name: tuple(value.shape) for name, value in self.blocks.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in state["blocks"].items()}
        if ours != theirs:
            name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
            raise ValueError(
                f"this state is of another network: {name} has shape {theirs.get(name)} in it, {ours.get(name)} here"
            )
        self.feedback.load_state_dict(state["feedback"])
        self.blocks.load_state_dict(state["blocks"])
        for optimizer, value in zip(self.optimizers, state["optimizers"], strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(value)


class BP(Rule):
    """Backpropagation: the exact gradient, and the memory that it takes."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.detach()
        for block in self.blocks:
            h = run_block(block, h)
        loss, e = self.error(h, y)
        h.backward(e)
        for i in range(len(self.blocks)):
            self.update(i)
        return loss


class FA(Rule):
    """Feedback alignment: BP, with a fixed random B in place of each weight on the way back."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.detach()
        with FeedbackTransport(self.feedback, self.blocks):
            for block in self.blocks:
                h = run_block(block, h)
        loss, e = self.error(h, y)
        h.backward(e)
        for i in range(len(self.blocks)):
            self.update(i)
        return loss


class DFA(Rule):
    """Direct feedback alignment: each block is taught from the output, all graphs are kept until then."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = x.detach()
        outputs: deque[Tensor] = deque()
        for block in self.blocks:
            h = run_block(block, h.detach())
            outputs.append(h)
        loss, e = self.error(h, y)
        for i in range(len(self.blocks)):
            self.local_gradient(i, outputs.popleft(), e)
            self.update(i)
        return loss


class MemDFA(Rule):
    """MEM-DFA: DFA's updates, bit for bit, with one block's activations at a time and one more forward pass."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss, e = self.error(forward_without_trace(self.blocks, x), y)
        h = x
        for i, block in enumerate(self.blocks):
            h = run_block(block, h.detach())  # with the old W_i; the only graph alive
            self.local_gradient(i, h, e)
            self.update(i)  # now W_i may change: nobody needs the old one again
        return loss


RULES: dict[str, type[Rule]] = {"bp": BP, "fa": FA, "dfa": DFA, "memdfa": MemDFA}
