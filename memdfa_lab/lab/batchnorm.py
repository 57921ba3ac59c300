"""BatchNorm over the examples of all ranks, on any device; torch's own SyncBatchNorm is for GPUs only.

For h (n, C, ...) on each rank, x = (h - mean) / sqrt(variance + eps), where mean and variance (C,) are over all ranks'
examples and pixels (Ioffe and Szegedy 2015). Sums over ranks are differentiable, so that autograd forms the gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memdfa_lab.core.compat import ANY_BATCH_NORM
from memdfa_lab.core.watcher import has_data
from memdfa_lab.lab.distributed import Group

OF_ONE_PROCESS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise(model: nn.Module, group: Group) -> None:
    """Replace each BatchNorm in the model by one with statistics of the whole batch; its weights and buffers stay.

    Call it before making a rule. A block with such a BatchNorm learns by autograd, not by hand. In a group of one
    process nothing changes. Raises ValueError for a BatchNorm of another class than torch's three, or if the
    model itself is a BatchNorm.
    """
    if group.size == 1:
        return
    places = [(module, name, child) for module in model.modules() for name, child in module.named_children()]
    norms = [place for place in places if isinstance(place[2], ANY_BATCH_NORM)]
    other = next((child for *_, child in norms if type(child) not in OF_ONE_PROCESS), None)
    if isinstance(model, ANY_BATCH_NORM) or other is not None:
        raise ValueError(
            f"a {type(other or model).__name__} cannot be synchronised: use nn.BatchNorm1d, 2d or 3d, inside a model"
        )
    for module, name, child in norms:
        setattr(module, name, SyncBatchNorm(child, group))


class SyncBatchNorm(ANY_BATCH_NORM):
    """BatchNorm of h (n, C, ...); in training, mean and variance are over the examples of all ranks."""

    def __init__(self, like: nn.Module, group: Group):
        nn.Module.__init__(self)
        self.__dict__.update(like.__dict__)  # its settings, parameters, buffers and hooks
        self.group = group

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            of_batch = self.running_mean is None
            return F.batch_norm(h, self.running_mean, self.running_var, self.weight, self.bias, of_batch, 0.0, self.eps)
        over, shape = [0, *range(2, h.dim())], (1, -1, *[1] * (h.dim() - 2))
        counts = 0.0 if self.group.idle else 1.0  # an idle rank's example does not count
        values = h.double()
        N = 2.0  # in a prediction the sum is not exchanged, and N does not matter
        if has_data(h):
            N = self.group.total([counts * h.numel() / h.shape[1]], "BatchNorm's number of examples").item()
        if N < 2:
            raise ValueError(f"BatchNorm in training mode needs more than one value a channel, got {tuple(h.shape)}")
        mean = self._sum(counts * values.sum(over)) / N
        centred = values - mean.view(shape)
        variance = self._sum(counts * centred.square().sum(over)) / N
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean), momentum)
            self.running_var.lerp_((variance.detach() * N / (N - 1)).to(self.running_var), momentum)
        x = (centred * (variance + self.eps).rsqrt().view(shape)).to(h)
        return x if self.weight is None else torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))

    def _sum(self, values: Tensor) -> Tensor:
        summed: Tensor = _Sum.apply(values, self.group) if has_data(values) else values
        return summed


class _Sum(torch.autograd.Function):
    """The sum over ranks of (C,) numbers, in float64; its gradient on each rank is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.total(values, "BatchNorm's statistics")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.total(gradient, "BatchNorm's gradients"), None
