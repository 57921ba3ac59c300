"""BatchNorm over the examples of all ranks, on any device: torch's own SyncBatchNorm is for GPUs alone.

For h (n, C, ...) on each rank, x = (h - mean) / sqrt(variance + eps), and a signal s at x becomes at h

    (s - mean(s) - x mean(s x)) / sqrt(variance + eps),

each mean and the variance over all ranks' examples and pixels (Ioffe and Szegedy 2015).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from memdfa_lab.lab.distributed import Group

WHAT = "BatchNorm's statistics"


def synchronise(model: nn.Module, group: Group) -> None:
    """Make each BatchNorm in the model one whose statistics are the whole batch's; weights and buffers stay.

    A block with one then runs by autograd, not by hand as in `local`. In a group of one process nothing changes.
    """
    if group.size == 1:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(module, name, SyncBatchNorm(child, group))


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm, of h (n, C, ...), that normalises by mean and variance over all ranks' examples in training."""

    def __init__(self, like: _BatchNorm, group: Group):
        nn.Module.__init__(self)
        self.__dict__.update(like.__dict__)  # its settings, parameters, buffers and hooks
        self.group = group

    def forward(self, h: Tensor) -> Tensor:
        if not self.training:
            of_batch = self.running_mean is None
            return F.batch_norm(h, self.running_mean, self.running_var, self.weight, self.bias, of_batch, 0.0, self.eps)
        x, mean, variance = _Normalise.apply(h, self.eps, self.group)
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            for running, value in ((self.running_mean, mean), (self.running_var, variance)):
                running.lerp_(value.to(running), momentum)
        if self.weight is None:
            return x
        shape = (1, -1, *[1] * (h.dim() - 2))
        return torch.addcmul(self.bias.view(shape), x, self.weight.view(shape))


class _Normalise(torch.autograd.Function):
    """x, and for the running statistics the mean and the unbiased variance, (C,) each."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, eps: float, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        over, shape = [0, *range(2, h.dim())], (1, -1, *[1] * (h.dim() - 2))
        n = 0 if group.idle else h.numel() // h.shape[1]
        own_variance, own_mean = (value.double() for value in torch.var_mean(h, over, correction=0))
        sums = group.total(torch.cat([n * own_mean, own_mean.new_tensor([n])]), WHAT)
        N, mean = float(sums[-1]), sums[:-1] / sums[-1]
        if N < 2:
            raise ValueError(f"BatchNorm in training mode needs more than one value a channel, got {tuple(h.shape)}")
        variance = group.total(n * (own_variance + (own_mean - mean) ** 2), WHAT) / N
        scale = (variance + eps).rsqrt()
        x = (h - mean.to(h).view(shape)).mul_(scale.to(h).view(shape))
        ctx.save_for_backward(x, scale)
        ctx.group, ctx.N, ctx.counts = group, N, n > 0
        mean, variance = mean.to(h), (variance * (N / (N - 1))).to(h)
        ctx.mark_non_differentiable(mean, variance)
        return x, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, s: Tensor, *unused: Any) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        means = ctx.group.total(torch.cat([s.sum(over), (s * x).sum(over)]), WHAT) / ctx.N
        if not ctx.counts:  # its example has no part in the means
            return torch.zeros_like(x), None, None
        of_s, of_sx = (value.to(x).view(shape) for value in means.chunk(2))
        return (s - of_s).sub_(x * of_sx).mul_(scale.to(x).view(shape)), None, None
