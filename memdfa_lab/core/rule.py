"""What all rules have in common: a network as blocks, an optimizer for each block, and the parts of a step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memdfa_lab.core import contract, state, terms
from memdfa_lab.core import precision as precisions
from memdfa_lab.core.blocks import as_blocks, run_block
from memdfa_lab.core.checks import check_batch, check_finite, check_type
from memdfa_lab.core.compat import autocast_is_on
from memdfa_lab.core.feedback import Feedback, Stored
from memdfa_lab.core.local import BlockGradient
from memdfa_lab.core.packing import Packs
from memdfa_lab.core.phases import phase
from memdfa_lab.core.signal import Signal
from memdfa_lab.core.store import Store
from memdfa_lab.core.updates import Updates
from memdfa_lab.core.watcher import has_data

Loss = Callable[[Tensor, Tensor], Tensor]
MOST_SHAPES = 8  # shapes of batches that are tried before their first step; later shapes are not tried


class Rule(Updates, Packs, precisions.InPrecision, ABC):
    """A network, one optimizer a block, and a way to learn from a batch.

    `blocks`: a model as `as_blocks` takes it. `optimizer`: called with the parameters of each block, for example
    `partial(torch.optim.SGD, lr=0.05)`. `loss_fn(logits, y)`: a scalar, a mean over the batch. It may add penalties on
    the weights of single blocks; a loss that is a module with parameters learns, too. `feedback`: the random matrices,
    `Stored(seed=0)` if not given; BP does not use them. `clip_norm`: the largest norm of one block's gradient, over all
    its parameters; a larger gradient is scaled down. `clip_global_norm`: the largest norm of all blocks' gradients
    together, as in torch.nn.utils.clip_grad_norm_ (to rounding), without those of the loss's own parameters. MEM-DFA
    finds this norm in one more pass, which forms each gradient and drops it.

    `precision`: "bfloat16" or, for DFA and MEM-DFA on a GPU, "float16" (not run on one yet). Each step then runs in an
    autocast of its own; weights, gradients and the optimizers' state keep their dtype. A torch.autocast around the step
    does the same. Blocks are then taught by autograd only, so that MEM-DFA may hold more than in float32.
    `pass1`, for DFA and MEM-DFA: the format of a first forward pass, which gives the loss and e: a name in
    `ml.precision.PASS1`, or a BlockFloat. A step warns if this e is far from that of an exact pass. `offload`, for
    MEM-DFA: a store that keeps weights and the optimizers' state out of memory, such as `ml.offload.Disk`. `pack`, for
    DFA and MEM-DFA: "int8", or a BlockFloat of up to 8 bits, in which blocks run by hand keep their activations. The
    forward pass stays exact; updates are computed from the rounded activations, which take a quarter of the memory.

    Each step updates the weights: gradients are not summed over batches, since all of them would have to be kept. Use a
    larger batch, for which MEM-DFA leaves room. Parameters may be frozen and unfrozen between steps.

    Raises TypeError if the model cannot be cut into blocks or an argument has the wrong type; ValueError for an
    optimizer that needs the whole network at once (LBFGS), and what `as_blocks` raises.
    """

    teaches_blocks: ClassVar[bool] = False  # each block by a signal at its output; else autograd carries the error
    uses_feedback = teaches_feedback = False  # whether it has a B; whether B can learn and pass1 be set
    own_settings: ClassVar[tuple[str, ...]] = ()  # attributes that a resumed run must share

    def __init__(
        self,
        blocks: nn.Module | Iterable[nn.Module],
        optimizer: state.OptimizerFactory,
        loss_fn: Loss = nn.functional.cross_entropy,
        feedback: Feedback | None = None,
        clip_norm: float | None = None,
        *,
        clip_global_norm: float | None = None,
        precision: str | None = None,
        pass1: str | precisions.BlockFloat | None = None,
        offload: Store | None = None,
        pack: str | precisions.BlockFloat | None = None,
    ):
        super().__init__(clip_norm, clip_global_norm, offload)
        feedback = Stored() if feedback is None else feedback
        check_type("feedback", feedback, Feedback, "a Feedback, such as ml.feedback.Stored(seed=0)")
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function of logits and y, such as ml.losses.mse, not {loss_fn!r}")
        self.blocks = as_blocks(blocks)
        self.chain = list(self.blocks)  # indexing nn.Sequential walks to its i-th module each time
        self.loss_fn, self.feedback, self.precision, self.pass1 = loss_fn, feedback, precision, pass1
        self.pack = pack
        self._watched = state.Watched(*([blocks] if isinstance(blocks, nn.Module) else []), self.blocks)
        self._rehearsed: set[Any] = set()
        self._make_optimizer = partial(state.make_optimizer, optimizer)
        self.parameters = [state.learning(block) for block in self.blocks]
        self.optimizers = [self._make_optimizer(block) if block else None for block in self.parameters]
        self.loss_optimizer: torch.optim.Optimizer | None = None
        self._loss_taken_over: Loss | None = None
        self.follow_model()
        self.check_precision(first=True)
        self.check_pack()
        self.check()

    def check(self) -> None:
        """Raise ValueError if the rule cannot train this network."""

    @abstractmethod
    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Learn from one batch, x (N, ...) and y as the loss takes it; return the loss before the update, 0-d.

        Gradients left in the parameters are dropped. Before any weight changes, raises FloatingPointError if x, the
        loss or e is not finite, and TypeError or ValueError if x is not a batch or the loss does not take y.
        """

    def begin(self, x: Tensor, y: Any) -> Tensor:
        """Return x without a graph, checked; note changes of the model, and drop old gradients.

        The first batch of a shape is tried on everything that the step runs, before anything is changed.
        """
        with phase("begin"):
            check_batch(x)
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                where = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
                raise RuntimeError(f"a step forms gradients, and {where} is on: call step outside of it")
        self.follow_model()
        self.check_precision()
        self.begin_updates()
        self.rehearse(x, y)
        for block in self.parameters:
            for parameter in block:
                parameter.grad = None
        return x.detach()

    def rehearse(self, x: Tensor, y: Any) -> None:
        """Try a step on x (N, ...) and y, unless a batch of this shape was tried; the step changes nothing.

        Raises TypeError, ValueError or RuntimeError, one line, for what the step cannot take.
        """
        kind = (x.shape[1:], x.dtype, self.blocks.training, autocast_is_on(), id(self.loss_fn))
        shape = (kind, 0 if self.group.size > 1 else len(x))  # all ranks try at the same time
        tried = shape in self._rehearsed or (len(self._rehearsed) >= MOST_SHAPES and kind in self._rehearsed)
        if tried or not has_data(x):  # a memory prediction has no data
            return
        contract.check_traced(self.chain, x)
        alone = self.group.size == 1  # with several ranks, one rank's part may give no loss
        with self.transport() as transport:
            loss = partial(self._try_error, y=y) if alone else lambda h: None
            settings = (self.loss_fn, self.teaches_blocks, transport and transport.check, self.store)
            outputs = contract.rehearse(self.chain, x, loss, *settings)
        if self.teaches_blocks and self.uses_feedback:
            self.feedback.check(outputs[-1], *outputs[:-1])
        self._terms = None
        self._rehearsed |= {kind, shape}

    def transport(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass, in which FA prepares its backward pass."""
        return nullcontext()

    def follow_model(self) -> None:
        """Take note of parameters that were frozen or unfrozen, and of a loss that was replaced.

        Raises ValueError if a module or a parameter has been replaced since the rule was made.
        """
        if self._watched.check():
            state.follow_freezing(self.blocks, self.parameters, self.optimizers, self._make_optimizer)
        if self.loss_fn is not self._loss_taken_over:
            own = state.learning(self.loss_fn)
            self.loss_optimizer = self._make_optimizer(own) if own else None
            self._loss_taken_over = self.loss_fn

    def forward(self, i: int, h: Tensor) -> Tensor:
        """Return block i's output on h (N, ...), with its graph."""
        with phase("forward", i):
            return run_block(self.chain[i], h)

    def error(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss, 0-d and detached, and e = dloss/dlogits, of the logits' shape (N, C).

        The loss's own parameters are updated here. The gradients of penalties on weights are formed in `update`.
        """
        with phase("error"):
            logits = logits.float() if self.scalers or self.pass1 else logits  # e is scaled before it is cast
            loss, e = self._checked_error(partial(self.group.error, self.loss_fn, self._loss_and_error), logits, y)
            if self._terms is not None and self.loss_optimizer is not None:
                self._terms.add(terms.OWN, self.group.share)
                self.group.sum(state.learning(self.loss_fn))
                self.loss_optimizer.step()
                self.loss_optimizer.zero_grad(set_to_none=True)
            return loss, e

    def _checked_error(self, compute: Any, logits: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        loss, e = compute(logits, y)
        why = "the loss or its gradient is not finite (as is a mean over no label, if all are ignored)"
        check_finite(why, loss, e, so_far=self.so_far)
        if self._terms is not None:
            self._terms.check()
        return loss, e

    def _try_error(self, logits: Tensor, y: Any) -> None:
        self._checked_error(self._loss_and_error, logits, y)
        if len(self.chain) > 1 and self.teaches_blocks and (self.teaches_feedback or not self.uses_feedback):
            terms.warn_if_linear(self.loss_fn, logits, y)  # DRTP's blocks learn from labels, not from e

    def _loss_and_error(self, logits: Tensor, y: Any) -> tuple[Tensor, Tensor]:
        loss, e, self._terms = terms.loss_and_error(self.loss_fn, logits, y, self._owners)
        return loss, e

    def _owners(self) -> dict[int, int]:
        """Return the owner of each parameter that learns, by its id: the number of a block, or OWN for the loss."""
        whose = {id(p): i for i, block in enumerate(self.parameters) for p in block}
        return {id(p): terms.OWN for p in state.learning(self.loss_fn)} | whose

    def backward(self, h: Tensor, e: Tensor) -> None:
        """Leave the gradient of every block in its parameters, through the graph of the output h."""
        with phase("backward"):
            h.backward(e)

    def signal(self, i: int, e: Tensor) -> Signal:
        """Return the signal of block i under DFA and MEM-DFA: e B_i, or e itself for the last block."""
        last = i == len(self.chain) - 1
        e = self.scalers[i].scale(e) if self.scalers else e
        return Signal(i, e, None if last else self.feedback)

    def teach(self, i: int, block: BlockGradient, e: Tensor) -> Tensor:
        """Form block i's signal and from it the gradient of its weights, update them, and return the block's output."""
        if self.parameters[i]:
            block.begin()
            self.group.finish_sum()  # of the block before: its gradients were exchanged while this one ran
            penalised = self._terms is not None and i in self._terms.leaves
            alone = not (self.clip_norm or self.clip_global_norm or self.group.size > 1 or penalised)
            with phase("local gradient", i):
                taught = block.learn(self.signal(i, e), self.optimizers[i] if alone else None)
                self._unscale(i)
                self._add_penalties(i)
            if self.clip_global_norm is None or self._norm is not None:
                self.group.start_sum(self.parameters[i], partial(self.update, i))
            if self.feedback.learns and i < len(self.chain) - 1:
                self.group.finish_sum()
                self.feedback.learn(i, e, block.output(), self.group, taught)
        if i == len(self.chain) - 1:
            self.group.finish_sum()
        return block.output()

    def tensors(self) -> dict[str, list[Tensor]]:
        """Return the tensors that the rule keeps between steps, by the profilers' categories."""
        found: dict[str, list[Tensor]] = {"parameters": [*self.blocks.parameters(), *state.learning(self.loss_fn)]}
        found |= {"buffers": list(self.blocks.buffers()), "feedback": self.feedback.tensors()}
        found["optimizer state"] = state.optimizer_tensors([*self.optimizers, self.loss_optimizer])
        return {**found, "gradients": self.group.send_buffers}

    def state_dict(self) -> dict[str, Any]:
        """Return weights and buffers, the state of each optimizer, and the feedback; tensors are not copied."""
        return state.save(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a copy of a state. Raises ValueError, and changes nothing, if it is of another rule or network."""
        state.load(self, saved)
