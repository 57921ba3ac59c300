"""The rivals that are not in test_baselines: schedules counted against theory, reversible blocks, files, MeZO."""

from __future__ import annotations

import errno
import math
import os
import pickle
import random
import tempfile
from collections import Counter
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from problems import AS_BP, BY_NAME, OPTIMIZERS, WITHOUT_GLOBAL_NORM, Problem, make_rule, params, record, rotated, train
from reference import assert_close_training, assert_identical, assert_same_training, refuses, refuses_and_keeps
from test_baselines import DEEP, check_equals_bp
from torch import Tensor, nn

import memdfa_lab as ml
from memdfa_lab.memory import measure, predict
from memdfa_lab.rivals import activation_offload
from memdfa_lab.rivals.binomial import RUN, TEACH, fewest_snapshots, recomputations, runs_again, schedule
from memdfa_lab.rivals.reversible import Coupling

# ------------------------------------------------------------------------------------------- binomial checkpointing


@cache
def fewest_runs(length: int, snapshots: int) -> float:
    """Return the fewest runs of blocks before each of `length` blocks has been taught, by trying all schedules."""
    if length == 1:
        return 0
    if snapshots == 0:
        return math.inf
    splits = range(1, length)
    return min(m + fewest_runs(length - m, snapshots - 1) + fewest_runs(m, snapshots) for m in splits)


def check_schedule(length: int, snapshots: int) -> Counter[int]:
    """Follow a schedule as a rule does, and return how often each block is run before it is taught."""
    kept, at, runs, most = [0], 0, Counter[int](), 0
    left = length
    for action, i in schedule(length, snapshots):
        if action == "back":
            at = kept.pop()
        assert i == at
        if action == "keep":
            kept.append(i)
            most = max(most, len(kept))
        elif action == RUN:
            runs[i] += 1
            at += 1
        elif action == TEACH:
            left -= 1
            assert i == left
    assert (left, kept) == (0, [])
    assert most <= snapshots
    return runs


@pytest.mark.parametrize("snapshots", range(1, 7))
def test_no_schedule_runs_blocks_less_often(snapshots):
    for length in range(1, 31):
        runs = check_schedule(length, snapshots)
        assert runs.total() == fewest_runs(length, snapshots) == recomputations(length, snapshots)
        assert max(runs.values(), default=0) <= runs_again(length, snapshots)


@pytest.mark.parametrize(("snapshots", "r", "again"), [(140, 2, 19_858), (38, 3, 29_180), (20, 4, 37_976)])
def test_ten_thousand_blocks_are_run_again_as_often_as_theory_says(snapshots, r, again):
    runs = check_schedule(10_000, snapshots)
    assert (max(runs.values()), runs.total()) == (r, again)
    assert again == recomputations(10_000, snapshots)


def test_the_default_is_the_fewest_snapshots_that_run_no_block_again_more_than_three_times():
    found = {length: fewest_snapshots(length) for length in (1, 2, 5, 33, 65, 1001, 10_000)}
    assert found == {1: 1, 2: 1, 5: 2, 33: 4, 65: 6, 1001: 17, 10_000: 38}
    assert all(runs_again(length, s) <= 3 < runs_again(length, s - 1) for length, s in found.items() if s > 1)
    assert make_rule("binomial", DEEP).snapshots == 2


def test_schedules_of_no_blocks_or_without_snapshots_are_refused():
    for function in (runs_again, recomputations, schedule):
        for length, snapshots, hint in ((10, 0, "snapshots"), (0, 3, "length"), (10, True, "snapshots")):
            with refuses(ValueError, hint, "from 1 on"):
                function(length, snapshots)
    for length, most, hint in ((5, 0, "most"), (0, 3, "length"), (2.0, 3, "length")):
        with refuses(ValueError, hint, "from 1 on"):
            fewest_snapshots(length, most)


@pytest.mark.slow
@rotated("problem optimizer", params(), OPTIMIZERS)
def test_it_trains_as_bp_with_any_number_of_snapshots(problem, optimizer):
    for snapshots in range(1, len(make_rule("bp", problem).chain) + 2):
        check_equals_bp("binomial", problem, optimizer, snapshots=snapshots)


@pytest.mark.parametrize("snapshots", [1, 2, 3, 20])
def test_blocks_run_as_often_as_the_schedule_says(snapshots):
    learner, runs = make_rule("binomial", DEEP, snapshots=snapshots), []
    for i, block in enumerate(learner.chain):
        layer = next(part for part in block.modules() if isinstance(part, nn.Linear))
        layer.register_forward_hook(lambda *given, i=i: runs.append(i))
    learner.rehearse(DEEP.x, DEEP.y)
    runs.clear()
    learner.step(DEEP.x, DEEP.y)
    assert len(runs) == 10 + recomputations(10, snapshots)


class DrawsAndCounts(nn.Linear):
    """A layer that draws from Python's and numpy's generators too, and counts its calls in two ways."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.also = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.also += 1
        drawn = random.random() + float(np.random.rand()) + torch.rand(())  # noqa: NPY002
        return torch.tanh(super().forward(h) * (drawn + self.calls))  # which a second call would change


def spectral() -> nn.Module:
    norm = nn.utils.parametrizations.spectral_norm
    return nn.Sequential(norm(nn.Linear(8, 8)), nn.Tanh(), norm(nn.Linear(8, 8)), nn.Linear(8, 5))


STATEFUL = {
    "draws": lambda: nn.Sequential(*(DrawsAndCounts() for _ in range(5)), nn.Linear(8, 5)),
    "spectral_norm": spectral,
    "attention": lambda: ml.models.vit((2, 4, 4), 5, patch=2, width=8, depth=3, heads=2),
}


@pytest.mark.parametrize("rule", ["binomial", "reversible"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_block_that_is_run_again_does_the_same_and_changes_its_state_once(name, rule):
    problem = Problem(name, STATEFUL[name], (2, 4, 4) if name == "attention" else (8,), random=True)
    ends = []
    for kind in ("bp", rule):
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        learner = make_rule(kind, problem, "momentum")
        ends.append((train(learner, problem), random.getstate(), [getattr(b, "also", 0) for b in learner.chain]))
        ends[-1] += (pickle.dumps(np.random.get_state()),)  # noqa: NPY002
    assert_same_training(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


@pytest.mark.parametrize("snapshots", [0, -1, 2.0, True, "3"])
def test_snapshots_that_are_no_whole_number_from_1_on_are_refused(snapshots):
    with refuses(ValueError, "snapshots", repr(snapshots)):
        make_rule("binomial", DEEP, snapshots=snapshots)


WIDTH, BATCH = 80, 128


def chain(depth: int) -> nn.Module:
    return ml.models.mlp(WIDTH, [WIDTH] * depth, 10)


@pytest.mark.parametrize("snapshots", [1, 3, 8])
def test_snapshots_are_all_that_is_kept_of_blocks_that_wait(snapshots):
    """Beside them stand one block's input, its output before and behind the activation, and one block's gradients."""
    trace = predict("binomial", partial(chain, 32), (BATCH, WIDTH), snapshots=snapshots)
    most = trace.by_category.max()
    assert most["activations"] / (4 * BATCH * WIDTH) == snapshots - 1 + 3
    assert most["gradients"] == 4 * WIDTH * (WIDTH + 1)


# ------------------------------------------------------------------------------------------------ reversible networks


def part(width: int, *behind: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), *behind)


def couplings(*behind: nn.Module) -> nn.Module:
    """Return couplings with others between: the input of each other block is kept."""
    inner = [Coupling(part(6, *behind), part(6, *behind)) for _ in range(3)]
    middle = [nn.Linear(12, 8), *behind, Coupling(part(4), part(4, *behind))]
    return nn.Sequential(nn.Linear(8, 12), *inner, *middle, nn.Linear(8, 5))


def frozen(*names: str) -> nn.Module:
    net = nn.Sequential(*(Coupling(part(4), part(4)) for _ in range(4)), nn.Linear(8, 5))
    for name in names:
        net.get_submodule(name).requires_grad_(False)
    return net


REVERSIBLE = [
    Problem("dense", lambda: ml.models.reversible(8, 12, 5, 5, batch_norm=True), (8,)),
    Problem("images", lambda: ml.models.reversible((2, 6, 6), [4, 8], 2, 5, "tanh", batch_norm=True), (2, 6, 6)),
    Problem("residual", lambda: ml.models.reversible((2, 6, 6), [4, 8], 2, 5, coupled=False), (2, 6, 6)),
    Problem("mixed", couplings, (8,), ml.losses.mse),
    Problem("dropout", lambda: couplings(nn.Dropout(0.3)), (8,), random=True),
    Problem("frozen_first", lambda: frozen("0", "1.F"), (8,)),
    Problem("frozen_within", lambda: frozen("1", "2.G"), (8,)),
    Problem("frozen_last", lambda: frozen("3.F", "4"), (8,)),
]
OF_COUPLINGS = [pytest.param(problem, id=problem.name) for problem in REVERSIBLE]


@rotated("problem optimizer", OF_COUPLINGS, OPTIMIZERS, turns=2)
def test_couplings_learn_as_in_bp_to_rounding_and_draw_the_same(problem, optimizer):
    problem = problem.double()
    expected, found = (train(make_rule(rule, problem, optimizer), problem) for rule in ("bp", "reversible"))
    assert_close_training(expected, found)
    assert_identical(expected.rng, found.rng)


@rotated("problem rule", OF_COUPLINGS, [rule for rule in AS_BP if rule != "reversible"], turns=2)
def test_the_other_baselines_train_couplings_as_bp_bit_for_bit(problem, rule):
    check_equals_bp(rule, problem)


@rotated("problem option", OF_COUPLINGS, [("clip_norm", None), ("clip_norm", 0.01), ("precision", "bfloat16")], turns=2)
def test_memory_of_couplings_is_predicted_to_the_byte(problem, option):
    options: Any = dict([option])
    given = {"loss_fn": problem.loss, **options}
    found = predict("reversible", problem.build(), problem.x.shape, OPTIMIZERS["adamw"], **given)
    measured = measure(make_rule("reversible", problem, "adamw", **options), problem.x, problem.y, warm_up=1)
    assert found.peak_by_category == measured.peak_by_category
    assert found.end_bytes == measured.end_bytes == 0


def test_couplings_hold_as_much_at_any_depth_and_learn_in_bfloat16_nearly_as_in_bp():
    nets = [lambda depth=depth: ml.models.reversible(64, 64, depth, 10) for depth in (2, 40)]
    assert len({predict("reversible", net, (32, 64)).peak_bytes for net in nets}) == 1
    problem, ends = Problem("deep", lambda: ml.models.reversible(8, 12, 20, 5), (8,)), []
    for rule in ("bp", "reversible"):
        found = train(make_rule(rule, problem, precision="bfloat16"), problem)
        ends.append(torch.cat([tensor.flatten() for tensor in found.tensors]))
    assert (ends[0] - ends[1]).norm() < 1e-3 * ends[0].norm()


def test_the_twin_has_the_same_weights_and_is_another_network():
    nets = [ml.models.reversible(8, 12, 3, 5, coupled=coupled) for coupled in (True, False)]
    assert_identical(*(dict(net.state_dict()) for net in nets))
    x = torch.randn(3, 8)
    assert not torch.equal(*(net(x) for net in nets))
    first, coupled = nets[1][1], nets[0][1]
    h = nets[1][0](x)
    x1, x2 = h.chunk(2, 1)
    assert torch.equal(first(h), torch.cat([x1 + first.F(x2), x2 + first.G(x1)], 1))
    assert torch.equal(coupled(h), torch.cat([x1 + first.F(x2), x2 + first.G(x1 + first.F(x2))], 1))


def test_reversible_networks_have_names_and_run_by_them():
    for name in ("reversible-784-[16]x3-10", "residual-784-[16]x3-10"):
        net, other = (ml.models.build(name, seed=seed) for seed in (2, 1))
        assert not torch.equal(net[0][1].weight, other[0][1].weight)
        assert (len(net), ml.models.input_shape(name)) == (5, (1, 1, 784))
        assert [block.reversible for block in net if isinstance(block, Coupling)] == [name.startswith("rev")] * 3
        assert list(ml.models.sizes(name)["parameters"]) == [785 * 16, *[2 * 72] * 3, 170]
    assert ml.bench.bench(name, 4, [ml.bench.Contender("reversible")], rounds=1)["peak_bytes"].min() > 0


@pytest.mark.parametrize(
    ("hint", "how"),
    [
        ("even widths", {"widths": 7}),
        ("even widths", {"widths": [8, 5]}),
        ("empty list", {"widths": []}),
        ("width 0", {"widths": [8, 0]}),
        ("width True", {"widths": True}),
        ("depth", {"depth": 0}),
        ("did you mean 'relu'", {"activation": "rellu"}),
        ("(C, H, W)", {"input_shape": (3, 3)}),
        ("seed", {"seed": -1}),
    ],
)
def test_what_makes_no_reversible_network_is_refused(hint, how):
    with refuses(ValueError, hint):
        ml.models.reversible(**{"input_shape": 8, "widths": 8, "depth": 2, "classes": 5, **how})


@pytest.mark.parametrize("widths", [8.0, None, "88"])
def test_widths_are_a_number_or_a_list(widths):
    with refuses(TypeError, "a list of them such as [8, 16]", repr(widths)):
        ml.models.reversible(8, widths, 2, 5)
    assert len(ml.models.reversible(8, np.array([8, 4]), 2, 5)) == len(ml.models.reversible(8, [np.int64(8), 4], 2, 5))


def test_a_coupling_of_an_odd_number_of_channels_and_one_in_place_are_refused_before_anything_changes():
    odd = nn.Sequential(nn.Linear(8, 7), Coupling(part(3), part(4)), nn.Linear(7, 5))
    in_place = nn.Sequential(nn.Linear(8, 8), Coupling(part(4), nn.Sequential(nn.ReLU(True), part(4))), nn.Linear(8, 5))
    for net, hint in ((odd, "even number of channels"), (in_place, "inplace=False")):
        learner = ml.Reversible(net, OPTIMIZERS["sgd"])
        with refuses_and_keeps(learner, (ValueError, RuntimeError), hint):
            learner.step(DEEP.x, DEEP.y)


# -------------------------------------------------------------------------------------------------- activations on disk


def test_activations_are_on_disk_twice_and_one_blocks_gradients_in_memory(tmp_path):
    learner = ml.ActivationOffload(chain(32), OPTIMIZERS["sgd"], folder=tmp_path)
    trace = measure(learner, torch.ones(BATCH, WIDTH), torch.arange(BATCH) % 10)
    most, h = trace.by_category.max(), 4 * BATCH * WIDTH
    assert learner.written_bytes == 2 * 32 * h  # what ReLU puts out, and again as what the next layer takes
    assert most["activations"] == 3 * h
    assert most["gradients"] == 4 * WIDTH * (WIDTH + 1)


def test_tensors_of_all_layouts_and_types_come_back_as_they_were():
    base = torch.randn(4, 6, 5)
    given = [base, base[1:3, ::2, 1:4], base.transpose(0, 2), base[0, 0].expand(3, 5), base[:0], torch.tensor(3.5)]
    given += [base.to(dtype) for dtype in (torch.bfloat16, torch.float64)] + [base > 0, torch.arange(7)]
    given.append(torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    with tempfile.TemporaryFile() as file:
        waiting = activation_offload._Waiting(file, {base.untyped_storage()._cdata + 1})
        saved = [waiting.put(tensor) for tensor in given]
        for tensor, there in reversed([*zip(given, saved, strict=True)]):
            back = waiting.take(there)
            assert_identical(back, tensor)
            assert back.stride() == tensor.stride()


class Full:
    """A file on a full disk."""

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def seek(self, at: int) -> None:
        pass

    def write(self, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_file_is_left_by_a_step_that_fails_and_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    learner = make_rule("activation_offload", DEEP, folder=str(tmp_path))
    seen = []
    learner.chain[4][0].register_forward_hook(lambda *given: seen.append([*tmp_path.iterdir()]))
    learner.step(DEEP.x, DEEP.y)

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    hook = learner.chain[4][0].weight.register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        learner.step(DEEP.x, DEEP.y)
    hook.remove()
    assert seen
    assert not any(seen)
    assert [*tmp_path.iterdir()] == []

    def full(dir: str) -> Full:
        assert dir == str(tmp_path)
        return Full()

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    for p in learner.blocks.parameters():
        p.grad = None
    with refuses_and_keeps(learner, OSError, "No space left"):
        learner.step(DEEP.x, DEEP.y)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with refuses(ValueError, "folder", "nowhere"):
        make_rule("activation_offload", DEEP, folder=tmp_path / "nowhere")
    with refuses(TypeError, "folder must be the path of a folder", "int"):
        make_rule("activation_offload", DEEP, folder=5)


# ----------------------------------------------------------------------------------------------------------------- MeZO


def train_by_moving(problem: Problem, optimizer: Any, steps: int = 4, eps: float = 1e-3, seed: int = 0) -> Any:
    """Train as the paper's algorithm does, on a model of its own, with copies of weights, buffers and generators."""
    model = problem.build()
    learn = [p for p in model.parameters() if p.requires_grad]
    made, losses = OPTIMIZERS[optimizer](learn), []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(4)
        for step, (x, y) in enumerate(problem.batches(steps)):
            generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))
            z = [torch.empty_like(p).normal_(generator=generator) for p in learn]
            weights, buffers = ([t.clone() for t in tensors] for tensors in (learn, model.buffers()))
            drawn, both = torch.get_rng_state(), list[Tensor]()
            for sign in (1, -1):
                torch.set_rng_state(drawn)
                for tensor, before in zip(model.buffers(), buffers, strict=True):
                    tensor.copy_(before)
                for p, weight, direction in zip(learn, weights, z, strict=True):
                    p.copy_(weight + sign * eps * direction)
                both.append(problem.loss(model(x), y))
            for p, weight, direction in zip(learn, weights, z, strict=True):
                p.copy_(weight)
                p.grad = direction * (both[0] - both[1]) / (2 * eps)
            made.step()
            losses.append(sum(both) / 2)
        return record(losses, model, [made])


@rotated("problem optimizer", params(), ["sgd", "momentum"], turns=2)
def test_mezo_learns_as_the_papers_algorithm(problem, optimizer):
    problem = problem.double()
    expected, found = train_by_moving(problem, optimizer), train(make_rule("mezo", problem, optimizer), problem)
    for one, other in zip(expected.losses + expected.tensors, found.losses + found.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert_identical(expected.rng, found.rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_moved_back_to_a_few_roundings(dtype):
    problem = Problem("mlp", DEEP.make, DEEP.shape, dtype=dtype)
    learner = make_rule("mezo", problem, partial(torch.optim.SGD, lr=1e-30))
    before = [p.detach().clone() for p in learner.blocks.parameters()]
    learner.step(problem.x, problem.y)
    for now, then in zip(learner.blocks.parameters(), before, strict=True):
        assert (now - then).abs().max() <= 3 * torch.finfo(dtype).eps * (then.abs().max() + 1e-2)


def test_mezo_draws_the_same_in_both_passes_also_in_a_loss_that_draws():
    seen = []

    def loss_fn(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(torch.rand(()).item())
        return torch.nn.functional.cross_entropy(logits, y)

    problem = BY_NAME["dropout"]
    ml.MeZO(problem.build(), OPTIMIZERS["sgd"], loss_fn).step(problem.x, problem.y)
    plus, minus = seen[-2:]
    assert plus == minus


def test_mezo_lowers_a_loss_and_goes_on_from_a_state_as_if_it_had_not_stopped():
    problem = BY_NAME["batchnorm"]
    learner, other = (make_rule("mezo", problem, "adamw", seed=7) for _ in range(2))
    losses = [learner.step(problem.x, problem.y).item() for _ in range(150)]
    assert losses[-1] < 0.8 * losses[0]
    other.load_state_dict(learner.state_dict())
    ends = [train(one, problem) for one in (learner, other)]
    assert_same_training(*ends)


def test_memory_of_mezo_is_that_of_one_block_and_one_weight():
    nets = [lambda depth=depth: ml.models.mlp(64, [64] * depth, 10) for depth in (3, 40)]
    assert len({predict("mezo", net, (32, 64)).peak_bytes for net in nets}) == 1


class Stops(nn.Linear):
    """A layer that is stopped at its last call."""

    calls: ClassVar[list[int]] = []  # of the class, since a pass restores the attributes of a module

    def forward(self, h: Tensor) -> Tensor:
        self.calls.append(1)
        if len(self.calls) == 3:  # the first is a rehearsal
            raise KeyboardInterrupt
        return super().forward(h)


def test_weights_are_moved_back_when_a_pass_is_stopped():
    learner = ml.MeZO(nn.Sequential(nn.Linear(8, 8), Stops(8, 5)), OPTIMIZERS["sgd"])
    before = [p.detach().clone() for p in learner.blocks.parameters()]
    with pytest.raises(KeyboardInterrupt):
        learner.step(DEEP.x, DEEP.y)
    for now, then in zip(learner.blocks.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=1e-6)


REFUSED = [
    ("mezo", {"eps": 0}, "eps"),
    ("mezo", {"eps": True}, "eps"),
    ("mezo", {"seed": -1}, "seed"),
    *[(rule, {"clip_global_norm": 1.0}, "use clip_norm") for rule in WITHOUT_GLOBAL_NORM],
    *[(rule, {"pass1": "int8"}, "pass1") for rule in ("mezo", "binomial", "reversible", "activation_offload")],
]


@pytest.mark.parametrize(("rule", "options", "hint"), REFUSED)
def test_what_a_rival_cannot_do_is_refused_in_a_line(rule, options, hint):
    with refuses(ValueError, hint):
        make_rule(rule, DEEP, **options)


def test_mezo_is_for_one_process_and_takes_its_own_states():
    learner = make_rule("mezo", DEEP)
    learner.group.size = 2
    with refuses_and_keeps(learner, ValueError, "one process"):
        learner.step(DEEP.x, DEEP.y)
    with refuses_and_keeps(learner, ValueError, "number of steps"):
        learner.load_state_dict(make_rule("bp", DEEP).state_dict())
