"""A forward pass that leaves nothing behind: buffers, generator and graph, also when it fails half-way."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import BY_NAME, params, rotated
from reference import assert_identical
from torch import Tensor, nn

from memdfa_lab.core.blocks import as_blocks
from memdfa_lab.core.compat import buffers_of, version
from memdfa_lab.core.recompute import buffers_restored, forward_without_trace


class Counter(nn.Module):
    """A module whose buffers change in every way there is."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(3))
        self.register_buffer("reassigned", torch.zeros(3))
        self.register_buffer("resized", torch.zeros(3), persistent=False)
        self.register_buffer("both", torch.zeros(3))
        self.register_buffer("late", None)
        self.register_buffer("dropped", torch.ones(3))
        self.register_buffer("number", torch.tensor(4))

    def forward(self, h: Tensor) -> Tensor:
        self.in_place += h.mean()
        self.reassigned = self.reassigned + 1
        self.resized = torch.cat([self.resized, self.resized])
        self.both += 1
        self.both = self.both * 2
        self.late = h.mean()
        self.dropped = None
        self.number += 1
        return h + torch.rand(())


class Fails(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        raise KeyError("half-way")


def all_buffers(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return [pair for part in module.modules() for pair in buffers_of(part).items()]


def assert_left_as_it_was(module: nn.Module, run) -> None:
    """Run something and compare buffers, as objects and in value, and the global generator."""
    before = all_buffers(module)
    values = copy.deepcopy(before)
    generator = torch.get_rng_state()
    run()
    after = all_buffers(module)
    assert [(name, id(b)) for name, b in after] == [(name, id(b)) for name, b in before]
    assert_identical(after, values)
    assert torch.equal(torch.get_rng_state(), generator)


@rotated("problem double", params(), [False, True], turns=2)
def test_the_output_is_the_networks_and_nothing_else_changes(problem, double):
    problem = problem.double() if double else problem
    model = problem.build()
    with torch.random.fork_rng(devices=[]):
        expected = copy.deepcopy(model)(problem.x)
    blocks, outputs = as_blocks(model), []
    before = {name: (version(p), p.detach().clone()) for name, p in blocks.named_parameters()}
    assert_left_as_it_was(blocks, lambda: outputs.append(forward_without_trace(blocks, problem.x)))
    assert_identical({name: (version(p), p.detach()) for name, p in blocks.named_parameters()}, before)
    assert all(p.grad is None for p in blocks.parameters())
    (out,) = outputs
    rounding = 0 if problem.dtype == torch.float64 else 1e-6  # oneDNN adds up in another order in another layout
    torch.testing.assert_close(out, expected.detach(), rtol=rounding, atol=rounding)
    assert expected.requires_grad
    assert not out.requires_grad


def test_buffers_are_restored_however_they_were_changed():
    blocks = as_blocks([nn.Linear(3, 3), Counter(), nn.Linear(3, 3), Counter()])
    assert_left_as_it_was(blocks, lambda: forward_without_trace(blocks, torch.ones(2, 3)))


def test_buffers_and_generator_are_restored_when_a_block_fails():
    blocks = as_blocks([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), Counter(), nn.Linear(3, 3), Counter()])
    blocks.append(Fails())

    def run() -> None:
        with pytest.raises(KeyError, match="half-way"):
            forward_without_trace(blocks, torch.randn(4, 3, generator=torch.Generator()))

    assert_left_as_it_was(blocks, run)


def test_a_second_pass_draws_what_the_first_drew():
    problem = BY_NAME["dropout"]
    blocks = as_blocks(problem.build())
    first = forward_without_trace(blocks, problem.x)
    generator = torch.get_rng_state()
    assert torch.equal(blocks(problem.x), first)
    assert not torch.equal(torch.get_rng_state(), generator)
    assert not torch.equal(blocks(problem.x), first)


def test_buffers_restored_lets_them_change_inside():
    norm = nn.BatchNorm1d(3)
    with buffers_restored(norm):
        norm(torch.randn(4, 3, generator=torch.Generator()))
        assert norm.num_batches_tracked == 1
    assert norm.num_batches_tracked == 0


def test_a_constant_buffer_that_is_an_expanded_view_is_left_alone():
    layer = nn.Linear(3, 3)
    layer.register_buffer("mask", torch.ones(1).expand(3))
    blocks = as_blocks([layer])
    assert_left_as_it_was(blocks, lambda: forward_without_trace(blocks, torch.ones(2, 3)))
