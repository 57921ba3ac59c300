"""Operations on tensors without data, for the shapes of their outputs.

The tensors claim to be on the CPU, so that torch runs the operations that it runs there. The output of each is computed
on torch's meta device.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from memdfa_lab.core.compat import (
    TRUTH_VALUE,
    aten,
    convolution_layout,
    is_onednns,
    storage_id,
    takes_device,
    tree_map_only,
)
from memdfa_lab.core.contract import tensors_in
from memdfa_lab.core.watcher import Watcher, empty_of_shape, storages_replaceable

META = torch.device("meta")
# The operations whose memory is predicted to the byte, as tests/test_proved.py shows; it also tests the list itself.
PROVED = frozenset(f"aten::{name}" for name in Path(__file__).with_name("proved.txt").read_text("ascii").split())
MOST_SEEN = 2_000  # the largest number of operations whose output is remembered
FEW = 2**20  # numbers that an operation may be given to be tried on zeros
REDUCED = (  # for these sums the CPU allocates all terms, and shrinks that memory to a scalar
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
    aten.binary_cross_entropy.default,
)
NORM_BACKWARD = aten.native_batch_norm_backward.default, aten.native_group_norm_backward.default
AS_THE_ERROR = aten.elu_backward.default, aten.hardswish_backward.default, aten.softplus_backward.default  # its layout
MakeAgain = Callable[[Any, Any], Any]  # makes an operation's output, from its args and kwargs


class ShapesAlone(Watcher):
    """A watcher that runs operations for their shapes only, and answers each question about a value with `truth`.

    `truth` is 1 in a step, where a question is mostly whether all is well, as in torch.isfinite(x).all(). It is 0 while
    a model is made, where a question is whether to draw again, as in trunc_normal_, or whether a value is out of range.

    An operation's output follows from the shapes of its inputs. Blocks are often alike, and so are consecutive
    predictions. An output that was worked out once is therefore made again without running the operation.
    """

    seen: ClassVar[dict[Any, MakeAgain]] = {}
    warned: ClassVar[set[str]] = set()

    def __init__(self, truth: int = 1):
        self.truth = truth

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Return the output of operation(*args, **kwargs), without data."""
        if operation is TRUTH_VALUE:  # `if torch.isfinite(x):`, but there is no x
            return self.truth
        if operation.is_view:  # a view needs no data
            return operation(*args, **kwargs)
        key = (operation, _shapes(args), _shapes(kwargs), torch.get_default_dtype(), torch.is_grad_enabled())
        make_again = self.seen.get(key)
        if make_again is not None:
            return make_again(args, kwargs)
        if torch.Tag.inplace_view in operation.tags and "resize" not in operation.name():
            storages = [value for value in args if isinstance(value, torch.UntypedStorage)]
            with storages_replaceable(*storages, *[tensor.untyped_storage() for tensor in tensors_in(args)]):
                return operation(*args, **kwargs)
        out = _without_running(operation, args, kwargs)
        given, name = set(map(storage_id, tensors_in([args, kwargs]))), operation.name()
        takes_memory = any(storage_id(tensor) not in given for tensor in tensors_in(out))
        if takes_memory and self.truth and name not in PROVED and name not in self.warned:
            self.warned.add(name)
            warnings.warn(
                f"no test has shown that the memory of {name} is predicted to the byte: compare with ml.memory.measure "
                "on a batch that fits",
                stacklevel=2,
            )
        make_again = _recipe(out, args, kwargs)
        if make_again is not None and key[1:3] == (_shapes(args), _shapes(kwargs)):  # out=... may be resized
            if len(self.seen) >= MOST_SEEN:
                self.seen.clear()
            self.seen[key] = make_again
        return out


def _without_running(operation: Any, args: Any, kwargs: Any) -> Any:
    """Return an operation's output as on the CPU, but without data, from its output on the meta device."""
    twins: dict[int, tuple[Tensor, Tensor]] = {}  # by storage of the twin on the meta device

    def on_meta(tensor: Tensor) -> Tensor:
        for own, twin in twins.values():
            if own is tensor:
                return twin
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
        twins[storage_id(twin)] = tensor, twin
        return twin

    def on_cpu(out: Tensor) -> Tensor:
        own, twin = twins.get(storage_id(out), (None, None))
        size_bytes = out.untyped_storage().nbytes()
        if own is None:
            return empty_of_shape(out.shape, out.stride(), out.dtype, size_bytes)
        if out is not twin:  # another view of what was given
            return own.as_strided(out.shape, out.stride(), own.storage_offset() + out.storage_offset())
        if (own.shape, own.stride()) != (out.shape, out.stride()):  # resized
            storage, offset = own.untyped_storage(), own.storage_offset()
            storage.resize_(max(size_bytes + int(offset) * own.itemsize, storage.nbytes()))
            with storages_replaceable(storage):
                own.set_(storage, offset, out.shape, out.stride())
        return own

    there, options = tree_map_only(Tensor, on_meta, (args, kwargs))
    if "device" in kwargs or (not twins and takes_device(operation)):
        options["device"] = META
    out = _on_meta(operation, there, options, args)
    if any(_is_ambiguous(tensor) and storage_id(tensor) not in twins for tensor in tensors_in(out)):
        out = _with_the_cpus_strides(operation, args, kwargs, out)
    return tree_map_only(Tensor, on_cpu, out)


def _on_meta(operation: Any, args: Any, kwargs: Any, on_cpu: Any) -> Any:
    """Run an operation on the meta device, and correct outputs that differ from those on the CPU."""
    out = operation(*args, **kwargs)
    if operation is aten.convolution.default:
        both = [value.float() if value.dim() == 4 else value for value in args[:2]]  # images of any precision
        return torch.empty_like(out, memory_format=convolution_layout(*both))
    if operation is aten.convolution_backward.default and args[-1][1:] == [False, True] and is_onednns(*on_cpu[1:-1]):
        filters = args[2] if args[2].dim() > 3 else args[2].unsqueeze(2)  # oneDNN makes dW, too
        return out[0], torch.empty_like(filters), out[2]
    if operation is aten.mkldnn_rnn_layer.default:
        return *out[:3], torch.empty(_onednns_workspace(on_cpu), dtype=torch.uint8, device=META)
    if operation in REDUCED and not out.dim():
        return torch.empty_like(args[0]).resize_(())
    if operation is aten.native_batch_norm.default:  # the precision of mean and deviation; eval mode has none
        dtype = next(value.dtype for value in (args[1], args[3], args[0]) if value is not None)
        return out[0], *[value[: None if args[5] else 0].to(dtype, copy=True) for value in out[1:]]
    if operation is aten.native_layer_norm.default:  # likewise
        return out[0], *[value.to((args[0] if args[2] is None else args[2]).dtype, copy=True) for value in out[1:]]
    if operation is aten.native_group_norm.default:
        dtype = (args[0] if args[1] is None else args[1]).dtype
        return torch.empty_like(args[0]), *[value.to(dtype) for value in out[1:]]
    if operation in NORM_BACKWARD:  # in the input's layout, and no gradients that were not asked for
        out = torch.empty_like(args[1]), *out[1:]
        return tuple(part if wanted else None for part, wanted in zip(out, args[-1], strict=True))
    if operation in AS_THE_ERROR:
        return torch.empty_like(args[0])
    pointwise = torch.Tag.pointwise in operation.tags and operation is not aten.clone.default
    if pointwise and _are_plain(tensors_in([args, kwargs]), out):
        return torch.empty_like(out, memory_format=torch.contiguous_format)  # one pixel has several layouts
    return out


def _is_ambiguous(tensor: Tensor) -> bool:
    """Tell whether images (N, C, H, W) have one channel or one pixel, so that they lie with channels first and last."""
    return tensor.dim() == 4 and tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _with_the_cpus_strides(operation: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Return outputs on the meta device with the strides that the CPU gives them, from a run on zeros if they are few.

    For one channel or one pixel the meta device often has other strides. A convolution chooses its layout by them.
    """
    few = sum(tensor.numel() for tensor in tensors_in([args, kwargs])) <= FEW
    if not few or torch.Tag.nondeterministic_seeded in operation.tags:
        return out
    ran = tensors_in(operation(*_zeros(args), **_zeros(kwargs)))
    strides = {id(tensor): real.stride() for tensor, real in zip(tensors_in(out), ran, strict=True)}

    def restrided(tensor: Tensor) -> Tensor:
        if not _is_ambiguous(tensor):
            return tensor
        return torch.empty_strided(tensor.shape, strides[id(tensor)], dtype=tensor.dtype, device=META)

    return tree_map_only(Tensor, restrided, out)


def _are_plain(given: list[Tensor], out: Any) -> bool:
    """Tell whether all that an operation was given is contiguous and has the shape of its output, a new tensor."""
    shape = out.shape if isinstance(out, Tensor) else None
    return shape is not None and all(one is not out and one.shape == shape and one.is_contiguous() for one in given)


def _zeros(value: Any) -> Any:
    """Return arguments with tensors of zeros, laid out as the tensors given, in their place."""
    return tree_map_only(Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).zero_(), value)


def _onednns_workspace(args: Any) -> int:
    """Return the bytes that oneDNN keeps of a recurrent layer for its gradient, from a run on zeros."""
    workspace = aten.mkldnn_rnn_layer.default(*_zeros(args))[3]
    return 0 if workspace is None else int(workspace.numel())


def _shapes(value: Any) -> Any:
    """Return everything about an argument that an output without data can depend on."""
    kind = type(value)
    if issubclass(kind, Tensor):
        return value.shape, value.stride(), value.dtype
    if kind is tuple or kind is list:
        return tuple([_shapes(item) for item in value])
    if kind is dict:
        return tuple([(name, _shapes(item)) for name, item in value.items()])
    return None if kind is torch.Generator else (kind, value)  # the kind, since 1 == 1.0 == True


def _recipe(out: Any, args: Any, kwargs: Any) -> MakeAgain | None:
    """Return a function that makes the output for other arguments of these shapes; None if only the operation can."""
    if out is None:
        return lambda args, kwargs: None
    if isinstance(out, (list, tuple)):
        kind: Any = type(out)
        parts: list[Any] = [_recipe(part, args, kwargs) for part in out]
        return None if None in parts else lambda args, kwargs: kind([part(args, kwargs) for part in parts])
    given = {**dict(enumerate(args)), **kwargs}
    for place in [place for place, value in given.items() if value is out]:  # in place, or into out=...
        return lambda args, kwargs: (args if isinstance(place, int) else kwargs)[place]
    if not isinstance(out, Tensor) or storage_id(out) in map(storage_id, tensors_in(given)):
        return None
    new = out.shape, out.stride(), out.dtype, out.untyped_storage().nbytes()
    return lambda args, kwargs: empty_of_shape(*new)
