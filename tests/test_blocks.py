"""How a model is cut into blocks, what is refused, and that the user's model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, RULE_NAMES, Residual, Skip, params
from reference import assert_identical, refuses
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, run_block
from memdfa_lab.core.rules import RULES


def layers_of(blocks: nn.Sequential) -> list[list[str]]:
    """Return the class names in each block, nested Sequentials opened, no other modules."""
    return [[type(layer).__name__ for layer in leaves(block)] for block in blocks]


def leaves(module: nn.Module) -> list[nn.Module]:
    return [leaf for part in module for leaf in leaves(part)] if type(module) is nn.Sequential else [module]


EXPECTED = {
    "conv_pool": [["Conv2d", "MaxPool2d", "ReLU"], ["Conv2d", "ReLU", "AvgPool2d", "Flatten"], ["Linear"]],
    "leading_batchnorm": [["BatchNorm2d", "Flatten", "Linear", "Tanh"], ["Linear"]],
    "residual": [["Conv2d", "ReLU"], ["Residual"], ["Residual", "AdaptiveAvgPool2d", "Flatten"], ["Linear"]],
    "nested": [["Conv2d", "ReLU", "MaxPool2d", "Flatten"], ["Linear", "Tanh"], ["Linear"]],
    "everything": [
        ["Dropout", "Conv2d", "BatchNorm2d", "ReLU"],
        ["Residual", "Dropout2d"],
        ["Conv2d", "GroupNorm", "PReLU", "MaxPool2d", "Flatten"],
        ["Linear", "LayerNorm", "GELU", "Dropout"],
        ["Linear", "BatchNorm1d", "ReLU"],
        ["Linear"],
    ],
}


class Scale(nn.Module):
    """A module that torch does not know, with a parameter but no weight layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


class TestCutting:
    @pytest.mark.parametrize("name", EXPECTED)
    def test_a_block_is_a_weight_layer_and_all_that_follows_up_to_the_next(self, name):
        assert layers_of(as_blocks(BY_NAME[name].build())) == EXPECTED[name]

    @pytest.mark.parametrize("problem", params())
    def test_blocks_are_the_models_own_modules_in_order_and_leave_it_as_it_was(self, problem):
        model = problem.build()
        model[0].eval()
        modules = {name: (id(module), module.training) for name, module in model.named_modules()}
        before = copy.deepcopy(model.state_dict())
        blocks = as_blocks(model)
        twice = as_blocks(blocks)
        assert [list(map(id, leaves(b))) for b in twice] == [list(map(id, leaves(b))) for b in blocks]
        assert list(twice.state_dict()) == list(blocks.state_dict())
        assert list(map(id, leaves(blocks))) == list(map(id, leaves(model)))
        assert list(map(id, blocks.parameters())) == list(map(id, model.parameters()))
        assert list(map(id, blocks.buffers())) == list(map(id, model.buffers()))
        assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
        assert_identical(model.state_dict(), before)
        assert torch.equal(blocks.eval()(problem.x), model.eval()(problem.x))

    def test_a_list_a_module_list_and_a_generator_are_cut_like_a_sequential(self):
        with torch.device("meta"):  # so is a network without storage
            model = BY_NAME["conv_pool"].make()
        for chain in (model, list(model), tuple(model), nn.ModuleList(model), (layer for layer in model)):
            assert layers_of(as_blocks(chain)) == EXPECTED["conv_pool"]

    def test_an_unknown_module_joins_the_block_before_it_unless_it_holds_a_weight_layer(self):
        skip = Skip(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))  # it has a forward of its own: it is not opened
        blocks = as_blocks([Scale(), nn.Linear(4, 4), Scale(), Residual(1, 1), Scale(), skip])
        assert layers_of(blocks) == [["Scale", "Linear", "Scale"], ["Residual", "Scale"], ["Skip"]]
        assert blocks[2] is skip

    def test_one_activation_may_stand_in_several_blocks_and_one_layer_twice_in_a_block(self):
        relu, inner = nn.ReLU(), nn.Linear(4, 4)
        assert len(as_blocks([nn.Linear(4, 4), relu, Skip(inner, relu, inner), nn.Linear(4, 2), relu])) == 3


class TestTheUsersModel:
    def test_learns_when_a_rule_trains_its_blocks(self):
        problem = BY_NAME["nested"]
        model = problem.build()
        before = copy.deepcopy(model.state_dict())
        RULES["memdfa"](as_blocks(model), OPTIMIZERS["sgd"], problem.loss).step(problem.x, problem.y)
        assert list(model.state_dict()) == list(before)
        assert not any(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_eval_on_the_model_reaches_its_blocks(self):
        model, x = BY_NAME["everything"].build(), BY_NAME["everything"].x
        blocks = as_blocks(model)
        model.eval()
        assert torch.equal(blocks(x), blocks(x))

    # torch warns that no gradient reaches the input, which is what DFA is about
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    @pytest.mark.parametrize("rule", RULE_NAMES)
    def test_keeps_its_hooks_on_nested_sequentials(self, rule):
        problem = BY_NAME["nested"]
        model, calls = problem.build(), []
        for place, kind in [(0, "forward"), (0, "forward_pre"), (2, "full_backward"), (2, "full_backward_pre")]:
            hook = getattr(model[place], f"register_{kind}_hook")
            hook(lambda module, *given, kind=kind: calls.append((kind, module)))
        learner = RULES[rule](model, OPTIMIZERS["sgd"], problem.loss)
        learner.rehearse(problem.x, problem.y)
        calls.clear()
        learner.step(problem.x, problem.y)
        runs = 1 + (rule == "memdfa")
        assert calls.count(("forward", model[0])) == calls.count(("forward_pre", model[0])) == runs
        assert calls.count(("full_backward", model[2])) == calls.count(("full_backward_pre", model[2])) == 1

    def test_is_refused_if_it_has_hooks_itself(self):
        model = BY_NAME["nested"].build()
        model.register_forward_hook(lambda *given: None)
        with refuses(ValueError, "the model has hooks", "to the parts"):
            as_blocks(model)


def tied_by(tie: str) -> nn.Sequential:
    """Return a net whose two Linears share memory in the given way."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if tie == "module":
        second = first
    elif tie == "weight":
        second.weight = first.weight
    elif tie == "bias":
        second.bias = first.bias
    elif tie == "storage":
        second.weight = nn.Parameter(first.weight.data)
    elif tie == "transposed":
        second.weight = nn.Parameter(first.weight.data.t())
    elif tie == "overlapping":
        memory = torch.randn(20)
        first.weight, second.weight = (nn.Parameter(memory[s : s + 16].view(4, 4)) for s in (0, 4))
    return nn.Sequential(nn.Sequential(first, nn.ReLU()), second)


KNOWN_LIMIT = pytest.mark.xfail(reason="only the first address of each is compared", strict=True)
NO_MAPS = [nn.RNN(4, 4), nn.LSTM(4, 4), nn.GRUCell(4, 4), nn.MultiheadAttention(4, 2), nn.Embedding(4, 4)]
NO_MAPS += [nn.EmbeddingBag(4, 4)]
REFUSED = [
    (nn.ModuleDict({"a": nn.Linear(4, 4)}), TypeError, "ModuleDict", "list of modules"),
    *[(model, TypeError, "nn.Sequential") for model in (None, 3, "mlp", b"mlp", {"a": nn.Linear(4, 4)}, torch.relu)],
    *[
        ([nn.Linear(4, 4), part], TypeError, "list of modules", type(part).__name__)
        for part in (torch.relu, "relu", None, torch.ones(2), nn.Linear)
    ],
    *[
        (nn.Sequential(nn.Linear(4, 4), nn.Sequential(module)), TypeError, type(module).__name__, "wrap it")
        for module in NO_MAPS
    ],
    *[(model, ValueError, "no weight layer") for model in (nn.Sequential(), [], [nn.Flatten(), nn.ReLU(), Scale()])],
    (BY_NAME["conv_pool"].build().requires_grad_(False), ValueError, "frozen", "unfreeze"),
    ([nn.LazyLinear(4), nn.Linear(4, 4)], ValueError, "0.weight has no shape yet", "run the model once"),
    ([nn.Linear(4, 4, dtype=torch.complex64)], TypeError, "0.weight is torch.complex64"),
]


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_what_is_no_chain_that_can_be_trained(self, case):
        model, error, *hints = case
        with refuses(error, *hints):
            as_blocks(model)

    @pytest.mark.parametrize(
        "tie",
        ["module", "weight", "bias", "storage", "transposed", pytest.param("overlapping", marks=KNOWN_LIMIT)],
    )
    def test_parameters_shared_between_blocks(self, tie):
        with refuses(ValueError, "blocks 0 and 1 share", "one module"):
            as_blocks(tied_by(tie))

    def test_parameters_shared_on_the_meta_device_and_shared_buffers(self):
        layer, norm = nn.Linear(4, 4, device="meta"), nn.BatchNorm1d(4, affine=False)
        with refuses(ValueError, "share", "weight"):
            as_blocks([layer, nn.ReLU(), layer])
        with refuses(ValueError, "share", "running_mean"):
            as_blocks([nn.Linear(4, 4), norm, nn.Linear(4, 4), norm])


def test_run_block_returns_what_a_block_returns_unless_it_changed_its_input_or_is_no_tensor():
    layer, h = nn.Linear(4, 3), torch.randn(2, 4)
    assert torch.equal(run_block(layer, h), layer(h))
    assert torch.equal(run_block(nn.Sequential(layer, nn.ReLU(inplace=True)), h), layer(h).relu())
    with refuses(RuntimeError, "ReLU", "inplace=False"):
        run_block(nn.ReLU(inplace=True), h)
    with refuses(TypeError, "LSTM", "tuple"):
        run_block(nn.LSTM(4, 4), torch.randn(2, 3, 4))
