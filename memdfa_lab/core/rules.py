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

import copy
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core import local
from memdfa_lab.core.blocks import as_blocks, run_block
from memdfa_lab.core.checks import check_batch, check_finite, number, scalar_loss
from memdfa_lab.core.feedback import Feedback, Signal, Stored
from memdfa_lab.core.local import Local
from memdfa_lab.core.phases import phase
from memdfa_lab.core.recompute import forward_without_trace
from memdfa_lab.core.transport import FeedbackTransport
from memdfa_lab.lab.distributed import Group
from memdfa_lab.memory.predict import kept_bytes

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
        if feedback is not None and not isinstance(feedback, Feedback):
            given = type(feedback).__name__
            raise TypeError(f"feedback must be a Feedback, such as ml.feedback.Stored(seed=0), not a {given}")
        if clip_norm is not None:
            number("clip_norm", clip_norm, or_more=False)
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of logits and y, such as ml.losses.mse, not {loss_fn!r}")
        self.blocks = as_blocks(blocks)
        self.chain = list(self.blocks)  # nn.Sequential counts up to its i-th module each time
        self.loss_fn = loss_fn
        self.feedback = Stored() if feedback is None else feedback
        self.clip_norm = clip_norm
        self.group = Group()  # of one process; `ml.distributed` has larger ones
        self.parameters = [[p for p in block.parameters() if p.requires_grad] for block in self.blocks]
        self.optimizers = [_make_optimizer(optimizer, block) if block else None for block in self.parameters]

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch, x (N, ...) and y as the loss takes it; return the loss before the update, 0-d.

        Gradients that parameters hold from before are dropped. Raises, before any weight changes, FloatingPointError if
        x, the loss or e are not finite, TypeError or ValueError for what is no batch, or none that the loss takes.
        """

    def begin(self, x: Tensor) -> Tensor:
        """Return x without a graph, checked; drop gradients that are left from elsewhere."""
        with phase("begin"):
            check_batch(x)
        for block in self.parameters:
            for parameter in block:
                parameter.grad = None
        return x.detach()

    def forward(self, i: int, h: Tensor) -> Tensor:
        """Return block i's output with its graph."""
        with phase("forward", i):
            return run_block(self.chain[i], h)

    def keep(self, i: int, h: Tensor) -> Local:
        """Return block i's forward pass with what its local gradient needs."""
        with phase("forward", i):
            return local.forward(self.chain[i], h)

    def recompute(self, i: int, h: Tensor) -> Local:
        """Return the same as `keep`, for the second time that h passes the block; it is run as it is taught."""
        return local.prepare(self.chain[i], h, phase("recompute", i))

    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d and detached, and e = dloss/dlogits, of the logits' shape."""
        with phase("error"):
            logits = logits.detach().requires_grad_()
            with torch.enable_grad():
                loss = scalar_loss(self.loss_fn, logits, y)
            (e,) = torch.autograd.grad(loss, logits)
            loss, e = self.group.whole(loss.detach(), e.contiguous())  # one number all over, of a sum, is changed too
            check_finite("the loss or its gradient is not finite", loss, e)
            return loss, e

    def backward(self, h: Tensor, e: Tensor) -> None:
        """Leave the gradient of every block in its parameters, through the graph of the output h."""
        with phase("backward"):
            h.backward(e)

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return what DFA and MEM-DFA teach block i: e B_i, or e itself for the last block."""
        last = i == len(self.chain) - 1
        return Signal(i, e, None if last else self.feedback)

    def teach(self, i: int, block: Local, e: Tensor) -> Tensor:
        """Turn block i's signal into the gradient of its weights, change them, and return its output."""
        if self.parameters[i]:
            block.begin()
            self.group.finish()  # the block before, whose gradients went over the wire meanwhile
            plain = self.clip_norm is None and self.group.size == 1
            with phase("local gradient", i):
                block.teach(self.signal(i, e), self.optimizers[i] if plain else None)
            self.group.start(self.parameters[i], partial(self.update, i))
        if i == len(self.chain) - 1:
            self.group.finish()
        return block.output()

    def update(self, i: int) -> None:
        """Change block i's weights by the gradients they hold, and free those."""
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
        """Return what the rule keeps between steps, by what it is for."""
        states = [state for made in self.optimizers if made is not None for state in made.state.values()]
        return {
            "parameters": list(self.blocks.parameters()),
            "buffers": list(self.blocks.buffers()),
            "optimizer state": [value for state in states for value in state.values() if isinstance(value, Tensor)],
            "feedback": list(self.feedback.matrices.values()),
            "gradients": self.group.rooms,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers, the state of each optimizer, and the feedback; tensors are not copied."""
        return {
            "rule": type(self).__name__,
            "blocks": self.blocks.state_dict(),
            "optimizers": [_optimizer_state(made) for made in self.optimizers],
            "feedback": self.feedback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a copy of a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        if state.keys() != self.state_dict().keys():
            raise ValueError("this is not the state_dict of a rule; load a model's own into the model")
        if state["rule"] != type(self).__name__:
            raise ValueError(f"this state is of {state['rule']}, the rule is {type(self).__name__}")
        ours, theirs = _shapes(self.blocks.state_dict()), _shapes(state["blocks"])
        if ours != theirs:
            name = sorted(set(ours.items()) ^ set(theirs.items()))[0][0]
            raise ValueError(
                f"this state is of another network: {name} has shape {theirs.get(name)} in it, {ours.get(name)} here"
            )
        for i, (made, value) in enumerate(zip(self.optimizers, state["optimizers"], strict=True)):
            kinds = [_optimizer_kind(_optimizer_state(made)), _optimizer_kind(value)]
            if kinds[0] != kinds[1]:
                raise ValueError(f"the state's optimizer of block {i} is {kinds[1]}, the rule's is {kinds[0]}")
        self.feedback.load_state_dict(state["feedback"])
        self.blocks.load_state_dict(state["blocks"])
        for made, value in zip(self.optimizers, state["optimizers"], strict=True):
            if made is not None:
                made.load_state_dict(copy.deepcopy(value["state"]))


class BP(Rule):
    """Backpropagation: the exact gradient, and the memory that it takes."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x)
        for i in range(len(self.blocks)):
            h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        for i in range(len(self.blocks)):
            self.update(i)
        return loss


class FA(Rule):
    """Feedback alignment: BP, with a fixed random B in place of each weight on the way back."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x)
        with FeedbackTransport(self.feedback, self.blocks):
            for i in range(len(self.blocks)):
                h = self.forward(i, h)
        loss, e = self.error(h, y)
        self.backward(h, e)
        for i in range(len(self.blocks)):
            self.update(i)
        return loss


class DFA(Rule):
    """Direct feedback alignment: each block is taught from the output; what that needs is kept until then."""

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x)
        kept: deque[Local] = deque()
        for i in range(len(self.blocks)):
            kept.append(self.keep(i, h))
            h = kept[-1].out
        loss, e = self.error(h, y)
        for i in range(len(self.blocks)):
            self.teach(i, kept.popleft(), e)
        return loss


class MemDFA(Rule):
    """MEM-DFA: DFA's updates, bit for bit, with one block's activations at a time and one more forward pass.

    `keep_bytes`: as many blocks as fit into it, from the first on, are kept from pass 1 as in DFA, and only the rest is
    run again. 0 is the paper's MEM-DFA; with infinity nothing is run twice. Raises ValueError below 0.
    """

    def __init__(self, *args: Any, keep_bytes: float = 0, **options: Any):
        super().__init__(*args, **options)
        if not (isinstance(keep_bytes, Real) and keep_bytes >= 0):
            raise ValueError(f"keep_bytes must be a number of bytes from 0 on, got {keep_bytes!r}")
        self.keep_bytes: float = keep_bytes
        self._fitting: dict[tuple[torch.Size, torch.dtype], int] = {}

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x)
        kept: deque[Local] = deque()
        for i in range(self._how_many_fit(h)):
            kept.append(self.keep(i, h))
            h = kept[-1].out
        loss, e = self.error(forward_without_trace(self.chain[len(kept) :], h, len(kept)), y)
        for i in range(len(self.blocks)):  # h_i comes from the old W_i, which nobody needs again
            h = self.teach(i, kept.popleft() if kept else self.recompute(i, h), e)
        return loss

    def _how_many_fit(self, x: Tensor) -> int:
        key = (x.shape, x.dtype)
        if key not in self._fitting:
            sizes = kept_bytes(local.forward, self.blocks, x) if self.keep_bytes else []
            self._fitting[key] = sum(total <= self.keep_bytes for total in accumulate(sizes))
        return self._fitting[key]


RULES: dict[str, type[Rule]] = {"bp": BP, "fa": FA, "dfa": DFA, "memdfa": MemDFA}


def _make_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    wanted = "optimizer must make one optimizer a block from its parameters: pass partial(torch.optim.SGD, lr=0.05)"
    if isinstance(factory, torch.optim.Optimizer) or not callable(factory):
        raise TypeError(f"{wanted}, not a {type(factory).__name__}")
    made = factory(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{wanted}; what was passed made a {type(made).__name__}")
    if isinstance(made, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the whole network again in each step: choose SGD, Adam or another")
    if {id(p) for group in made.param_groups for p in group["params"]} != {id(p) for p in parameters}:
        raise ValueError(f"{wanted}; what was passed took other parameters than the block's")
    return made


def _optimizer_state(made: torch.optim.Optimizer | None) -> dict[str, Any] | None:
    return None if made is None else {"kind": type(made).__name__, "state": made.state_dict()}


def _optimizer_kind(state: dict[str, Any] | None) -> str:
    if state is None:
        return "none (frozen)"
    groups = [str(len(group["params"])) for group in state["state"]["param_groups"]]
    return f"{state['kind']} of {' + '.join(groups)} tensors"


def _shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}  # or a module's extra state
