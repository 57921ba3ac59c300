"""What sees torch's operations, and tensors without data: what core/watcher.py needs of torch's private names."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memdfa_lab.core import compat
from memdfa_lab.core.watcher import Watcher, empty_of_shape, has_data, storages_replaceable, unwatched, watchers


class Seen(Watcher):
    def __init__(self) -> None:
        self.operations: list[Any] = []

    def watch(self, operation: Any, args: Any, kwargs: Any) -> Any:
        self.operations.append(operation)
        return operation(*args, **kwargs)


def test_a_watcher_sees_each_operation_but_those_unwatched_and_others_within():
    x, aten = torch.ones(2), compat.aten
    with Seen() as seen:
        assert watchers() == (seen,)
        x + 1
        with unwatched():
            assert watchers() == ()
            x * 2
        with Seen() as first:
            x - 1
        bool(x.sum() > 0)
        with pytest.raises(RuntimeError, match="must match"):
            x + torch.ones(3)
    x / 2
    assert watchers() == ()
    ones = [aten.ones.default, aten.add.Tensor]
    assert seen.operations == [
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.sum.default,
        aten.gt.Scalar,
        compat.TRUTH_VALUE,
        *ones,
    ]
    assert first.operations == [aten.sub.Tensor]


def test_torch_takes_the_operations_that_it_takes_unwatched():
    x = torch.rand(5, requires_grad=True)
    with Seen() as seen:
        x.clone().sgn().cumprod(0).sum().backward()
        x.grad = None
        torch.maximum(x.clone(), x.detach()).sum().backward()
    assert compat.aten.masked_fill_.Scalar in seen.operations  # under a dispatch mode it is masked_fill


def test_a_watcher_goes_along_to_a_backward_pass_and_not_to_other_threads():
    x, seen = torch.ones(2, requires_grad=True), Seen()
    with seen:
        y = (x * 2).sum()
        before = len(seen.operations)
        y.backward()
        after = len(seen.operations)
        thread = threading.Thread(target=lambda: torch.ones(2) + 1)
        thread.start()
        thread.join()
    assert before < after == len(seen.operations)


def test_parameters_and_tensors_of_another_class_can_be_made_while_watched():
    class Named(Tensor):
        pass

    with Seen() as seen:
        parameter = nn.Parameter(torch.ones(2))
        assert isinstance(torch.ones(2).as_subclass(Named), Named)
        assert isinstance(copy.deepcopy(nn.Linear(2, 2)).weight, nn.Parameter)
    assert isinstance(parameter, nn.Parameter)
    assert compat.aten.ones.default in seen.operations
    assert "_make_subclass" not in vars(Tensor)


def test_a_tensor_without_data_has_shape_and_size_and_views_and_refuses_all_else():
    x = empty_of_shape((10**6, 10**6), (10**6, 1), torch.float32, 4 * 10**12)
    assert (x.device.type, x.shape, x.untyped_storage().nbytes()) == ("cpu", (10**6, 10**6), 4 * 10**12)
    assert compat.storage_id(x[3:].t()) == compat.storage_id(x.detach()) == compat.storage_id(x)
    assert [has_data(tensor) for tensor in (x, torch.ones(2, device="meta"), torch.ones(2))] == [False, False, True]
    for ask in (torch.sum, Tensor.numpy, Tensor.relu_, Tensor.data_ptr, repr, lambda x: x[0, 0].item()):
        with pytest.raises(RuntimeError, match="part of a prediction"):
            ask(x)


def test_a_storage_without_data_can_be_resized_and_given_to_others():
    x = empty_of_shape((3,), (1,), torch.float32, 12)
    before, y = compat.storage_id(x), torch.empty(0)
    for size in (40, 0, 8, 8):
        x.untyped_storage().resize_(size)
        assert (compat.storage_id(x), x.untyped_storage().nbytes()) == (before, size)
    with storages_replaceable(x.untyped_storage()):
        y.set_(x.untyped_storage(), 0, (2,), (1,))
    assert compat.storage_id(y) == before
    for tensor in (x, y):
        with pytest.raises(RuntimeError, match="part of a prediction"):
            tensor.sum()
