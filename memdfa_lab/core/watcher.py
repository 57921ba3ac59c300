"""Watch each operation that torch runs, and make tensors without data: the basis of the profilers and the rehearsal.

Like core/compat.py this module uses private names of torch; tests/test_watcher.py tests what it needs of each.
"""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Self

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._python_dispatch import _disable_current_modes

_C: Any = torch._C  # torch's stubs lack some of it

# Between autograd and the kernels torch's dispatcher has a place for C++ FakeTensor, which Python cannot switch on.
_PLACE: Any = _C._parse_dispatch_key("Fake")
_WATCHERS = "memdfa_lab watchers"  # the key of a thread's watchers; autograd passes them on to its own threads


def _takes_over() -> bool:
    """Tell whether storing an object for a thread takes over our reference, as in old releases, or adds its own."""
    kept = (object(),)
    before = sys.getrefcount(kept)
    _C._stash_obj_in_tls("memdfa_lab asks", kept)
    takes_over = sys.getrefcount(kept) == before
    if takes_over:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return takes_over


_TAKES_OVER = _takes_over()


class Watcher:
    """A context within which `watch` runs each of torch's operations, after autograd has recorded it.

    A TorchDispatchMode sees the same operations, but with one active torch's backward formulas use other operations.
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
    """Return the active watchers of this thread; the last of them sees an operation first."""
    return _C._get_obj_in_tls(_WATCHERS) if _C._is_key_in_tls(_WATCHERS) else ()


def _watch_by(inner: tuple[Watcher, ...]) -> None:
    if _TAKES_OVER:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(inner))
    _C._stash_obj_in_tls(_WATCHERS, inner)
    _C._dispatch_tls_set_dispatch_key_included(_PLACE, bool(inner))


@contextmanager
def unwatched() -> Iterator[None]:
    """Hide the operations within from all watchers and dispatch modes."""
    inner = watchers()
    _watch_by(())
    try:
        with _disable_current_modes():
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


_LIBRARIES = Library("_", "IMPL"), Library("aten", "IMPL", "Fake")  # their registrations last as long as these objects
_LIBRARIES[0].fallback(_seen, "Fake")
# Two functions make a view in C++ that Python must not see, for a tensor of another class: `as_subclass`, ...
_LIBRARIES[1].impl("alias", fallthrough_kernel)


def _made_unseen(*args: Any, **kwargs: Any) -> Tensor:  # ... and the one behind nn.Parameter
    with unwatched():
        made: Tensor = _C.TensorBase._make_subclass(*args, **kwargs)
        return made


_max_pool1d = torch.max_pool1d


def _max_pooled(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run max_pool1d; without a graph, torch runs no operation that a watcher sees, and reads the data."""
    if has_data(input) or not input.numel() or (input.requires_grad and torch.is_grad_enabled()):
        return _max_pool1d(input, *args, **kwargs)
    with unwatched():
        shape = _max_pool1d(torch.empty(input.shape, device="meta"), *args, **kwargs).shape
    return torch.empty(shape, dtype=input.dtype)


def _count(change: int) -> None:
    """Change the number of active watchers, over all threads.

    While a watcher is active, two functions of torch are replaced, and compiled code runs uncompiled.
    """
    global _in_force
    tensor: Any = Tensor
    with _LOCK:
        _in_force += change
        if not _in_force:
            _REPLACED.close()
        elif _in_force == change == 1:
            tensor._make_subclass, torch.max_pool1d = staticmethod(_made_unseen), _max_pooled
            _REPLACED.callback(delattr, Tensor, "_make_subclass")
            _REPLACED.callback(setattr, torch, "max_pool1d", _max_pool1d)
            if "torch._dynamo" in sys.modules:  # to import it takes seconds
                _REPLACED.enter_context(torch.compiler.set_stance("force_eager"))


_LOCK, _REPLACED, _in_force = Lock(), ExitStack(), 0


# Tensors whose device is the CPU, and that have no data
_CPU, _NOWHERE = torch.device("cpu"), 1
_NO_DATA = "this tensor has a shape and no data, since it is part of a prediction: only operations of torch may use it"


class _StorageWithoutData(torch.UntypedStorage):
    def resize_(self, size: int) -> None:
        own: Any = self
        with storages_replaceable(own):
            for part in (0, size):  # torch swaps only memory of equal size, or none
                own._swap_data_ptr_(_C._construct_storage_from_data_pointer(_NOWHERE, _CPU, part))


def empty_of_shape(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, size_bytes: int, why: str = _NO_DATA
) -> Tensor:
    """Return a CPU tensor over a storage that reports this size and has no memory.

    An access to its data, outside of a watcher that answers instead, raises RuntimeError with the text `why`.
    """
    storage = _C._construct_storage_from_data_pointer(_NOWHERE, _CPU, size_bytes)
    storage.__class__ = _StorageWithoutData
    tensor = torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)
    _C._set_storage_data_ptr_access_error_msg(storage._cdata, why)
    return tensor


@contextmanager
def storages_replaceable(*storages: torch.UntypedStorage) -> Iterator[None]:
    """Allow those of these storages that have no data to be given to other tensors or resized within."""
    locked = {storage._cdata for storage in storages if isinstance(storage, _StorageWithoutData)}
    for key in locked:
        getattr(_C, "_clear_storage_data_ptr_access_error_msg", lambda key: None)(key)
    try:
        yield
    finally:
        for key in locked:
            _C._set_storage_data_ptr_access_error_msg(key, _NO_DATA)


def has_data(tensor: Tensor) -> bool:
    """Tell whether a tensor has data; a tensor of a prediction, on the meta device, or in a store has none."""
    if tensor.is_meta:
        return False
    storage = tensor.untyped_storage()
    return not isinstance(storage, _StorageWithoutData) and (storage.nbytes() > 0 or not tensor.numel())
