"""torch's private names, each behind a name of ours.

torch may change them in any release. They are used nowhere else, and tests/test_compat.py says what is needed of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType, _ExperimentalConfig
from torch.library import Library, fallthrough_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _python_dispatch, _pytree

aten = torch.ops.aten
_C: Any = torch._C  # torch's stubs lack some of it

ANY_CONVOLUTION = _ConvNd
ANY_BATCH_NORM = _BatchNorm
has_global_hooks = _has_any_global_hook  # whether torch calls hooks for every module
copying_view = aten._unsafe_view  # a reshaped tensor that autograd takes for one of its own: in-place changes are safe
TRUTH_VALUE = aten._local_scalar_dense.default  # the operation by which a tensor becomes a number, as in `if tensor:`
SUM = aten.add.Tensor

tree_map_only = _pytree.tree_map_only  # a copy of nested lists and dictionaries, with what is of a type replaced

# Autograd numbers its nodes in the order of the forward pass.
next_node_number: Callable[[], int] = _C._autograd._get_sequence_nr
current_node: Callable[[], Any] = _C._current_autograd_node  # the one that this thread runs; None outside backward

without_modes = _python_dispatch._disable_current_modes

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


def node_number(node: Any) -> int:
    """Return the number of a node of autograd's graph."""
    return int(node._sequence_nr())


def has_hooks(module: nn.Module) -> bool:
    """Tell whether the module, or a parameter of its own, has hooks of any kind."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    return any(kinds) or any(p._backward_hooks or p._post_accumulate_grad_hooks for p in own)


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether the optimizer has hooks of its own around its step."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def check_input_dim(norm: Any, h: Tensor) -> None:
    """Raise ValueError, as BatchNorm does, if h has another number of dimensions than the layer takes."""
    norm._check_input_dim(h)


def convolution_layout(h: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the layout in which the CPU puts out a convolution; h and weight may be on the meta device."""
    layout: torch.memory_format = _C._conv_determine_backend_memory_format(h, weight, _C._ConvBackend.Mkldnn)
    return layout


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


# Between autograd and the kernels torch's dispatcher has a place for C++ FakeTensor, which Python cannot switch on.
_PLACE: Any = _C._parse_dispatch_key("Fake")
_WATCHERS = "memdfa_lab watchers"  # where they are kept for a thread; autograd's threads are given them


class Watcher:
    """Within it each operation that torch runs is run by `watch`, once autograd has noted it.

    A TorchDispatchMode sees the same, but where there is one torch's backward formulas take other operations.
    """

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Run operation(*args, **kwargs), which this watcher does not see again, and return its output."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        _count(1)
        _watch_by((*watchers(), self))
        return self

    def __exit__(self, *problem: object) -> None:
        _watch_by(watchers()[:-1])
        _count(-1)


def watchers() -> tuple[Watcher, ...]:
    """Return the watchers in force in this thread; the last of them sees an operation first."""
    return _C._get_obj_in_tls(_WATCHERS) if _C._is_key_in_tls(_WATCHERS) else ()


def _watch_by(inner: tuple[Watcher, ...]) -> None:
    _C._stash_obj_in_tls(_WATCHERS, inner)
    _C._dispatch_tls_set_dispatch_key_included(_PLACE, bool(inner))


@contextmanager
def unwatched() -> Iterator[None]:
    """Let nothing see the operations within, neither watchers nor dispatch modes."""
    inner = watchers()
    _watch_by(())
    try:
        with without_modes():
            yield
    finally:
        _watch_by(inner)


def _seen(operation: Any, *args: Any, **kwargs: Any) -> Any:
    inner = _C._get_obj_in_tls(_WATCHERS)
    _watch_by(inner[:-1])
    try:
        return inner[-1].watch(operation, args, kwargs)
    finally:
        _watch_by(inner)


_LIBRARIES = Library("_", "IMPL"), Library("aten", "IMPL", "Fake")  # what they register is there as long as they are
_LIBRARIES[0].fallback(_seen, "Fake")
# Two functions take a view in C++, for a tensor of another class, and Python must not have met it: `as_subclass`, ...
_LIBRARIES[1].impl("alias", fallthrough_kernel)


def _made_unseen(*args: Any, **kwargs: Any) -> Tensor:  # ... and the one behind nn.Parameter
    with unwatched():
        return _C.TensorBase._make_subclass(*args, **kwargs)


_max_pool1d = torch.max_pool1d


def _max_pooled(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Without a graph torch pools in no operation that can be seen: it takes memory, and reads the data."""
    if address(input) is not None or not input.numel() or (input.requires_grad and torch.is_grad_enabled()):
        return _max_pool1d(input, *args, **kwargs)
    with unwatched():
        shape = _max_pool1d(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
    return torch.empty(shape, dtype=input.dtype)


def _count(change: int) -> None:
    """Note so many more watchers in force, in any thread, and replace two functions of torch while there is one."""
    global _in_force
    tensor: Any = Tensor
    with _LOCK:
        _in_force += change
        if _in_force:
            tensor._make_subclass, torch.max_pool1d = staticmethod(_made_unseen), _max_pooled
        else:
            del tensor._make_subclass
            torch.max_pool1d = _max_pool1d


_LOCK, _in_force = Lock(), 0


# Tensors that say that they are on the CPU, and have no data
_CPU, _NOWHERE = torch.device("cpu"), 1
_NO_DATA = "this tensor has a shape and no data, since it is part of a prediction: only operations of torch may use it"


class _StorageWithoutData(torch.UntypedStorage):
    def resize_(self, size: int) -> None:
        own: Any = self
        with storages_replaceable(own):
            for part in (0, size):  # torch swaps what is of the same size or none
                own._swap_data_ptr_(_C._construct_storage_from_data_pointer(_NOWHERE, _CPU, part))


def empty_of_shape(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, size_bytes: int) -> Tensor:
    """Return a CPU tensor over a storage that says it has this size, and has no memory.

    Who asks for the data, outside of a watcher that answers instead, gets a RuntimeError.
    """
    storage = _C._construct_storage_from_data_pointer(_NOWHERE, _CPU, size_bytes)
    storage.__class__ = _StorageWithoutData
    tensor = torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)
    _C._set_storage_data_ptr_access_error_msg(storage._cdata, _NO_DATA)
    return tensor


@contextmanager
def storages_replaceable(*storages: torch.UntypedStorage) -> Iterator[None]:
    """Let these storages, where they have no data, be given to other tensors, or be resized, within."""
    locked = {storage._cdata for storage in storages if isinstance(storage, _StorageWithoutData)}
    for key in locked:
        _C._clear_storage_data_ptr_access_error_msg(key)
    try:
        yield
    finally:
        for key in locked:
            _C._set_storage_data_ptr_access_error_msg(key, _NO_DATA)


def address(tensor: Tensor) -> int | None:
    """Return where the tensor's data are in memory; None if it has none."""
    return None if tensor.is_meta or isinstance(tensor.untyped_storage(), _StorageWithoutData) else tensor.data_ptr()


def is_onednns(input: Tensor, weight: Tensor, bias_sizes: Any, *settings: Any) -> bool:
    """Tell whether oneDNN runs this convolution on the CPU; the tensors may be without data."""
    backend = _C._select_conv_backend(input, weight, None, *settings, bias_sizes)
    return bool(backend == _C._ConvBackend.Mkldnn)
