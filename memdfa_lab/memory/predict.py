"""What a step would hold, without running it: the same step on tensors that have a shape and no data.

On torch's meta device each operation runs for its shapes alone. The rule, the blocks and the optimizer are the real
ones, under the same ledger as a real step, so that prediction and measurement cannot drift apart. (torch's
FakeTensorMode gives the same events, and takes three times as long.)
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from memdfa_lab.memory.ledger import Ledger, measure
from memdfa_lab.memory.trace import Trace
from memdfa_lab.names import known

META = torch.device("meta")
Network = nn.Module | str | Callable[[], nn.Module]


def predict(
    rule: Any,
    network: Network,
    x_shape: tuple[int, ...],
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    feedback: Any = None,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    y_shape: tuple[int, ...] | None = None,
    steps: int = 1,
    **options: Any,
) -> Trace:
    """Return what `measure` would return for this rule, network and batch; nothing is computed, nothing allocated.

    `rule`: a name or a class. `network`: a model, which is not touched; a name of `ml.models`; or a callable that
    makes one, so that it need not exist: `lambda: ml.models.mlp(784, [800] * 1000, 10)`. `x_shape`: (N, ...), floats.
    `optimizer`: SGD with learning rate 0.1 if not given. Labels are N classes, or floats of `y_shape` if given.
    `options` go to the rule. It is a step in the steady state, `measure(..., warm_up=1)`: what a first step leaves
    behind, the optimizer's state and stored feedback, is there already.
    """
    with META, _ShapesAlone(), mock.patch("torch.optim.optimizer._get_fused_kernels_supported_devices", _everywhere):
        model = _without_data(network)
        dtype = next(model.parameters()).dtype
        x = torch.empty(x_shape, dtype=dtype)
        y = torch.empty(x_shape[0], dtype=torch.long) if y_shape is None else torch.empty(y_shape, dtype=dtype)
        make = optimizer or partial(torch.optim.SGD, lr=0.1)
        made = _class_of(rule)(model, optimizer=make, loss_fn=loss_fn, feedback=copy.deepcopy(feedback), **options)
        trace = measure(made, x, y, steps=steps)
        return trace if trace.end_bytes == 0 else measure(made, x, y, steps=steps)


def kept_bytes(run: Callable[[nn.Module, Tensor], Any], blocks: nn.Sequential, x: Tensor) -> list[int]:
    """Return, block by block, how many bytes there are more while the result of `run(block, h)` is held.

    Nothing is computed; the result's `out` is the next block's h.
    """
    sizes = []
    with _disable_current_modes(), META, _ShapesAlone():
        h = torch.empty(x.shape, dtype=x.dtype)
        for block in _without_data(blocks).children():
            with Ledger() as ledger:
                result = run(block, h)
                sizes.append(ledger.trace().end_bytes)
            h = result.out
    return sizes


def _everywhere() -> list[str]:
    return ["cpu", "cuda", "meta"]  # Adam(fused=True) asks whether the device can do it; the CPU can


class _ShapesAlone(TorchDispatchMode):
    """Make what is asked for on the CPU on the meta device, and answer each question about a value with 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:  # `if torch.isfinite(x):`, but there is no x
            return 1
        out = func(*args, **({**kwargs, "device": META} if "device" in kwargs else kwargs))
        if func is torch.ops.aten.convolution.default:  # in the layout that it has on the CPU
            layout = torch._C._conv_determine_backend_memory_format(*args[:2], torch._C._ConvBackend.Mkldnn)
            return torch.empty_like(out, memory_format=layout)
        return out


def _class_of(rule: Any) -> Any:
    if not isinstance(rule, str):
        return rule
    import memdfa_lab  # by name only: nothing here knows what a rule does

    return known("rule", rule, {**memdfa_lab.RULES, **memdfa_lab.BASELINES})


def _without_data(network: Network) -> nn.Module:
    if isinstance(network, str):
        from memdfa_lab import models

        return models.build(network)
    if not isinstance(network, nn.Module):
        return network()
    # The copy's tensors are made beforehand: deepcopy finds them in its memory, and copies no data.
    memory: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        made = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        memory[id(tensor)] = made
    return copy.deepcopy(network, memory)
