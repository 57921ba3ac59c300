"""B that learns (direct Kolen-Pollack): the numbers, and that all that rules can do goes on with it."""

from __future__ import annotations

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from problems import BY_NAME, OPTIMIZERS, make_rule, params, record, rotated
from reference import assert_identical, assert_same_training, refuses, refuses_and_keeps
from torch import nn

import memdfa_lab as ml
from memdfa_lab.core.feedback import Learned
from memdfa_lab.core.rules import DFA, MemDFA

MLP, SGD, ADAMW = BY_NAME["mlp_relu"], OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]
KINDS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def learned(optimizer: str = "adam", **more) -> Learned:
    return Learned(3, lr=0.05, optimizer=KINDS[optimizer], **more)


def trained(rule, problem, steps=4):
    """Train, and return a record with B and its optimizers' state among the buffers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        losses = [rule.step(x, y) for x, y in problem.batches(steps)]
    drawn = ml.feedback.Stored(3)
    for (_, i), B in rule.feedback.matrices.items():
        assert not torch.equal(B, drawn.dense(i, B.shape[1], B.shape[0], B).t())
    return record(losses, rule.blocks, rule.optimizers), [tensor.clone() for tensor in rule.feedback.tensors()]


def assert_same(one, other) -> None:
    assert_same_training(one[0], other[0])
    assert len(one[1]) == len(other[1]) > 0
    assert all(map(torch.equal, one[1], other[1]))


def check_b_goes_down(make=lambda: nn.Linear(6, 4), decay=0.1, rule=MemDFA, kind=Learned):
    """Along the product of error and output, after it has made the signal."""
    torch.manual_seed(0)
    block = make()
    x = torch.randn(5, 6) if isinstance(block, nn.Linear) else torch.randn(5, 2, 4, 4)
    h = block(x).detach()
    net = nn.Sequential(block, nn.Sequential(nn.Flatten(), nn.Linear(h[0].numel(), 3)))
    y = torch.arange(5) % 3
    feedback = kind(3, lr=0.2, optimizer=torch.optim.SGD, decay=decay)
    B = feedback.dense(0, 3, h[0].numel(), h).clone()
    logits = net(x).detach().requires_grad_()
    (e,) = torch.autograd.grad(nn.functional.cross_entropy(logits, y), logits)
    (fixed := MemDFA(deepcopy(net), SGD, feedback=ml.feedback.Stored(3))).step(x, y)
    (taught := rule(net, SGD, feedback=feedback)).step(x, y)
    assert_identical(dict(taught.blocks.state_dict()), dict(fixed.blocks.state_dict()))  # of this step
    expected = B - 0.2 * (e.t() @ h.flatten(1) + decay * B)
    torch.testing.assert_close(feedback.matrices["block", 0].t(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU())])
@pytest.mark.parametrize("decay", [0, 0.1])
def test_b_goes_down_along_the_product_of_error_and_output_after_it_has_made_the_signal(make, decay):
    check_b_goes_down(make, decay)


def test_b_may_begin_at_zero_and_then_learns_first():
    rule = MemDFA(MLP.build(), SGD, feedback=(B := Learned(3, "zero", lr=0.2, optimizer=torch.optim.SGD)))
    before = {name: value.clone() for name, value in rule.blocks.state_dict().items()}
    h = rule.chain[0](MLP.x).detach()
    logits = rule.blocks(MLP.x).detach().requires_grad_()
    (e,) = torch.autograd.grad(nn.functional.cross_entropy(logits, MLP.y), logits)
    rule.step(MLP.x, MLP.y)
    torch.testing.assert_close(B.matrices["block", 0].t(), -0.2 * e.t() @ h, rtol=1e-5, atol=1e-7)
    moved = [not torch.equal(before[name], value) for name, value in rule.blocks.state_dict().items()]
    assert moved == [False] * 4 + [True] * 2
    rule.step(MLP.x, MLP.y)
    assert not any(torch.equal(before[name], value) for name, value in rule.blocks.state_dict().items())


@rotated("problem optimizer kind", params(), OPTIMIZERS, KINDS)
def test_memdfa_is_dfa_bit_for_bit(problem, optimizer, kind):
    rules = [make_rule(name, problem, optimizer, learned(kind)) for name in ("dfa", "memdfa")]
    assert_same(*(trained(rule, problem) for rule in rules))


@pytest.mark.parametrize(
    "options",
    [{"keep_bytes": 2000}, {"clip_norm": 0.5}, {"precision": "bfloat16"}, {"pass1": "bfloat16"}],
    ids=lambda options: next(iter(options)),
)
def test_so_it_is_with_options_of_the_rule(options):
    problem = BY_NAME["everything"]
    same = {name: value for name, value in options.items() if name != "keep_bytes"}
    dfa = DFA(problem.build(), ADAMW, feedback=learned(), **same)
    memdfa = MemDFA(problem.build(), ADAMW, feedback=learned(), **options)
    assert_same(trained(dfa, problem), trained(memdfa, problem))


def test_with_a_norm_over_all_gradients_b_learns_once_and_dfa_is_refused():
    problem = BY_NAME["everything"]
    plain, clipped = (MemDFA(problem.build(), SGD, feedback=learned(), clip_global_norm=limit) for limit in (None, 1e9))
    trained(plain, problem), trained(clipped, problem)
    for key, B in plain.feedback.matrices.items():
        torch.testing.assert_close(clipped.feedback.matrices[key], B, rtol=1e-3, atol=1e-4)
    with refuses(ValueError, "clip_norm", "MemDFA"):
        DFA(problem.build(), SGD, feedback=learned(), clip_global_norm=1.0)


class DroppedAtRandom(nn.Linear):
    """A residual unit that returns its input in half the steps: layer dropout (Huang et al. 2016)."""

    def forward(self, h):
        return h if torch.rand(()) < 0.5 else h + super().forward(h)


def with_dropped_units():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), DroppedAtRandom(8, 8), DroppedAtRandom(8, 8), nn.Linear(8, 5))


def changes_with_dropped_units(rule):
    """Return, for each of eight steps, which of the blocks but the last have learned, and which B."""
    torch.manual_seed(1)
    found = []
    for x, y in MLP.batches(8):
        before = [block.weight.detach().clone() for block in rule.chain[:-1]], dict(rule.feedback.matrices)
        before[1].update({key: B.clone() for key, B in before[1].items()})
        rule.step(x, y)
        learnt = [not torch.equal(W, block.weight) for W, block in zip(before[0], rule.chain[:-1], strict=True)]
        Bs = rule.feedback.matrices
        moved = [
            ("block", i) in Bs
            and not (("block", i) in before[1] and torch.equal(before[1]["block", i], Bs["block", i]))
            for i in range(3)
        ]
        found.append((learnt, moved))
    return found


@pytest.mark.parametrize(
    ("rule", "options"),
    [(DFA, {}), (DFA, {"clip_norm": 0.1}), (MemDFA, {}), (MemDFA, {"keep_bytes": 600}), (MemDFA, {"clip_norm": 0.1}),
     (MemDFA, {"clip_global_norm": 0.1}), (MemDFA, {"pass1": "bfloat16"})],
)  # fmt: skip
def test_b_learns_in_the_steps_in_which_its_block_is_taught(rule, options):
    dropping = rule(with_dropped_units(), SGD, feedback=learned(), **options)
    changes = changes_with_dropped_units(dropping)
    assert all(learnt == moved for learnt, moved in changes)
    assert {tuple(learnt[1:]) for learnt, _ in changes} > {(False, True), (True, False)}
    for other in (DFA, MemDFA) if "clip_global_norm" not in options else ():
        same = {name: value for name, value in options.items() if name != "keep_bytes"}
        twin = other(with_dropped_units(), SGD, feedback=learned(), **same)
        changes_with_dropped_units(twin)
        assert_identical(dict(twin.blocks.state_dict()), dict(dropping.blocks.state_dict()))
        assert all(map(torch.equal, twin.feedback.tensors(), dropping.feedback.tensors()))


@pytest.mark.parametrize(("weights", "kept"), [("float64", "float64"), ("bfloat16", "float32"), ("float16", "float32")])
def test_b_and_its_state_are_in_the_weights_dtype_or_float32(weights, kept):
    dtype = getattr(torch, weights)
    rule = MemDFA(MLP.build().to(dtype), SGD, feedback=learned())
    for x, y in MLP.batches(2):
        rule.step(x.to(dtype), y)
    assert {tensor.dtype for tensor in rule.feedback.tensors() if tensor.dim()} == {getattr(torch, kept)}


def test_b_and_its_state_stay_in_the_weights_dtype_and_are_what_angles_are_of():
    rule = MemDFA(MLP.build(), SGD, feedback=learned(), precision="bfloat16")
    trained(rule, MLP, 2)
    assert {tensor.dtype for tensor in rule.feedback.tensors()} == {torch.float32}
    angles = ml.alignment.feedback_angles(rule, MLP.x)
    rule.feedback.matrices = {key: -B for key, B in rule.feedback.matrices.items()}
    assert ml.alignment.feedback_angles(rule, MLP.x)[0] == pytest.approx(180 - angles[0])


def test_another_size_of_output_is_refused_before_anything_learns():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    rule = MemDFA(net, SGD, feedback=learned())
    rule.step(torch.randn(6, 2, 6, 6), MLP.y)
    with refuses_and_keeps(rule, ValueError, "learned for 48 outputs, and there are 108 now"):
        rule.step(torch.randn(6, 2, 8, 8), MLP.y)


@pytest.mark.parametrize("name", ["mlp_relu", "everything", "linear_on_tokens"])
def test_what_is_predicted_is_measured_to_the_byte(name):
    problem = BY_NAME[name]
    for kind, start in zip(KINDS, ("uniform", "zero"), strict=True):
        rule = MemDFA(problem.build(), SGD, problem.loss, learned(kind, distribution=start))
        trace = ml.memory.measure(rule, problem.x, problem.y, warm_up=1)
        predicted = ml.memory.predict(
            "memdfa",
            problem.build(),
            problem.x.shape,
            SGD,
            learned(kind, distribution=start),
            loss_fn=problem.loss,
            y_dtype=torch.long,
            y_shape=tuple(problem.y.shape),
        )
        assert trace.changes.tolist() == predicted.changes.tolist()
        assert trace.resting_by_category == predicted.resting_by_category
        B = sum(B.nbytes for B in rule.feedback.matrices.values())
        state = 2 * B + 4 * len(rule.feedback.matrices) if kind == "adam" else 0
        assert trace.resting_by_category["feedback"] == B + state


def test_a_scheduler_is_of_the_weights_and_b_keeps_its_rate():
    rule = MemDFA(MLP.build(), ADAMW, feedback=learned())
    start = rule.optimizers[0].param_groups[0]["lr"]
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.1)
    ml.fit(rule, (MLP.x, MLP.y), 2, 6, scheduler=decay, progress=False)
    assert rule.optimizers[0].param_groups[0]["lr"] == pytest.approx(start / 100)
    assert {optimizer.param_groups[0]["lr"] for optimizer in rule.feedback.optimizers.values()} == {0.05}


@pytest.mark.parametrize("where", ["file", "disk"])
def test_a_run_goes_on_where_it_stopped(where, tmp_path):
    data = MLP.x.repeat(4, 1), MLP.y.repeat(4)

    def fitted(epochs, folder, **more):
        torch.manual_seed(0)
        store = ml.offload.Disk(folder / "w") if where == "disk" else None
        net = store.build(MLP.make) if store else MLP.build()
        rule = MemDFA(net, ADAMW, feedback=learned(decay=0.1), **({"offload": store} if store else {}))
        ml.fit(rule, data, epochs, 8, checkpoint=folder / ("w" if store else "run.pt"), progress=False)
        if store is None:
            return record([], rule.blocks, rule.optimizers), [t.clone() for t in rule.feedback.tensors()]
        store.close()
        return {path.name: path.read_bytes() for path in (folder / "w").glob("block*")}

    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    whole = fitted(3, one)
    fitted(1, two)
    parts = fitted(3, two)
    if where == "file":
        assert_same(whole, parts)
    else:  # whatever of a block's two files they are in
        assert sorted(whole.values()) == sorted(parts.values())


def assert_rests_as_in_memory(rule, twin):
    for i, block in enumerate(twin.chain):
        with rule.store.block(i, "teach"):
            assert_identical(dict(rule.chain[i].state_dict()), dict(block.state_dict()))
            B = twin.feedback.matrices.get(("block", i))
            assert B is None or torch.equal(rule.feedback.matrices["block", i], B)


def vast(logits, y):
    """A loss that is finite, and the norm of whose gradients is not."""
    return 1e30 * nn.functional.cross_entropy(logits, y)


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("where", ["disk", "host"])
def test_offloaded_with_a_norm_over_all_gradients_it_is_as_in_memory(where, ahead, tmp_path):
    store = ml.offload.Disk(tmp_path, ahead=ahead) if where == "disk" else ml.offload.Host("cpu", ahead=ahead)
    how = {"clip_global_norm": 0.1}
    rule, twin = (
        MemDFA(with_dropped_units(), ADAMW, feedback=learned(), **how, **more) for more in ({"offload": store}, {})
    )
    losses = []
    for one in (rule, twin):
        torch.manual_seed(1)
        losses.append([one.step(x, y).item() for x, y in MLP.batches(4)])
    assert losses[0] == losses[1]
    with refuses(FloatingPointError, "not finite"):  # B that a failing step has drawn does not rest, and is forgotten
        broken = MemDFA(MLP.build(), ADAMW, vast, learned(), **how, offload=ml.offload.Host("cpu"))
        broken.step(MLP.x, MLP.y)
    assert not broken.feedback.matrices
    assert_rests_as_in_memory(rule, twin)
    if where == "disk":
        store.close()


@rotated("problem ahead", params(), (0, 1, 2))
def test_offloaded_it_is_as_in_memory(problem, ahead, tmp_path):
    with ml.offload.Disk(tmp_path, ahead=ahead) as store:
        rule, twin = (make_rule("memdfa", problem, SGD, learned(), **more) for more in ({"offload": store}, {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            losses = list(rule.sweep(problem.batches(4)))
        wanted = trained(twin, problem)
        assert_rests_as_in_memory(rule, twin)
        assert all(map(torch.equal, losses, wanted[0].losses))


def test_the_optimizer_follows_a_matrix_that_has_moved():
    rules = [make_rule("memdfa", MLP, SGD, learned()) for _ in range(2)]
    for rule in rules:
        trained(rule, MLP, 2)
    feedback = rules[1].feedback
    feedback.matrices = {key: B.clone() for key, B in feedback.matrices.items()}  # as from another device
    assert_same(*(trained(rule, MLP) for rule in rules))


def test_angles_leave_b_and_its_optimizer_as_they_are():
    problem = BY_NAME["conv_pool"]
    rule, twin = (make_rule("memdfa", problem, SGD, learned()) for _ in range(2))
    before = trained(rule, problem, 2)
    for measure in (ml.alignment.angles, ml.alignment.responses, ml.check):
        measure(rule, problem.x, problem.y)
    ml.alignment.feedback_angles(rule, problem.x)
    assert all(map(torch.equal, before[1], rule.feedback.tensors()))
    assert_same(trained(rule, problem), (trained(twin, problem, 2), trained(twin, problem))[1])


def test_b_comes_to_agree_with_what_it_stands_for_and_linear_blocks_have_it_exactly():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4))
    x, teacher = torch.randn(64, 8), torch.randn(8, 4)
    y = (x @ teacher).argmax(1)
    rule = MemDFA(
        net, partial(torch.optim.SGD, lr=0.2), feedback=Learned(3, lr=0.2, optimizer=torch.optim.SGD, decay=0.01)
    )
    start = ml.alignment.feedback_angles(rule, x)
    for _ in range(300):
        rule.step(x, y)
    end = ml.alignment.feedback_angles(rule, x)
    W = (net[2].weight @ net[1].weight).detach()
    B = rule.feedback.matrices["block", 0].t()
    cosine = nn.functional.cosine_similarity(B.flatten(), W.flatten(), 0)
    assert math.degrees(math.acos(cosine)) == pytest.approx(end[0], abs=0.01)
    assert end[1] < 45 < min(start[:2])
    assert end[0] < start[0] - 20
    assert math.isnan(end[2])


def test_what_does_not_fit_is_refused_in_a_line():
    with refuses(ValueError, "FA", "Stored"):
        make_rule("fa", MLP, storage=learned())
    for kind in ml.feedback.KINDS.values():
        with refuses(ValueError, "zero", "teaches nothing", "Learned"):
            kind(distribution="zero")
    with refuses(ValueError, "grid"):
        learned(grid=2)
    for wrong in ({"lr": 0}, {"lr": -1.0}, {"lr": 0.1, "decay": -1.0}):
        with refuses(ValueError, next(reversed(wrong))):
            Learned(**wrong)
    with refuses(TypeError, "lr"):
        Learned()
    for wrong, hint in ((torch.nn.Linear, "unexpected keyword"), ("adam", "must be a class of optimizers")):
        with refuses(TypeError, hint):
            Learned(lr=0.1, optimizer=wrong)
    one, other = (make_rule("memdfa", MLP, SGD, learned(kind)) for kind in KINDS)
    one.step(MLP.x, MLP.y)
    with refuses_and_keeps(other, ValueError, "learns by SGD"):
        other.load_state_dict(one.state_dict())
