"""torch's private names, each behind a name of this package.

torch may change them in any release, so tests/test_compat.py tests what the package needs of each. Only core/watcher.py
uses further private names.
"""

import inspect
import platform
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _KinetoEvent
from torch._C._profiler import _EventType, _ExperimentalConfig
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.transformer import _detect_is_causal_mask
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree

aten = torch.ops.aten
_C: Any = torch._C  # torch's stubs lack some of it

ANY_CONVOLUTION = _ConvNd
ANY_BATCH_NORM = _BatchNorm
_GLOBAL_HOOKS = [held for name, held in vars(_module).items() if name.startswith("_global_") and isinstance(held, dict)]
copying_view = aten._unsafe_view  # a reshaped tensor that autograd does not treat as a view: in-place changes are safe
TRUTH_VALUE = aten._local_scalar_dense.default  # the operation by which a tensor becomes a number, as in `if tensor:`
SUM = aten.add.Tensor

tree_map_only = _pytree.tree_map_only  # a copy of nested lists and dictionaries, with the objects of one type replaced

autocast_is_on: Callable[[], bool] = _C._is_any_autocast_enabled  # on any device, in this thread

# Autograd numbers its nodes in the order of the forward pass.
next_node_number: Callable[[], int] = _C._autograd._get_sequence_nr
current_node: Callable[[], Any] = _C._current_autograd_node  # the one that this thread runs; None outside backward

_run_engine: Callable[..., Any] = torch.autograd.graph._engine_run_backward

transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active  # vmap, grad, ... of torch.func


def int8_product(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of (N, K) and (K, M) int8, (N, M) int32."""
    return torch._int_mm(one, other) if one.device.type in ("cpu", "meta") else _filled_up(one, other)


@cache
def has_int8_product(device: str) -> bool:
    """Tell whether this release of torch multiplies int8 on this kind of device."""
    ones = torch.ones(32, 32, dtype=torch.int8, device=device)
    try:
        return bool((int8_product(ones, ones) == 32).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _filled_up(one: Tensor, other: Tensor) -> Tensor:
    """Return the product of matrices padded by zeros: CUDA takes sizes in multiples of 8, and more than 16 rows."""
    (N, K), M = one.shape, other.shape[1]
    wide = F.pad(one, (0, -K % 8, 0, max(17 - N, 0)))
    return torch._int_mm(wide, F.pad(other.t(), (0, -K % 8, 0, -M % 8)).t())[:N, :M]


def has_fast_product(dtype: torch.dtype, device: str) -> bool:
    """Tell whether products of bfloat16, or of int8, are faster here than those of float32; on a GPU they are."""
    if device != "cpu":
        return True
    if platform.machine().lower() in ("aarch64", "arm64"):
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        told = [has for name, has in known.items() if ("bf16" if dtype == torch.bfloat16 else "i8mm") in name]
        return any(told) or not told  # older releases do not tell
    bfloat16: Any = torch.cpu._is_avx512_bf16_supported
    int8: Any = torch.cpu._is_vnni_supported
    return torch.cpu._is_amx_tile_supported() or bool((bfloat16 if dtype == torch.bfloat16 else int8)())


# torch.profiler's records of the allocator, and of the overloads of operations
ALLOCATION = _EventType.Allocation
_HOW: Any = {"capture_overload_names": True} if hasattr(_KinetoEvent, "overload_name") else {}
OVERLOADS_TOO = _ExperimentalConfig(**_HOW)


def overload_name(event: Any) -> str:
    """Return which overload of an operation the profiler saw; before torch 2.7 it did not say."""
    return event.overload_name() if hasattr(event, "overload_name") else ""


def storage_id(tensor: Tensor) -> int:
    """Return a number that tells storages apart while they live; all views of a storage have the same."""
    return int(tensor.untyped_storage()._cdata)


def version(tensor: Tensor) -> int:
    """Return how often the tensor has been changed in place."""
    return tensor._version


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own buffers by name, in the dictionary in which they can be replaced."""
    return module._buffers


def parts_of(module: nn.Module) -> list[dict[str, Any]]:
    """Return the module's own dictionaries of parameters and of modules, by name, those that are not empty.

    TorchScript's modules have none.
    """
    return [held for held in (module._parameters, module._modules) if isinstance(held, dict) and held]


def saves_through_hooks() -> bool:
    """Tell whether autograd passes what it saves through hooks, as in a checkpoint. Before torch 2.8: True, always."""
    top = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None


def node_number(node: Any) -> int:
    """Return the number of a node of autograd's graph."""
    return int(node._sequence_nr())


def run_backward(out: Tensor, gradient: Tensor) -> None:
    """Run out.backward(gradient) with modes that see torch's functions on; Tensor.backward switches them off."""
    _run_engine((out,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def has_global_hooks() -> bool:
    """Tell whether torch calls hooks for every module."""
    return any(_GLOBAL_HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether the module, or a parameter of its own, has hooks of any kind."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    own = module._parameters.values()
    return any(p._backward_hooks or p._post_accumulate_grad_hooks for p in own if p is not None)


def is_causal_mask(mask: Tensor) -> bool:
    """Tell whether torch's encoder treats this attention mask as causal."""
    return _detect_is_causal_mask(mask)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether hooks, of this optimizer or of all, run around its step, or the step is not torch's own."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return True
    replaced = vars(optimizer).get("step")
    if replaced is not None:
        return not is_torchs_step(inspect.unwrap(replaced))  # a scheduler wraps torch's own
    return not is_torchs_step(type(optimizer).step)


@cache
def is_torchs_step(step: Callable[..., Any]) -> bool:
    """Tell whether this step method is one of torch's own optimizers."""
    return str(inspect.unwrap(step).__module__).startswith("torch.optim.")


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
    """Return the memory layout of a convolution's output on the CPU; h and weight may be on the meta device."""
    layout: torch.memory_format = _C._conv_determine_backend_memory_format(h, weight, _C._ConvBackend.Mkldnn)
    return layout


def shut_down_workers(batches: object) -> None:
    """End the worker processes of an iterator over a DataLoader, if it has any."""
    end = getattr(batches, "_shutdown_workers", None)
    if end is not None:
        end()


def is_composite(operation: str) -> bool:
    """Tell whether an operation consists of others on the CPU. Raises RuntimeError if the dispatcher lacks it."""
    own, several = (
        _C._dispatch_has_kernel_for_dispatch_key(operation, key) for key in ("CPU", "CompositeImplicitAutograd")
    )
    return bool(several and not own)


def takes_device(operation: Any) -> bool:
    """Tell whether an operation has an argument for the device of its output."""
    return any(argument.name == "device" for argument in operation._schema.arguments)


def is_onednns(input: Tensor, weight: Tensor, bias_sizes: Any, *settings: Any) -> bool:
    """Tell whether oneDNN runs this convolution on the CPU; the tensors may be without data."""
    backend = _C._select_conv_backend(input, weight, None, *settings, bias_sizes)
    return 0 <= int(backend) - int(_C._ConvBackend.Mkldnn) <= 1  # the next, for transposed ones, has no name in Python
