"""The random matrices: from (seed, key) alone, distributed as they say, the same in every kind of storage."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from problems import STORAGES, rotated
from reference import assert_identical, refuses
from torch import Tensor

from memdfa_lab.core.feedback import DISTRIBUTIONS, Feedback, Regenerated, Shared, Stored
from memdfa_lab.core.signal import Signal, split

LIKE = torch.zeros(())
INDEPENDENT = [Stored, Regenerated]  # a matrix a block
SLICEABLE = [name for name in DISTRIBUTIONS if name != "orthogonal"]
PAIRS = [
    (kind, name) for kind, name in product(STORAGES.values(), DISTRIBUTIONS) if kind is not Shared or name in SLICEABLE
]
WEIGHTS = [(7, 9), (4, 3, 5), (6, 2, 3, 3), (2, 3, 2, 2, 2)]


def dense(feedback: Feedback, i: int = 0, error_size: int = 10, output_size: int = 37, like: Tensor = LIKE) -> Tensor:
    return feedback.dense(i, error_size, output_size, like).clone()


def some_matrices(kind: type[Feedback], distribution: str, seed: int = 5) -> list[Tensor]:
    feedback = kind(seed, distribution)
    blocks = [dense(feedback, i, *shape) for i, shape in enumerate([(10, 37), (10, 20), (3, 500)])]
    return blocks + [feedback.weight(j, torch.zeros(shape)).clone() for j, shape in enumerate(WEIGHTS)]


def error(examples: int) -> Tensor:
    return torch.randn(examples, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestSameEverywhere:
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_stored_and_regenerated_give_the_same_matrices(self, distribution):
        assert_identical(some_matrices(Stored, distribution), some_matrices(Regenerated, distribution))

    @pytest.mark.parametrize(("kind", "distribution"), PAIRS)
    def test_the_global_generator_neither_matters_nor_moves(self, kind, distribution):
        expected = some_matrices(kind, distribution)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            before = torch.get_rng_state()
            assert_identical(some_matrices(kind, distribution), expected)
            assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_a_matrix_does_not_depend_on_earlier_uses_nor_on_their_precision(self, kind):
        feedback, other = kind(1), kind(1)
        first = dense(other)
        dense(feedback, like=LIKE.bfloat16())
        assert_identical([dense(feedback), dense(feedback)], [first, first])
        if kind is not Shared:  # whose B_i are slices of one matrix
            assert_identical([dense(feedback, 1), dense(feedback, 2)], [dense(other, i) for i in (2, 1)][::-1])

    @pytest.mark.parametrize(("kind", "distribution"), PAIRS)
    def test_float64_matrices_have_the_float32_values(self, kind, distribution):
        wide, narrow = (dense(kind(2, distribution), like=like) for like in (LIKE.double(), LIKE))
        assert wide.dtype == torch.float64
        rounding = 2e-7 if kind is Shared else 0  # scaled after the cast: one rounding apart
        torch.testing.assert_close(wide.float(), narrow, rtol=rounding, atol=0)

    def test_pinned_values(self):
        """Drawn once and written down: a change here breaks every saved Regenerated feedback."""
        drawn = {name: round(float(dense(Stored(0, name), 1, 4, 32)[2, 5]), 4) for name in DISTRIBUTIONS}
        assert drawn == {"he_normal": 0.3881, "normal": 0.2539, "uniform": 0.0687, "orthogonal": 0.1911}


def test_each_seed_and_each_key_has_a_matrix_of_its_own():
    for kind, name in PAIRS:
        drawn = [dense(kind(seed, name), i, 20, 20) for seed in range(3) for i in range(1 if kind is Shared else 3)]
        if kind is not Shared:
            weights = [kind(seed, name).weight(j, torch.zeros(20, 20)) for seed in range(3) for j in range(3)]
            drawn += [B.t() for B in weights]
        correlations = torch.corrcoef(torch.stack([B.flatten() for B in drawn])).fill_diagonal_(0)
        assert correlations.abs().max() < 0.25  # 5 standard errors of 1 / sqrt(400)


def moments(B: Tensor) -> tuple[float, float, float]:
    """Return mean, standard deviation and kurtosis (3 for a normal)."""
    centred = B.double() - B.double().mean()
    variance = (centred**2).mean()
    return float(B.double().mean()), float(variance.sqrt()), float((centred**4).mean() / variance**2)


# A normal cut at +-2: its variance and fourth moment, from the density phi and distribution function Phi.
PHI2 = math.exp(-2) / math.sqrt(2 * math.pi)
INSIDE = math.erf(2 / math.sqrt(2))
CUT_STD = math.sqrt(1 - 2 * 2 * PHI2 / INSIDE)
CUT_KURTOSIS = (3 - 2 * (2**3 + 3 * 2) * PHI2 / INSIDE) / CUT_STD**4

# for C = 10 and n = 20,000: standard deviation, kurtosis, and the range in which the largest number lies
EXPECTED = {
    "he_normal": (math.sqrt(2 / 10), CUT_KURTOSIS, 0.99 * 2 / CUT_STD, 2 / CUT_STD),  # truncated at two deviations
    "normal": (math.sqrt(1 / 10), 3, 3.8, 6),
    "uniform": (1 / math.sqrt(3 * 20_000), 9 / 5, 0.999 * math.sqrt(3), math.sqrt(3)),  # within 1 / sqrt(n)
}


class TestDistributions:
    @rotated("distribution kind scale", EXPECTED, STORAGES.values(), [1.0, 0.25], turns=3)
    def test_numbers_are_distributed_as_the_name_says(self, distribution, kind, scale):
        """A standard error of the mean of 0.0022 std, of std 0.0016, of kurtosis about 0.01."""
        std, kurtosis, least, most = EXPECTED[distribution]
        B = dense(kind(3, distribution, scale), 0, 10, 20_000) / scale
        mean, got_std, got_kurtosis = moments(B)
        assert abs(mean) < 0.012 * std
        assert got_std == pytest.approx(std, rel=0.008)
        assert got_kurtosis == pytest.approx(kurtosis, abs=0.06)
        assert least * std < B.abs().max() <= most * std * (1 + 1e-6)

    @rotated("shape kind scale", [(10, 300), (30, 12), (8, 8)], INDEPENDENT, [1.0, 0.5], turns=2)
    def test_orthogonal_matrices_have_singular_values_all_one(self, shape, kind, scale):
        values = torch.linalg.svdvals(dense(kind(1, "orthogonal", scale), 0, *shape).double())
        assert values == pytest.approx(scale * torch.ones(min(shape)), abs=1e-5)
        filters = kind(1, "orthogonal", scale).weight(0, torch.zeros(6, 3, 3, 3)).flatten(1)
        assert torch.linalg.svdvals(filters.double()) == pytest.approx(scale * torch.ones(6), abs=1e-5)

    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_fa_matrices_have_the_weights_shape_and_the_authors_fan_in(self, kind):
        """He-normal; fan_in of a dense B is its first dimension, as W^T's stand-in, of filters their own fan_in."""
        fan_ins = {(50, 400): 50, (400, 50): 400, (64, 16, 5, 5): 16 * 25, (64, 30, 9): 270, (40, 10, 3, 3, 3): 270}
        for shape, fan_in in fan_ins.items():
            B = kind(4).weight(0, torch.zeros(shape))
            assert B.shape == shape
            _, std, kurtosis = moments(B)
            assert std == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
            assert kurtosis == pytest.approx(CUT_KURTOSIS, abs=0.15)

    def test_shared_scales_each_block_for_itself(self):
        feedback = Shared(0, "uniform")
        large, small = dense(feedback, 0, 10, 4000), dense(feedback, 1, 10, 40)
        assert torch.allclose(small, large[:, :40] * 10, rtol=1e-6)


class TestSignal:
    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_the_signal_is_e_times_B_in_logical_order(self, kind):
        e, feedback = error(4), kind(0)
        B = dense(feedback, 2, 10, 24, e)
        by_hand = torch.zeros(4, 2, 3, 4, dtype=torch.float64)
        for c, row, column in product(range(2), range(3), range(4)):
            by_hand[:, c, row, column] = (e * B[:, (c * 3 + row) * 4 + column]).sum(1)
        for layout in (torch.contiguous_format, torch.channels_last):
            out = torch.empty(4, 2, 3, 4, dtype=torch.float64, memory_format=layout)
            for given in (e, e.view(4, 2, 5)):  # an error of more dimensions is flattened
                signal = Signal(2, given, feedback).shaped_like(out)
                torch.testing.assert_close(signal, by_hand, rtol=1e-12, atol=1e-12)
                assert signal.stride() == out.stride()

    @pytest.mark.parametrize("examples", [3, 40])  # fewer than classes, and more
    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_parts_of_the_batch_are_parts_of_the_signal_with_each_matrix_drawn_once(self, kind, examples, monkeypatch):
        drawn, draw = [], Feedback._draw
        monkeypatch.setattr(Feedback, "_draw", lambda self, *given: drawn.append(1) or draw(self, *given))
        e, out = error(examples), torch.empty(examples, 2, 3, 4, dtype=torch.float64)
        expected = Signal(2, e, kind(0)).shaped_like(out)
        once = len(drawn)
        signal, parts = Signal(2, e, kind(0)), []
        for part in split(examples, 2, 1):
            signal = signal.reusable(out)
            parts.append(signal.of(part).shaped_like(out[part]))
        assert len(drawn) == 2 * once
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_stored_and_regenerated_give_the_same_parts_bit_for_bit(self, distribution):
        out = torch.empty(2, 50, 6, 6)
        for examples in (3, 40):
            signals = [Signal(2, error(examples).float(), kind(0, distribution)) for kind in INDEPENDENT]
            assert_identical(*(signal.of(slice(1, 3)).shaped_like(out) for signal in signals))
            assert_identical(*(signal.reusable(out).of(slice(1, 3)).shaped_like(out) for signal in signals))


class TestStorage:
    def test_what_is_kept_between_uses(self):
        """Each matrix, none, or one as large as the largest block."""
        sizes, kept = (16, 320, 160), {Stored: 10 * 496, Regenerated: 0, Shared: 10 * 320}
        for kind, numbers in kept.items():
            feedback = kind(0)
            first, second = ([feedback.dense(i, 10, n, LIKE) for i, n in enumerate(sizes)] for _ in range(2))
            assert sum(B.numel() for B in feedback.matrices.values()) == numbers
            assert all((a.data_ptr() == b.data_ptr()) == (kind is Stored) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("distribution", SLICEABLE)
    def test_shared_does_not_change_when_a_larger_block_or_weight_comes(self, distribution):
        for error_size, (small, large) in product((1, 3, 10), [(1, 2), (5, 17), (16, 33), (37, 1001), (300, 304)]):
            feedback = Shared(0, distribution)
            before = dense(feedback, 0, error_size, small)
            larger = dense(feedback, 1, error_size, large)
            assert_identical(dense(feedback, 0, error_size, small), before, f"{error_size} {small} {large}")
            assert_identical(dense(Shared(0, distribution), 1, error_size, large), larger)
        before = feedback.weight(0, torch.zeros(3, 50)).clone()
        feedback.weight(1, torch.zeros(4, 3, 9, 9))
        assert_identical(feedback.weight(0, torch.zeros(3, 50)), before)


class TestStateDict:
    @pytest.mark.parametrize(("kind", "distribution"), PAIRS)
    def test_a_loaded_feedback_has_the_same_matrices_also_those_not_yet_drawn(self, kind, distribution, tmp_path):
        first, second = kind(8, distribution, 0.3), kind(1, "normal", 2.0)
        drawn = [dense(first, 0), dense(first, 1, 10, 100)]
        dense(second, 0)
        torch.save(first.state_dict(), tmp_path / "feedback.pt")
        second.load_state_dict(torch.load(tmp_path / "feedback.pt", weights_only=True))
        assert_identical([dense(second, 0), dense(second, 1, 10, 100)], drawn)
        assert_identical(dense(second, 2, 10, 999), dense(first, 2, 10, 999))
        assert repr(second) == f"{kind.__name__}(seed=8, distribution={distribution!r}, scale=0.3)"

    def test_stored_matrices_are_saved_themselves_and_copied(self):
        """So that a matrix set by hand, or drawn by another torch, survives."""
        first, second = Stored(0), Stored(0)
        first.dense(0, 10, 37, LIKE).mul_(3)
        second.load_state_dict(first.state_dict())
        first.dense(0, 10, 37, LIKE).zero_()
        assert torch.equal(dense(second), dense(Stored(0)) * 3)

    @pytest.mark.parametrize(("ours", "theirs"), [(Stored, Regenerated), (Regenerated, Shared), (Shared, Stored)])
    def test_a_state_of_another_kind_is_refused_and_changes_nothing(self, ours, theirs):
        feedback, other = ours(1), theirs(2, "normal", 3.0)
        dense(feedback), dense(other)
        before = feedback.state_dict()
        with refuses(ValueError, theirs.__name__, ours.__name__, f"ml.feedback.{theirs.__name__}()"):
            feedback.load_state_dict(other.state_dict())
        assert_identical(feedback.state_dict(), before)


REFUSED = [
    ((0, "cauchy"), "'cauchy'", *DISTRIBUTIONS),
    *[((seed,), "seed must be a whole number from 0") for seed in (-1, 2**64, 1.0, True, "1", None)],
    *[((0, "normal", scale), "scale must be", "above 0") for scale in (0, -1.0, float("nan"), float("inf"), "1")],
]


@rotated("given kind", REFUSED, STORAGES.values())
def test_settings_that_are_none_are_refused(given, kind):
    settings, *hints = given
    with refuses(ValueError, *hints):
        kind(*settings)


def test_shared_refuses_orthogonal_and_says_what_to_use():
    with refuses(ValueError, "Stored", "Regenerated"):
        Shared(0, "orthogonal")
