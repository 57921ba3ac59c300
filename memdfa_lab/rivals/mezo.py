"""Learning without backpropagation: two forward passes with perturbed weights estimate one directional derivative.

Source: MeZO, Malladi et al. 2023, a memory-efficient form of Spall's simultaneous perturbation (1992).
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memdfa_lab.core.checks import check_finite, check_int, check_number
from memdfa_lab.core.generators import hold
from memdfa_lab.core.local import block_gradient
from memdfa_lab.core.phases import label, phase
from memdfa_lab.core.recompute import state_restored, without_trace
from memdfa_lab.core.rule import Rule
from memdfa_lab.core.seeds import LARGEST_SEED, mix
from memdfa_lab.core.state import learning


class MeZO(Rule):
    """The loss L at W + eps z and W - eps z gives g = (L(W + eps z) - L(W - eps z)) / (2 eps); g z is the gradient.

    z is a normal vector over all weights that learn, drawn again from its seed at each use. A forward pass keeps
    nothing, and one block's g z is in memory at a time; its optimizer uses it as the gradient. Weights are not copied
    but moved back, which restores them to within about three rounding errors. These errors add up from step to step: at
    a learning rate of 0, weights in float32 hardly move in many steps, but weights in bfloat16 drift. Both passes draw
    the same random numbers, and the second one updates BatchNorm's statistics. The loss returned is the mean of the
    two. Parameters of the loss learn in the same way; penalties in the loss need no special treatment.

    `eps`: the size of the perturbation. `seed`: together with the number of the step, the seed of z. `feedback` is not
    used. Raises ValueError for an eps that is not above 0, a seed below 0, clip_global_norm, and several ranks; in a
    step, FloatingPointError if one of the losses is not finite.
    """

    own_settings = ("eps", "seed")

    def __init__(self, *given: Any, eps: float = 1e-3, seed: int = 0, **options: Any):
        super().__init__(*given, **options)
        check_number("eps", eps, or_more=False)
        self.eps, self.seed = eps, check_int("seed", seed, 0, LARGEST_SEED)
        self.steps = 0  # the number of steps taken

    def check(self) -> None:
        if self.clip_global_norm is not None:
            raise ValueError("MeZO has one block's gradient at a time: use clip_norm in place of clip_global_norm")

    def begin_updates(self) -> None:
        super().begin_updates()
        if self.group.size > 1:
            raise ValueError("MeZO is for one process: take MemDFA on several")

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.begin(x, y)
        seed = mix.__wrapped__(self.seed, self.steps)  # without its cache
        plus, minus = self._losses(h, y, seed)
        check_finite("the loss is not finite", plus, minus, so_far="weights were moved back, to rounding")
        g, generator = (plus - minus) / (2 * self.eps), self._generator(seed)
        for i, block in enumerate(self._learning()):
            with phase("local gradient", i):
                for parameter in block:
                    parameter.grad = label("gradients", _z(parameter, generator).mul_(g))
            if i < len(self.chain):
                self.update(i)
        if self.loss_optimizer is not None:
            self.loss_optimizer.step()
            self.loss_optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return (plus + minus) / 2

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        given = dict(saved) if isinstance(saved, dict) else {}
        steps = check_int("the number of steps in the state_dict of a MeZO", given.pop("steps", None), 0)
        super().load_state_dict(given)
        self.steps = steps

    @torch.no_grad()
    def _losses(self, h: Tensor, y: Any, seed: int) -> tuple[Tensor, Tensor]:
        """Return the losses on h (N, ...) with the weights moved by +eps z, then by -eps z; then move the weights back.

        The first pass leaves no trace but its loss.
        """
        at = 0.0
        try:
            at += self._move(seed, self.eps)
            draw_again, out = hold(self.device), h
            with state_restored(self.loss_fn) if isinstance(self.loss_fn, nn.Module) else nullcontext():
                try:
                    for i, block in enumerate(self.chain):
                        with phase("forward", i):
                            out = without_trace(i, block, out)[1]
                    plus = self._loss(out, y)
                finally:
                    draw_again()
            del out
            at += self._move(seed, -2 * self.eps)
            for i, block in enumerate(self.chain):
                with phase("forward", i):
                    h = block_gradient(block, h).output()
            return plus, self._loss(h, y)
        finally:
            self._move(seed, -at)

    def _loss(self, logits: Tensor, y: Any) -> Tensor:
        with phase("error"):
            return self.loss_fn(logits, y)

    def _move(self, seed: int, by: float) -> float:
        """Add z times `by` to the weights, and return `by`."""
        generator = self._generator(seed)
        for i, block in enumerate(self._learning()):
            with phase("move", i):
                for parameter in block:
                    parameter.add_(_z(parameter, generator), alpha=by)
        return by

    def _learning(self) -> list[list[nn.Parameter]]:
        return [*self.parameters, learning(self.loss_fn)]

    def _generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)


def _z(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return torch.empty_like(parameter, requires_grad=False).normal_(generator=generator)
