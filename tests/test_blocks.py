"""How a model is cut into blocks, what is refused, and that the user's model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import BY_NAME, RULE_NAMES, Residual, make_rule, params
from reference import assert_identical, refuses
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks, run_block


def layers_of(blocks: nn.Sequential) -> list[list[str]]:
    """Return the class names in each block, nested Sequentials opened, other modules whole."""
    return [[type(layer).__name__ for layer in leaves(block)] for block in blocks]


def leaves(module: nn.Module) -> list[nn.Module]:
    return [leaf for part in module for leaf in leaves(part)] if type(module) is nn.Sequential else [module]


EXPECTED = {
    "mlp_relu": [["Linear", "ReLU"], ["Linear", "ReLU"], ["Linear"]],
    "leading_batchnorm": [["BatchNorm2d", "Flatten", "Linear", "Tanh"], ["Linear"]],
    "conv_pool": [["Conv2d", "MaxPool2d", "ReLU"], ["Conv2d", "ReLU", "AvgPool2d", "Flatten"], ["Linear"]],
    "residual": [
        ["Conv2d", "ReLU"],
        ["Residual"],
        ["Residual", "AdaptiveAvgPool2d", "Flatten"],
        ["Linear"],
    ],
    "conv1d": [["Conv1d", "Tanh"], ["Conv1d", "ReLU", "Flatten"], ["Linear"]],
    "conv3d": [["Conv3d", "ReLU"], ["Conv3d", "Tanh", "Flatten"], ["Linear"]],
    "conv_transposed": [
        ["Conv2d", "Tanh"],
        ["ConvTranspose2d", "Tanh"],
        ["ConvTranspose2d", "Flatten"],
        ["ConvTranspose1d", "ReLU", "Flatten"],
        ["Linear"],
    ],
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


class Skip(nn.Sequential):
    """A Sequential with a forward of its own: not a chain."""

    def forward(self, h: Tensor) -> Tensor:
        return h + super().forward(h)


class TestCutting:
    @pytest.mark.parametrize("name", EXPECTED)
    def test_a_block_is_a_weight_layer_and_all_that_follows_up_to_the_next(self, name):
        assert layers_of(as_blocks(BY_NAME[name].build())) == EXPECTED[name]

    @pytest.mark.parametrize("problem", params())
    def test_blocks_compute_what_the_model_computes(self, problem):
        model = problem.build().eval()
        assert torch.equal(as_blocks(model)(problem.x), model(problem.x))

    @pytest.mark.parametrize("problem", params())
    def test_blocks_hold_the_models_own_modules_and_parameters_in_order(self, problem):
        model = problem.build()
        blocks = as_blocks(model)
        assert list(map(id, leaves(blocks))) == list(map(id, leaves(model)))
        assert list(map(id, blocks.parameters())) == list(map(id, model.parameters()))
        assert list(map(id, blocks.buffers())) == list(map(id, model.buffers()))

    @pytest.mark.parametrize("problem", params())
    def test_blocks_of_blocks_are_the_same_blocks(self, problem):
        once = as_blocks(problem.build())
        twice = as_blocks(once)
        assert [list(map(id, leaves(b))) for b in twice] == [list(map(id, leaves(b))) for b in once]
        assert list(twice.state_dict()) == list(once.state_dict())

    def test_a_list_a_module_list_and_a_generator_are_cut_like_a_sequential(self):
        model = BY_NAME["conv_pool"].build()
        expected = layers_of(as_blocks(model))
        for chain in (list(model), tuple(model), nn.ModuleList(model), (layer for layer in model)):
            assert layers_of(as_blocks(chain)) == expected

    def test_an_unknown_module_joins_the_block_before_it_unless_it_holds_a_weight_layer(self):
        model = [Scale(), nn.Linear(4, 4), Scale(), Residual(1, 1), Scale(), Skip(nn.Linear(4, 4))]
        expected = [["Scale", "Linear", "Scale"], ["Residual", "Scale"], ["Skip"]]
        assert layers_of(as_blocks(model)) == expected

    def test_a_sequential_with_a_forward_of_its_own_stays_whole(self):
        skip = Skip(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        blocks = as_blocks([nn.Linear(4, 4), skip])
        assert blocks[1] is skip

    def test_one_activation_may_stand_in_several_blocks(self):
        relu = nn.ReLU()
        assert len(as_blocks(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu))) == 2

    def test_one_layer_may_stand_twice_in_one_block(self):
        inner = nn.Linear(4, 4)
        assert len(as_blocks([Skip(inner, nn.ReLU(), inner), nn.Linear(4, 2)])) == 2

    def test_a_network_without_storage_can_be_cut(self):
        with torch.device("meta"):
            model = BY_NAME["conv_pool"].make()
        assert layers_of(as_blocks(model)) == EXPECTED["conv_pool"]


class TestTheUsersModel:
    @pytest.mark.parametrize("problem", params())
    def test_keeps_its_modules_names_values_and_mode(self, problem):
        model = problem.build()
        model[0].eval()
        modules = {name: (id(module), module.training) for name, module in model.named_modules()}
        before = copy.deepcopy(model.state_dict())
        as_blocks(model)
        assert {name: (id(module), module.training) for name, module in model.named_modules()} == modules
        assert_identical(model.state_dict(), before)

    def test_learns_when_a_rule_trains_its_blocks(self):
        problem = BY_NAME["nested"]
        model = problem.build()
        before = copy.deepcopy(model.state_dict())
        rule = make_rule("memdfa", problem)
        rule = type(rule)(as_blocks(model), lambda p: torch.optim.SGD(p, lr=0.1), problem.loss)
        rule.step(problem.x, problem.y)
        assert list(model.state_dict()) == list(before)
        for name, value in model.state_dict().items():
            assert not torch.equal(value, before[name]), name

    def test_eval_on_the_model_reaches_its_blocks(self):
        model = BY_NAME["everything"].build()
        blocks = as_blocks(model)
        model.eval()
        x = BY_NAME["everything"].x
        assert torch.equal(blocks(x), blocks(x))

    @pytest.mark.parametrize("rule", RULE_NAMES)
    @pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
    def test_keeps_its_hooks_on_nested_sequentials(self, hook, rule):
        problem = BY_NAME["nested"]
        model = problem.build()
        calls = []
        getattr(model[0], hook)(lambda module, *tensors: calls.append(module))
        made = type(make_rule(rule, problem))(model, lambda p: torch.optim.SGD(p, lr=0.1), problem.loss)
        made.step(problem.x, problem.y)
        assert calls
        assert all(module is model[0] for module in calls)

    # torch warns that no gradient reaches the input, which is what DFA is about
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
    @pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
    def test_keeps_its_backward_hooks_on_nested_sequentials(self, hook):
        problem = BY_NAME["nested"]
        model = problem.build()
        calls = []
        getattr(model[2], hook)(lambda *arguments: calls.append(1))
        made = type(make_rule("memdfa", problem))(model, lambda p: torch.optim.SGD(p, lr=0.1), problem.loss)
        made.step(problem.x, problem.y)
        assert calls == [1]

    def test_keeps_or_refuses_hooks_on_the_model_itself(self):
        problem = BY_NAME["nested"]
        model = problem.build()
        calls = []
        model.register_forward_hook(lambda *arguments: calls.append(1))
        try:
            blocks = as_blocks(model)
        except (TypeError, ValueError):
            return
        blocks(problem.x)
        assert calls


def tied_by(tie: str) -> nn.Sequential:
    """Return a net whose two Linears share memory in the given way."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    if tie == "same_module":
        second = first
    elif tie == "same_parameter":
        second.weight = first.weight
    elif tie == "same_bias":
        second.bias = first.bias
    elif tie == "same_storage":
        second.weight = nn.Parameter(first.weight.data)
    elif tie == "transposed_storage":
        second.weight = nn.Parameter(first.weight.data.t())
    elif tie == "overlapping_storage":
        memory = torch.randn(20)
        first.weight, second.weight = (nn.Parameter(memory[s : s + 16].view(4, 4)) for s in (0, 4))
    return nn.Sequential(nn.Sequential(first, nn.ReLU()), second)


class TestRefused:
    @pytest.mark.parametrize(
        "tie",
        [
            "same_module",
            "same_parameter",
            "same_bias",
            "same_storage",
            "transposed_storage",
            pytest.param(
                "overlapping_storage",
                marks=pytest.mark.xfail(reason="only the first address of each is compared", strict=True),
            ),
        ],
    )
    def test_parameters_shared_between_blocks(self, tie):
        with refuses(ValueError, "blocks 0 and 1 share", "one module"):
            as_blocks(tied_by(tie))

    def test_parameters_shared_on_the_meta_device(self):
        with torch.device("meta"):
            layer = nn.Linear(4, 4)
        with refuses(ValueError, "share"):
            as_blocks([layer, nn.ReLU(), layer])

    def test_buffers_shared_between_blocks(self):
        norm = nn.BatchNorm1d(4, affine=False)
        with refuses(ValueError, "running_mean", "share"):
            as_blocks([nn.Linear(4, 4), norm, nn.Linear(4, 4), norm])

    @pytest.mark.parametrize(
        "model",
        [Residual(2, 2), nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4)}), Skip(nn.Linear(4, 4))],
        ids=lambda model: type(model).__name__,
    )
    def test_a_model_that_is_not_a_chain(self, model):
        with refuses(TypeError, type(model).__name__, "nn.Sequential", "list of modules"):
            as_blocks(model)

    @pytest.mark.parametrize("model", [None, 3, "mlp", b"mlp", {"a": nn.Linear(4, 4)}, torch.relu])
    def test_what_is_not_a_model(self, model):
        with refuses(TypeError, "nn.Sequential"):
            as_blocks(model)

    @pytest.mark.parametrize("part", [torch.relu, "relu", None, torch.ones(2), nn.Linear])
    def test_a_list_with_something_else_in_it(self, part):
        with refuses(TypeError, "list of modules", type(part).__name__):
            as_blocks([nn.Linear(4, 4), part])

    @pytest.mark.parametrize(
        "module",
        [
            nn.RNN(4, 4),
            nn.LSTM(4, 4),
            nn.GRUCell(4, 4),
            nn.MultiheadAttention(4, 2),
            nn.Embedding(4, 4),
            nn.EmbeddingBag(4, 4),
        ],
        ids=lambda module: type(module).__name__,
    )
    def test_modules_that_do_not_map_one_real_tensor_to_another(self, module):
        with refuses(TypeError, type(module).__name__, "wrap it"):
            as_blocks(nn.Sequential(nn.Linear(4, 4), nn.Sequential(module)))

    @pytest.mark.parametrize("model", [nn.Sequential(), [], nn.Sequential(nn.Flatten(), nn.ReLU(), Scale())])
    def test_a_model_without_a_weight_layer(self, model):
        with refuses(ValueError, "no weight layer", "nothing to train"):
            as_blocks(model)

    def test_a_frozen_model(self):
        with refuses(ValueError, "frozen", "unfreeze"):
            as_blocks(BY_NAME["conv_pool"].build().requires_grad_(False))


class TestRunBlock:
    def test_returns_what_the_block_returns(self):
        layer, h = nn.Linear(4, 3), torch.randn(2, 4)
        assert torch.equal(run_block(layer, h), layer(h))

    def test_lets_a_block_work_in_place_on_its_own_tensors(self):
        block = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True))
        assert (run_block(block, torch.randn(5, 4)) >= 0).all()

    def test_refuses_a_block_that_works_in_place_on_its_input(self):
        with refuses(RuntimeError, "ReLU", "inplace=False"):
            run_block(nn.ReLU(inplace=True), torch.randn(2, 4))

    def test_refuses_a_block_that_does_not_return_a_tensor(self):
        with refuses(TypeError, "LSTM", "tuple"):
            run_block(nn.LSTM(4, 4), torch.randn(2, 3, 4))
