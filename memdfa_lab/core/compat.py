"""torch's private names, each behind a name of ours.

torch may change them in any release, so tests/test_compat.py says what is needed of each. Only core/watcher.py uses
others.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch._C._profiler import _EventType, _ExperimentalConfig
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.modules.transformer import _detect_is_causal_mask
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree

aten = torch.ops.aten
_C: Any = torch._C  # torch's stubs lack some of it

ANY_CONVOLUTION = _ConvNd
ANY_BATCH_NORM = _BatchNorm
has_global_hooks = _has_any_global_hook  # whether torch calls hooks for every module
copying_view = aten._unsafe_view  # a reshaped tensor that autograd takes for one of its own: in-place changes are safe
TRUTH_VALUE = aten._local_scalar_dense.default  # the operation by which a tensor becomes a number, as in `if tensor:`
SUM = aten.add.Tensor

tree_map_only = _pytree.tree_map_only  # a copy of nested lists and dictionaries, with what is of a type replaced

autocast_is_on: Callable[[], bool] = _C._is_any_autocast_enabled  # on any device, in this thread

# Autograd numbers its nodes in the order of the forward pass.
next_node_number: Callable[[], int] = _C._autograd._get_sequence_nr
current_node: Callable[[], Any] = _C._current_autograd_node  # the one that this thread runs; None outside backward

# The hooks through which autograd passes what it saves, as in a checkpoint; None without
saved_tensors_hooks: Callable[[bool], Any] = _C._autograd._top_saved_tensors_default_hooks
_run_engine: Callable[..., Any] = torch.autograd.graph._engine_run_backward

transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active  # vmap, grad, ... of torch.func


# torch.profiler's account of the allocator
ALLOCATION = _EventType.Allocation
OVERLOADS_TOO = _ExperimentalConfig(capture_overload_names=True)  # of the operations


def storage_id(tensor: Tensor) -> int:
    """Return a number that tells storages apart while they live; all views of a storage have the same."""
    return tensor.untyped_storage()._cdata


def version(tensor: Tensor) -> int:
    """Return how often the tensor has been changed in place."""
    return tensor._version


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name, in the dictionary in which they can be replaced."""
    return module._buffers


def parts_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the module's own parameters and its own modules by name, where it keeps any, in dictionaries that change.

    TorchScript's modules have none.
    """
    return [held for held in (module._parameters, module._modules) if isinstance(held, dict) and held]


def node_number(node: Any) -> int:
    """Return the number of a node of autograd's graph."""
    return int(node._sequence_nr())


def run_backward(out: Tensor, gradient: Tensor) -> None:
    """Run out.backward(gradient); within it, modes that see torch's functions stay on, which that takes off."""
    _run_engine((out,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether the module, or a parameter of its own, has hooks of any kind."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(kinds) or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in own)


def is_causal_mask(mask: Tensor) -> bool:
    """Tell whether torch's encoder takes this mask of attention for a causal one."""
    return _detect_is_causal_mask(mask)


def record_also(tracer: torch.fx.Tracer, module: ModuleType) -> None:
    """Let a tracer record calls of its `autowrap_functions` where code has them from this module, `torch.zeros` say."""
    tracer._autowrap_search.append(module)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether hooks of the optimizer, or of all optimizers, run around its step, or that is not torch's own."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return True
    replaced = vars(optimizer).get("step")
    if replaced is not None:
        return not is_torchs_step(inspect.unwrap(replaced))  # a scheduler wraps torch's own
    return not is_torchs_step(type(optimizer).step)


@cache
def is_torchs_step(step: Callable[..., Any]) -> bool:
    """Tell whether this is how an optimizer of torch steps."""
    return inspect.unwrap(step).__module__.startswith("torch.optim.")


def saved_by(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that a node of autograd's graph keeps for its gradient."""
    if hasattr(node, "saved_tensors"):  # of an autograd.Function
        yield from (tensor for tensor in node.saved_tensors if tensor is not None)
    for name in dir(node):
        if name.startswith("_saved_"):
            value = getattr(node, name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Tensor):
                    yield item


def check_input_dim(norm: Any, h: Tensor) -> None:
    """Raise ValueError, as BatchNorm does, if h has another number of dimensions than the layer takes."""
    norm._check_input_dim(h)


def convolution_layout(h: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the layout in which the CPU puts out a convolution; h and weight may be on the meta device."""
    layout: torch.memory_format = _C._conv_determine_backend_memory_format(h, weight, _C._ConvBackend.Mkldnn)
    return layout


def shut_down_workers(batches: object) -> None:
    """End the processes from which an iterator over a DataLoader gets its batches, if it has any."""
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


def is_composite(operation: str) -> bool:
    """Tell whether an operation is several others on the CPU. Raises RuntimeError if the dispatcher lacks it."""
    own, several = (
        _C._dispatch_has_kernel_for_dispatch_key(operation, key) for key in ("CPU", "CompositeImplicitAutograd")
    )
    return bool(several and not own)


def takes_device(operation: Any) -> bool:
    """Tell whether an operation can be told on which device to put its output."""
    return any(argument.name == "device" for argument in operation._schema.arguments)


def cuda_history(run: Callable[[], object]) -> Any:
    """Return CUDA's memory history of what runs, as torch's memory viewer takes it."""
    torch.cuda.memory._record_memory_history()
    try:
        run()
        return torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def is_onednns(input: Tensor, weight: Tensor, bias_sizes: Any, *settings: Any) -> bool:
    """Tell whether oneDNN runs this convolution on the CPU; the tensors may be without data."""
    backend = _C._select_conv_backend(input, weight, None, *settings, bias_sizes)
    return bool(backend == _C._ConvBackend.Mkldnn)
