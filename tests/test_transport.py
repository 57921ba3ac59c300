"""FA's way back: what carries the error through B, what passes it on as in BP, and what is refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from problems import BY_NAME, CLASSES, OPTIMIZERS, Problem, Record, make_rule, record, train
from reference import assert_close_training, assert_identical, refuses_and_keeps
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from memdfa_lab import memory
from memdfa_lab.core.rules import FA
from memdfa_lab.core.through_b import SETTINGS
from memdfa_lab.core.transport import FeedbackTransport

SGD = OPTIMIZERS["sgd"]
saved = partial(checkpoint, use_reentrant=False)
reentrant = partial(checkpoint, use_reentrant=True)


class Unit(nn.Module):
    """One block, `run(unit, h)`, with parts of any kind: modules, parameters, or shapes of parameters to draw."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.run = run
        self.anchor = nn.Linear(1, 1)  # a weight layer, so that the unit is a block of its own
        for name, part in parts.items():
            drawn = nn.Parameter(0.5 + torch.rand(part)) if isinstance(part, tuple) else part
            setattr(self, name, drawn)

    def forward(self, h: Tensor) -> Tensor:
        return self.run(self, h)


def between_linears(run: Callable[[Any, Tensor], Tensor], shape: tuple[int, ...] = (8,), **parts: Any) -> Problem:
    """A net whose unit has the error from one Linear to hand to another; what comes out of it is flattened."""

    def make() -> nn.Module:
        made = {name: part if isinstance(part, tuple) else part() for name, part in parts.items()}
        first = nn.Sequential(nn.Linear(7, shape.numel()), nn.Tanh(), nn.Unflatten(1, shape))
        unit = Unit(run, **made)
        with torch.random.fork_rng(devices=[]):
            width = unit(torch.zeros(2, *shape, requires_grad=True)).flatten(1).shape[1]
        return nn.Sequential(first, unit, nn.Flatten(), nn.Linear(width, CLASSES))

    shape = torch.Size(shape)
    return Problem("unit", make, (7,))


# ----------------------------------------------------------------------------------------------------- the oracle


FUNCTIONS = (F.linear, *SETTINGS)


@contextmanager
def error_through(B: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let linear and convolution be two of torch's own: the weight's, cut off from the input, and one of B's, of 0."""

    def through_B(f: Any) -> Any:
        def run(h: Tensor, W: Tensor, b: Tensor | None = None, *settings: Any, **named: Any) -> Tensor:
            way_back = f(h, B(W), None, *settings, **named)
            return f(h.detach(), W, b, *settings, **named) + (way_back - way_back.detach())

        return run

    with mock.patch.multiple(F, **{f.__name__: through_B(f) for f in FUNCTIONS}):
        yield


def train_by_oracle(problem: Problem, steps: int = 3) -> Record:
    model, feedback = problem.build(), make_rule("fa", problem).feedback
    number = {parameter: j for j, parameter in enumerate(model.parameters())}
    losses = []
    for x, y in problem.batches(steps):
        with error_through(lambda W: feedback.weight(number[W], W.detach())):
            loss = problem.loss(model(x), y)
            loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.1 * p.grad
                p.grad = None
        losses.append(loss.detach())
    return record(losses, model, [])


# ------------------------------------------------------------------------------------------------------ what passes


def class_token(unit: Any, h: Tensor) -> Tensor:
    return torch.cat([unit.token.expand(len(h), -1, -1), h], dim=1) + unit.position


def written(unit: Any, h: Tensor) -> Tensor:
    out = h.new_zeros(len(h), 4, 4)
    out[:, 0] = unit.token
    out[:, 1:] = h
    return out @ out.transpose(1, 2)  # activations alone: the token's place is no weight any more


def attention(unit: Any, h: Tensor) -> Tensor:
    q, k, v = unit.qkv(h).chunk(3, -1)
    bias = unit.table[torch.arange(3)[:, None] - torch.arange(3) + 2]
    return h + unit.out((q @ k.transpose(-1, -2) * unit.temperature.exp() + bias).softmax(-1) @ v)


def recurrent(unit: Any, h: Tensor) -> Tensor:
    state = h.new_zeros(len(h), 5)
    for step in h.unbind(1):
        state = torch.tanh(unit.a(step) + unit.b(state))
    return state


def code_book(unit: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        nearest = torch.cdist(h, unit.W).argmin(1)
    return h + unit.W[nearest]


def half_in_place(unit: Any, h: Tensor) -> Tensor:
    h = h * 2
    h += unit.bias
    h *= unit.scale
    return h


def twice_saved(unit: Any, h: Tensor) -> Tensor:
    return saved(lambda h: h + saved(unit.a, torch.tanh(unit.b(h))), h)


# unit, shape of h, parts
PASSES: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...], dict[str, Any]]] = {
    "layer scale": (lambda u, h: h + u.scale * u.a(h), (3, 4), {"scale": (4,), "a": lambda: nn.Linear(4, 4)}),
    "scale and bias in place": (half_in_place, (8,), {"bias": (8,), "scale": (8,)}),
    "divided, less, to a power": (
        lambda u, h: (h.exp() / u.a - u.b).abs() ** u.p,
        (8,),
        {"a": (8,), "b": (8,), "p": ()},
    ),
    "a number less h": (lambda u, h: torch.rsub(h, u.a).clamp(-u.b, u.b), (2, 3), {"a": (3,), "b": (1,)}),
    "computed gate": (lambda u, h: torch.lerp(h, h * h, torch.sigmoid(u.gate)), (8,), {"gate": (8,)}),
    "class token and position": (class_token, (3, 4), {"token": (1, 1, 4), "position": (4, 4)}),
    "token written into a tensor": (written, (3, 4), {"token": (4,)}),
    "mask token": (lambda u, h: torch.where(h > 0.1, h, u.token), (3, 4), {"token": (4,)}),
    "in the form of h": (
        lambda u, h: h + u.row.expand_as(h) * u.scale.type_as(h),
        (3, 4),
        {"row": (4,), "scale": (1,)},
    ),
    "embedded positions": (
        lambda u, h: h + u.embed(torch.arange(3)),
        (3, 4),
        {"embed": lambda: nn.Embedding(3, 4)},
    ),
    "attention of linears": (
        attention,
        (3, 4),
        {"qkv": lambda: nn.Linear(4, 12), "out": lambda: nn.Linear(4, 4), "table": (5,), "temperature": ()},
    ),
    "recurrence of linears": (recurrent, (3, 4), {"a": lambda: nn.Linear(4, 5), "b": lambda: nn.Linear(5, 5)}),
    "one layer twice": (lambda u, h: u.a(torch.tanh(u.a(h))), (2, 4), {"a": lambda: nn.Linear(4, 4)}),
    "linear example by example": (lambda u, h: torch.stack([*map(u.a, h)]), (8,), {"a": lambda: nn.Linear(8, 3)}),
    "convolution example by example": (
        lambda u, h: torch.stack([*map(u.a, h)]),
        (2, 5),
        {"a": lambda: nn.Conv1d(2, 3, 3, stride=2)},
    ),
    "an operation of torch.ops": (lambda u, h: torch.ops.aten.add.Tensor(h, u.a), (3, 4), {"a": (4,)}),
    "an order": (
        lambda u, h: h.index_select(1, u.order),
        (4,),
        {"order": lambda: nn.Parameter(torch.arange(4).flip(0), False)},
    ),
    "code book": (code_book, (8,), {"W": (3, 8)}),
    "numbers of a weight": (lambda u, h: h * len(u.W) + float(u.W.norm().detach()), (8,), {"W": (3, 8)}),
    "layer norm": (lambda u, h: u.norm(h), (3, 4), {"norm": lambda: nn.LayerNorm(4)}),
    "rms norm": (lambda u, h: u.norm(h), (3, 4), {"norm": lambda: nn.RMSNorm((3, 4))}),
    "group norm": (lambda u, h: u.norm(h), (4, 3, 3), {"norm": lambda: nn.GroupNorm(2, 4)}),
    "instance norm": (lambda u, h: u.norm(h), (4, 5), {"norm": lambda: nn.InstanceNorm1d(4, affine=True)}),
    "batch norm": (lambda u, h: u.norm(h), (4, 2, 3), {"norm": lambda: nn.BatchNorm2d(4, momentum=0.0)}),
    "prelu": (lambda u, h: u.slope(h), (4, 3), {"slope": lambda: nn.PReLU(4)}),
    "saved linear": (lambda u, h: saved(lambda h: u.a(h).relu(), h), (3, 4), {"a": lambda: nn.Linear(4, 6)}),
    "saved in a saved one": (twice_saved, (8,), {"a": lambda: nn.Linear(6, 8), "b": lambda: nn.Linear(8, 6)}),
    "saved convolution, same": (
        lambda u, h: saved(lambda h: u.a(h).tanh(), h),
        (2, 5),
        {"a": lambda: nn.Conv1d(2, 3, 4, padding="same")},
    ),
    "saved transposed convolution": (
        lambda u, h: saved(lambda h: u.norm(u.a(h)), h),
        (2, 3, 3),
        {"a": lambda: nn.ConvTranspose2d(2, 4, 2, stride=2), "norm": lambda: nn.GroupNorm(2, 4)},
    ),
}


# torch warns that it pads once more on one side, which is what is tested here
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", PASSES)
def test_fa_has_the_gradients_of_torchs_own_functions_with_B_on_the_way_back(name):
    run, shape, parts = PASSES[name]
    problem = between_linears(run, shape, **parts).double()
    assert_close_training(train(make_rule("fa", problem), problem, steps=3), train_by_oracle(problem))


def test_the_oracle_tells_fa_from_bp():
    problem = between_linears(*PASSES["layer scale"][:2], **PASSES["layer scale"][2]).double()
    with pytest.raises(AssertionError):
        assert_close_training(train(make_rule("bp", problem), problem, steps=3), train_by_oracle(problem))


# The compiler says that it cannot trace FA into one graph, which is right.
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
# its own doing, while it traces
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_layer_learns_as_it_does_by_itself(backend):
    problem = between_linears(*PASSES["layer scale"][:2], **PASSES["layer scale"][2]).double()
    plain, compiled = (make_rule("fa", problem) for _ in range(2))
    compiled.blocks[1][0].a.compile(backend=backend)
    assert_close_training(train(plain, problem, steps=2), train(compiled, problem, steps=2))


# ------------------------------------------------------------------------------------------------- what is refused


class Fused(torch.autograd.Function):
    """A product with a way back of its own, through the weight."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(h, W)
        return h @ W

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, W = ctx.saved_tensors
        return grad @ W.t(), h.t() @ grad


def recurrent_layer(kind: Any) -> dict[str, Any]:
    return {"r": partial(kind, 4, 5, batch_first=True)}


def transposed_without_a_graph(unit: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        W = unit.W.t()
    return h @ W


def copied(unit: Any, h: Tensor) -> Tensor:
    return h @ torch.empty_like(h[0].diag()).copy_(unit.W)


def filled(unit: Any, h: Tensor) -> Tensor:
    W = h.new_zeros(8, 8)
    W[:, :4] = unit.W[:, 4:]
    return h @ W


def energy(unit: Any, h: Tensor) -> Tensor:
    return torch.autograd.grad(unit.l(h).square().sum(), h, create_graph=True)[0]


W = {"W": (8, 8)}
LINEAR = {"l": lambda: nn.Linear(8, 8)}
SELF_ATTENTION = {"a": lambda: nn.MultiheadAttention(4, 2, batch_first=True)}


def of(wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    return {"l": lambda: wrap(nn.Linear(8, 8))}


def call(unit: Any, h: Tensor) -> Tensor:
    return unit.l(h)


# unit, parts, what the message must say
REFUSED: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "lstm": (lambda u, h: u.r(h.view(-1, 2, 4))[0], recurrent_layer(nn.LSTM), ("lstm", "1.0.r.weight_ih_l0")),
    "gru": (lambda u, h: u.r(h.view(-1, 2, 4))[0], recurrent_layer(nn.GRU), ("gru", "1.0.r.weight_ih_l0")),
    "rnn": (lambda u, h: u.r(h.view(-1, 2, 4))[1][0], recurrent_layer(nn.RNN), ("rnn_tanh", "1.0.r.weight_ih_l0")),
    "lstm cell": (lambda u, h: u.r(h)[0], {"r": lambda: nn.LSTMCell(8, 3)}, ("lstm_cell", "1.0.r.weight_ih")),
    "gru cell": (lambda u, h: u.r(h), {"r": lambda: nn.GRUCell(8, 3)}, ("gru_cell", "1.0.r.weight_ih")),
    "attention": (
        lambda u, h: u.a(*[h.view(-1, 2, 4)] * 3)[0],
        SELF_ATTENTION,
        ("multi_head_attention_forward", "1.0.a.in_proj_weight"),
    ),
    "bilinear": (lambda u, h: u.b(h, h), {"b": lambda: nn.Bilinear(8, 8, 3)}, ("bilinear", "1.0.b.weight")),
    "learned queries": (
        lambda u, h: F.scaled_dot_product_attention(u.W.expand(len(h), -1, -1), *[h[:, :, None]] * 2),
        {"W": (3, 1)},
        ("scaled_dot_product_attention", "1.0.W"),
    ),
    "@": (lambda u, h: h @ u.W, W, ("matmul", "1.0.W")),
    "mm": (lambda u, h: torch.mm(h, u.W), W, ("mm", "1.0.W")),
    "addmm": (lambda u, h: torch.addmm(u.W[0], h, u.W), W, ("addmm", "1.0.W")),
    "baddbmm in place": (
        lambda u, h: (h[:, None] * 2).baddbmm_(h[:, None], u.W.expand(len(h), 8, 8)),
        W,
        ("baddbmm", "1.0.W"),
    ),
    "einsum": (lambda u, h: torch.einsum("ni,oi->no", h, u.W), W, ("einsum", "1.0.W")),
    "tensordot": (lambda u, h: torch.tensordot(h, u.W, 1), W, ("tensordot", "1.0.W")),
    "an operation of torch.ops": (lambda u, h: torch.ops.aten.mm.default(h, u.W), W, ("mm", "1.0.W")),
    "solve": (lambda u, h: torch.linalg.solve(u.W + 9 * torch.eye(8), h, left=False), W, ("linalg_solve", "1.0.W")),
    "distances": (lambda u, h: torch.cdist(h, u.W), W, ("cdist", "1.0.W")),
    "weighted embeddings": (
        lambda u, h: F.embedding_bag(torch.arange(8).repeat(len(h), 1), u.W, per_sample_weights=h, mode="sum"),
        W,
        ("embedding_bag", "1.0.W"),
    ),
    "broadcast product": (lambda u, h: (h[:, :, None] * u.W).sum(1), W, ("mul", "1.0.W")),
    "gate times token": (lambda u, h: h.sum(1, keepdim=True) * u.W[0], W, ("mul", "1.0.W")),
    "number times token": (lambda u, h: torch.addcmul(h, u.W[0], h[:, :1]), W, ("addcmul", "1.0.W")),
    "outer division": (lambda u, h: (h[:, None] / u.W).sum(-1), W, ("div", "1.0.W")),
    "transposed": (lambda u, h: h @ u.W.t(), W, ("matmul", "1.0.W")),
    "property": (lambda u, h: h @ u.W.mT, W, ("matmul", "1.0.W")),
    "masked": (lambda u, h: h @ (u.W * torch.ones(8, 8).tril()), W, ("matmul", "1.0.W")),
    "stacked": (lambda u, h: h @ torch.cat([u.W[:3], u.W[3:]]), W, ("matmul", "1.0.W")),
    "expanded": (lambda u, h: h @ u.W[:1].expand_as(h[:1].t() @ h[:1]), W, ("matmul", "1.0.W")),
    "rows looked up": (lambda u, h: h @ F.embedding(torch.arange(8), u.W), W, ("matmul", "1.0.W")),
    "normalised": (lambda u, h: h @ F.normalize(u.W), W, ("matmul", "1.0.W")),
    "one of several outputs": (lambda u, h: h @ torch.linalg.qr(u.W)[0], W, ("matmul", "1.0.W")),
    "without a graph": (transposed_without_a_graph, W, ("matmul", "1.0.W")),
    "data": (lambda u, h: h @ u.W.data, W, ("matmul", "1.0.W")),
    "copied": (copied, W, ("matmul", "1.0.W")),
    "written into a tensor": (filled, W, ("matmul", "1.0.W")),
    "two factors": (lambda u, h: F.linear(h, u.W @ u.V), {"W": (8, 2), "V": (2, 8)}, ("matmul", "1.0.W")),
    "frozen": (
        lambda u, h: h @ u.W,
        {"W": lambda: nn.Parameter(torch.rand(8, 8), requires_grad=False)},
        ("matmul", "1.0.W"),
    ),
    "part of a weight": (lambda u, h: F.linear(h, u.W[:5]), W, ("(5, 8)", "computed in the forward pass", "1.0.W")),
    "tied, transposed": (
        lambda u, h: F.linear(u.l(h).tanh(), u.l.weight.t()),
        LINEAR,
        ("(8, 8)", "computed in the forward pass", "1.0.l.weight"),
    ),
    "filters computed": (
        lambda u, h: F.conv1d(h[:, None], u.W[:, None].softmax(-1)),
        W,
        ("(8, 1, 8)", "computed in the forward pass", "1.0.W"),
    ),
    "made of h": (lambda u, h: F.linear(h, h), {}, ("computed in the forward pass",)),
    "weight norm": (call, of(parametrizations.weight_norm), ("weight_norm", "original", "without parametrization")),
    "spectral norm": (
        call,
        of(lambda layer: parametrizations.spectral_norm(layer).eval()),
        ("mv", "original", "without parametrization"),
    ),
    "pruned": (
        call,
        of(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        ("computed in the forward pass", "weight_orig"),
    ),
    "called with other weights": (
        lambda u, h: torch.func.functional_call(u.l, {"weight": u.l.weight * 2}, (h,)),
        LINEAR,
        ("computed in the forward pass", "1.0.l.weight"),
    ),
    "vmap": (lambda u, h: torch.vmap(u.l)(h), LINEAR, ("torch.vmap",)),
    "vmap over weights": (
        lambda u, h: torch.vmap(torch.matmul)(h.expand(3, *h.shape), u.W).mean(0),
        {"W": (3, 8, 8)},
        ("does not see", "1.0.W"),
    ),
    "autograd.Function": (lambda u, h: Fused.apply(h, u.W), W, ("does not see", "autograd.Function", "1.0.W")),
    "TorchScript": (call, of(torch.jit.script), ("does not see", "TorchScript", "1.0.l.weight")),
    "traced": (call, of(lambda layer: torch.jit.trace(layer, torch.ones(2, 8))), ("does not see", "1.0.l.weight")),
    "saved product": (lambda u, h: saved(lambda h: h @ u.W, h), W, ("matmul", "1.0.W")),
    "reentrant linear": (lambda u, h: reentrant(u.l, h), LINEAR, ("use_reentrant=True",)),
    "reentrant product": (lambda u, h: reentrant(lambda h: h @ u.W, h), W, ("does not see", "1.0.W")),
    "gradient of a gradient": (energy, LINEAR, ("create_graph",)),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the reentrant checkpoint
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_fa_refuses_a_weight_through_which_it_would_send_the_error_as_bp_does(name):
    run, parts, hints = REFUSED[name]
    problem = between_linears(run, **parts)
    rule = make_rule("fa", problem, storage="regenerated")
    with refuses_and_keeps(rule, ValueError, *hints, "MEM-DFA"):
        rule.step(problem.x, problem.y)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", ["autograd.Function", "TorchScript", "vmap over weights"])
def test_fa_refuses_what_it_does_not_see_before_buffers_move(name):
    run, parts, hints = REFUSED[name]
    net = nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7), *between_linears(run, **parts).build())
    problem, rule = between_linears(run, **parts), FA(net, SGD)
    with refuses_and_keeps(rule, ValueError, hints[0], "no weight was changed"):
        rule.step(problem.x, problem.y)


def test_a_checkpoint_takes_less_memory_in_fa_as_predicted():
    def peaks(run: Callable[[Any, Tensor], Tensor]) -> set[int]:
        rule = make_rule("fa", between_linears(run, (200,), a=lambda: nn.Linear(200, 200)))
        x, y = torch.ones(300, 7), torch.zeros(300, dtype=torch.long)
        rule.step(x, y)
        predicted = memory.predict("fa", rule.blocks, x_shape=(300, 7), optimizer=SGD)
        return {memory.measure(rule, x, y).peak_bytes, predicted.peak_bytes}

    def layers(unit: Any, h: Tensor) -> Tensor:
        return unit.a(unit.a(h).tanh()).tanh()

    def keeping(unit: Any, h: Tensor) -> Tensor:
        return layers(unit, layers(unit, h))

    def saving(unit: Any, h: Tensor) -> Tensor:
        return saved(partial(layers, unit), saved(partial(layers, unit), h))

    (plain,), (less,) = peaks(keeping), peaks(saving)
    assert less < plain


def test_a_weight_is_forgotten_with_its_tensor_and_the_mode_with_its_step():
    """An id is used again, by another tensor; and a mode that stayed would hold the network."""
    problem = between_linears(lambda u, h: h + u.W.t().diag() + u.W.sum(0).exp().view_as(h[0]), W=(8, 8))
    blocks = make_rule("fa", problem).blocks
    transport = FeedbackTransport(make_rule("fa", problem).feedback, blocks)
    with transport:
        kept = blocks[1][0].W.t()
        assert len(transport.weights) == len(list(blocks.parameters())) + 1
        blocks(problem.x)
    del kept
    assert len(transport.weights) == len(list(blocks.parameters()))
    gone = weakref.ref(transport)
    del transport
    assert gone() is None


def test_a_block_may_have_a_backward_pass_of_its_own():
    def run(unit: Any, h: Tensor) -> Tensor:
        guess = torch.ones(3, requires_grad=True)
        guess.square().sum().backward()
        return h * guess.grad.sum()

    problem = between_linears(run).double()
    assert_close_training(train(make_rule("fa", problem), problem, steps=3), train_by_oracle(problem))


def test_fa_leaves_torch_as_it_was():
    problem = BY_NAME["mlp_tanh_mse"]
    model = problem.build()
    FA(model, SGD, problem.loss).step(problem.x, problem.y)
    plain = copy.deepcopy(model)
    one, other = (torch.autograd.grad(problem.loss(m(problem.x), problem.y), m[0].weight) for m in (model, plain))
    assert_identical(one, other)
