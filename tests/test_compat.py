"""What is needed of each of torch's private names in core/compat.py."""

from __future__ import annotations

import warnings
from multiprocessing import active_children
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from memdfa_lab.core import compat
from memdfa_lab.core.watcher import empty_of_shape

RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))

# ----------------------------------------------------------------------------------------------- tensors and modules


def test_storage_id_is_that_of_all_views_and_another_for_a_copy():
    x = torch.arange(6.0)
    assert {compat.storage_id(view) for view in (x, x[2:], x.view(2, 3).t(), x.detach())} == {compat.storage_id(x)}
    assert compat.storage_id(x.clone()) != compat.storage_id(x)
    assert compat.storage_id(torch.empty(0)) != compat.storage_id(torch.empty(0, device="meta"))


def test_version_counts_changes_in_place_through_views_too():
    x = torch.ones(4)
    before = compat.version(x)
    x.sum(), x + 1
    assert compat.version(x) == before
    x[:2].add_(1)
    x.mul_(2)
    assert compat.version(x) == compat.version(x.detach()) == before + 2


def test_what_buffers_of_returns_can_be_written_to():
    norm = nn.BatchNorm1d(3)
    compat.buffers_of(norm)["running_mean"] = torch.ones(3)
    assert torch.equal(norm.running_mean, torch.ones(3))
    assert list(compat.buffers_of(norm)) == [name for name, _ in norm.named_buffers()]
    assert compat.buffers_of(nn.Sequential(norm)) == {}


def test_any_convolution_and_any_batch_norm_are_the_classes_above_all_of_them():
    for d in ("1d", "2d", "3d"):
        convolutions = [getattr(nn, f"{kind}{d}") for kind in ("Conv", "ConvTranspose", "LazyConv")]
        assert all(issubclass(kind, compat.ANY_CONVOLUTION) for kind in convolutions)
        assert issubclass(getattr(nn, f"BatchNorm{d}"), compat.ANY_BATCH_NORM)
        assert not issubclass(getattr(nn, f"InstanceNorm{d}"), compat.ANY_BATCH_NORM)
    assert issubclass(nn.SyncBatchNorm, compat.ANY_BATCH_NORM)
    assert not any(issubclass(kind, compat.ANY_CONVOLUTION) for kind in (nn.Linear, nn.Unfold, nn.MaxPool2d))


HOOKS = ["forward", "forward_pre", "full_backward", "full_backward_pre"]


def test_hooks_of_every_kind_are_seen_until_they_are_removed():
    layer = nn.Linear(2, 2)
    assert not compat.has_hooks(layer)
    ways = [getattr(layer, f"register_{kind}_hook") for kind in HOOKS]
    ways += [layer.bias.register_hook, layer.weight.register_post_accumulate_grad_hook]
    for register in ways:
        handle = register(lambda *given: None)
        assert compat.has_hooks(layer)
        assert not compat.has_hooks(nn.Sequential(layer))  # its own alone
        handle.remove()
        assert not compat.has_hooks(layer)
    assert not compat.has_global_hooks()
    handle = register_module_forward_hook(lambda *given: None)
    assert compat.has_global_hooks()
    handle.remove()
    assert not compat.has_global_hooks()
    for kind in ("pre", "post"):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        assert not compat.has_step_hooks(optimizer)
        getattr(optimizer, f"register_step_{kind}_hook")(lambda *given: None)
        assert compat.has_step_hooks(optimizer)


def test_autocast_is_on_within_it_on_any_device_and_off_where_it_is_switched_off():
    assert not compat.autocast_is_on()
    for device in ("cpu", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where there is no GPU
            context = torch.autocast(device, torch.bfloat16)
        with context:
            assert compat.autocast_is_on() == torch.is_autocast_enabled(device)
            with torch.autocast(device, enabled=False):
                assert not compat.autocast_is_on()


@pytest.mark.parametrize("wrap", [lambda step: step, lambda step: torch.no_grad()(step)])
def test_a_step_of_torchs_own_is_not_overheard_also_under_a_scheduler(wrap):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert not compat.has_step_hooks(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not compat.has_step_hooks(optimizer)
    optimizer.step = wrap(lambda: None)
    assert compat.has_step_hooks(optimizer)
    handle = register_optimizer_step_post_hook(lambda *given: None)
    assert compat.has_step_hooks(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    handle.remove()


def test_saved_by_yields_what_a_node_keeps():
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    (product,) = [list(compat.saved_by((x * y).grad_fn))]
    assert {id(x)} < {id(tensor) for tensor in product}
    assert all(tensor.requires_grad for tensor in product)
    assert not any(tensor.requires_grad for tensor in compat.saved_by((x + y).grad_fn))
    assert not any(tensor.requires_grad for tensor in compat.saved_by((0.5 * x).grad_fn))
    assert [
        tuple(tensor.shape) for tensor in compat.saved_by(Doubled.apply(torch.ones(2, 3), Tensor.reshape).grad_fn)
    ] == []


def test_parts_of_are_the_dictionaries_that_change_with_the_module():
    layer = nn.Sequential(nn.Linear(2, 2))
    (parts,) = compat.parts_of(layer)
    layer.append(nn.ReLU())
    assert list(parts) == ["0", "1"]
    assert [sorted(held) for held in compat.parts_of(layer[0])] == [["bias", "weight"]]
    assert compat.parts_of(nn.ReLU()) == []


def test_check_input_dim_refuses_what_the_layer_refuses():
    for norm, right in ((nn.BatchNorm1d(2), (3, 2)), (nn.BatchNorm2d(2), (3, 2, 4, 4))):
        compat.check_input_dim(norm, torch.ones(right))
        with pytest.raises(ValueError, match="expected"):
            compat.check_input_dim(norm, torch.ones(*right, 5, 5, 5))


def test_tree_map_only_changes_what_is_of_a_type_however_deep_it_lies():
    tree = {"a": [1, "one", (2.0, 2)], "b": 3}
    assert compat.tree_map_only(int, lambda n: n + 1, tree) == {"a": [2, "one", (2.0, 3)], "b": 4}


# ---------------------------------------------------------------------------------------------------------- autograd


class Doubled(torch.autograd.Function):
    """Twice x, in another shape by the function `reshape`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reshape: Any) -> Tensor:
        return reshape(x * 2, (6,))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad.view(2, 3), None


def test_what_copying_view_returns_may_be_changed_in_place_and_a_view_may_not():
    x = torch.tensor([[-1.0, 2, 3], [4, 5, 6]], requires_grad=True)
    Doubled.apply(x, compat.copying_view).relu_().sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.0, 2, 2], [2, 2, 2]]))
    with pytest.raises(RuntimeError, match="view and is being modified inplace"):
        Doubled.apply(x, Tensor.view).relu_()


def test_node_numbers_grow_with_the_forward_pass():
    x, numbers, nodes = torch.ones(2, requires_grad=True), [], []
    for _ in range(3):
        numbers.append(compat.next_node_number())
        x = (x * 2).exp()
        nodes += [compat.node_number(x.grad_fn.next_functions[0][0]), compat.node_number(x.grad_fn)]
    assert nodes == sorted(set(nodes))
    for first, number, last in zip(nodes[::2], numbers, nodes[1::2], strict=True):
        assert number == first < last
    with torch.no_grad():
        x * 2
    assert compat.next_node_number() == nodes[-1] + 1


def test_the_current_node_is_the_one_that_runs_and_none_outside_backward():
    x, seen = torch.ones(2, requires_grad=True), []
    h = x * 2
    h.register_hook(lambda gradient: seen.append(compat.current_node()))
    x.register_post_accumulate_grad_hook(lambda parameter: seen.append(compat.current_node()))
    assert compat.current_node() is None
    h.exp().sum().backward()
    assert compat.current_node() is None
    assert seen[0] is not None
    assert seen[1].name().endswith("AccumulateGrad")


def test_what_is_saved_passes_through_hooks_within_a_checkpoint_alone():
    seen = []

    def run(h: Tensor) -> Tensor:
        seen.append(compat.saves_through_hooks())
        return h.exp()

    x = torch.ones(2, requires_grad=True)
    checkpoint(run, run(x), use_reentrant=False)
    assert seen == [RELEASE < (2, 8), True]


class SeenFunctions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("run", "stay"), [(compat.run_backward, True), (Tensor.backward, False)])
def test_a_mode_sees_what_runs_again_in_run_backward_and_not_in_torchs_own(run, stay):
    x = torch.ones(2, requires_grad=True)
    out = checkpoint(lambda h: torch.tanh(h).exp(), x, use_reentrant=False)
    with SeenFunctions() as mode:
        run(out, torch.full((2,), 3.0))
    assert ("tanh" in mode.names) is stay
    expected = torch.autograd.grad(torch.tanh(x).exp(), x, torch.full((2,), 3.0))[0]
    assert torch.equal(x.grad, expected)


def test_transforms_are_active_within_vmap_and_grad():
    seen = []

    def run(h: Tensor) -> Tensor:
        seen.append(compat.transforms_active())
        return h.sum()

    run(torch.ones(2)), torch.vmap(run)(torch.ones(2, 2)), torch.func.grad(run)(torch.ones(2)), run(torch.ones(2))
    assert seen == [False, True, True, False]


def test_the_profiler_marks_allocations_and_tells_their_size():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = torch.empty(1000, dtype=torch.uint8)
    todo, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while todo:
        node = todo.pop()
        todo += node.children
        if node.tag == compat.ALLOCATION:
            sizes.append(node.extra_fields.alloc_size)
    assert len(kept) in sizes


@pytest.mark.parametrize("workers", [0, 2])
def test_shut_down_workers_ends_the_processes_of_a_loader_whose_iterator_is_held(workers):
    batches = iter(DataLoader(torch.arange(100), 2, num_workers=workers))
    next(batches)
    assert len(active_children()) == workers
    compat.shut_down_workers(batches)
    assert not active_children()


def test_the_profiler_tells_overloads_apart():
    x = torch.ones(3)
    with profile(activities=[ProfilerActivity.CPU], experimental_config=compat.OVERLOADS_TOO) as profiler:
        torch.where(x > 0, x, 0.0)
    events = profiler.profiler.kineto_results.events()
    assert {"self", "ScalarOther"} <= {compat.overload_name(event) for event in events if event.name() == "aten::where"}


def test_whether_an_operation_is_several_others_on_the_cpu():
    several = {"cross_entropy_loss": True, "linear": True, "mm": False, "where.self": False, "where.ScalarOther": True}
    several["mish_backward"] = False  # elsewhere it is
    assert {name: compat.is_composite(f"aten::{name}") for name in several} == several
    with pytest.raises(RuntimeError):
        compat.is_composite("aten::no_such_operation")


def test_whether_an_operation_is_told_a_device():
    assert compat.takes_device(compat.aten.empty.memory_format)
    assert not compat.takes_device(compat.aten.mm.default)


def test_whether_onednn_runs_a_convolution_is_known_without_data():
    settings = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    for dtype, expected in ((torch.float32, True), (torch.float64, False)):
        shapes = ((8, 3, 16, 16), (4, 3, 3, 3))
        real = [torch.ones(shape, dtype=dtype) for shape in shapes]
        alike = [empty_of_shape(t.shape, t.stride(), dtype, t.untyped_storage().nbytes()) for t in real]
        assert compat.is_onednns(*real, [4], *settings) == compat.is_onednns(*alike, [4], *settings) == expected


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_of_a_convolution_is_known_without_data(layout):
    h, weight = torch.ones(2, 3, 8, 8).contiguous(memory_format=layout), torch.ones(4, 3, 3, 3)
    assert compat.convolution_layout(h, weight) == compat.convolution_layout(h.to("meta"), weight.to("meta")) == layout
    assert F.conv2d(h, weight).is_contiguous(memory_format=layout)


def test_is_causal_mask_knows_the_mask_that_torch_makes():
    mask = torch.nn.Transformer.generate_square_subsequent_mask(3)
    assert compat.is_causal_mask(mask)
    assert not compat.is_causal_mask(mask.t())
