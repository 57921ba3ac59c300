"""The random matrices: from (seed, key) alone, distributed as they say, the same in every storage and process."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import pytest
import torch
from problems import BY_NAME, STORAGES, make_rule
from reference import assert_identical, refuses
from torch import Tensor

from memdfa_lab.core.feedback import DISTRIBUTIONS, Feedback, Regenerated, Shared, Stored
from memdfa_lab.core.signal import Signal, split

LIKE = torch.zeros(())
INDEPENDENT = [Stored, Regenerated]  # a matrix a block
SLICEABLE = [name for name in DISTRIBUTIONS if name != "orthogonal"]


def kinds_and_distributions() -> list:
    return [(k, d) for k in STORAGES.values() for d in DISTRIBUTIONS if d in SLICEABLE or k is not Shared]


def dense(feedback: Feedback, i: int = 0, error_size: int = 10, output_size: int = 37, like: Tensor = LIKE) -> Tensor:
    return feedback.dense(i, error_size, output_size, like).clone()


def some_matrices(kind: type[Feedback], distribution: str, seed: int = 5) -> list[Tensor]:
    feedback = kind(seed, distribution)
    weights = [torch.zeros(7, 9), torch.zeros(4, 3, 5), torch.zeros(6, 2, 3, 3), torch.zeros(2, 3, 2, 2, 2)]
    return [dense(feedback, i, *shape) for i, shape in enumerate([(10, 37), (10, 20), (3, 500)])] + [
        feedback.weight(j, weight).clone() for j, weight in enumerate(weights)
    ]


def digest(matrices: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(B.contiguous().numpy().tobytes() for B in matrices)).hexdigest()


class TestSameEverywhere:
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_stored_and_regenerated_give_the_same_matrices(self, distribution):
        assert_identical(some_matrices(Stored, distribution), some_matrices(Regenerated, distribution))

    @pytest.mark.parametrize("storage", STORAGES)
    def test_dfa_and_memdfa_have_the_same_matrices(self, storage):
        problem = BY_NAME["conv_pool"]
        drawn = []
        for rule in ("dfa", "memdfa"):
            made = make_rule(rule, problem, storage=storage)
            made.step(problem.x, problem.y)
            drawn.append([dense(made.feedback, i, 5, n) for i, n in enumerate((36, 6))])
        assert_identical(*drawn)

    @pytest.mark.parametrize(("kind", "distribution"), kinds_and_distributions())
    def test_the_global_generator_neither_matters_nor_moves(self, kind, distribution):
        expected = some_matrices(kind, distribution)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            before = torch.get_rng_state()
            assert_identical(some_matrices(kind, distribution), expected)
            assert torch.equal(torch.get_rng_state(), before)

    def test_another_process_draws_the_same(self):
        script = (
            "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.manual_seed(77); torch.randn(5)\n"
            "from test_feedback import *\n"
            "for kind, distribution in kinds_and_distributions(): print(digest(some_matrices(kind, distribution)))"
        )
        tests = __file__.rsplit("/", 1)[0]
        out = subprocess.run(
            [sys.executable, "-c", script, tests], check=True, capture_output=True, text=True, timeout=300
        )
        expected = [digest(some_matrices(*pair)) for pair in kinds_and_distributions()]
        assert out.stdout.split() == expected

    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_a_matrix_does_not_change_between_uses(self, kind):
        feedback = kind(1)
        assert_identical(dense(feedback), dense(feedback))

    @pytest.mark.parametrize("kind", INDEPENDENT)
    def test_a_matrix_does_not_depend_on_the_order_of_use(self, kind):
        first, second = kind(1), kind(1)
        forward = [dense(first, i) for i in (0, 1, 2)]
        backward = [dense(second, i) for i in (2, 1, 0)]
        assert_identical(forward, backward[::-1])

    @pytest.mark.parametrize(("kind", "distribution"), kinds_and_distributions())
    def test_float64_matrices_hold_the_float32_values(self, kind, distribution):
        wide = dense(kind(2, distribution), like=LIKE.double())
        narrow = dense(kind(2, distribution))
        assert wide.dtype == torch.float64
        if kind is Shared:  # scaled after the cast: one rounding apart
            torch.testing.assert_close(wide.float(), narrow, rtol=2e-7, atol=0)
        else:
            assert torch.equal(wide, narrow.double())

    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_a_use_in_half_precision_does_not_change_later_uses(self, kind):
        feedback = kind(2)
        dense(feedback, like=LIKE.bfloat16())
        assert torch.equal(dense(feedback), dense(kind(2)))

    def test_pinned_values(self):
        """Drawn once and written down: a change here breaks every saved Regenerated feedback."""
        got = {name: round(float(dense(Stored(0, name), 1, 4, 32)[2, 5]), 4) for name in DISTRIBUTIONS}
        assert got == PINNED


PINNED = {"he_normal": 0.3881, "normal": 0.2539, "uniform": 0.0687, "orthogonal": 0.1911}


class TestDifferentElsewhere:
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    @pytest.mark.parametrize("kind", INDEPENDENT)
    def test_each_seed_and_each_key_has_a_matrix_of_its_own(self, kind, distribution):
        size = (20, 20)
        drawn = [dense(kind(seed, distribution), i, *size) for seed in range(3) for i in range(3)]
        drawn += [
            kind(seed, distribution).weight(j, torch.zeros(size)).clone().t() for seed in range(3) for j in range(3)
        ]
        flat = torch.corrcoef(torch.stack([B.flatten() for B in drawn]))
        flat.fill_diagonal_(0)
        assert flat.abs().max() < 0.25  # 5 standard errors of 1 / sqrt(400)

    @pytest.mark.parametrize("distribution", SLICEABLE)
    def test_shared_has_another_matrix_for_each_seed(self, distribution):
        drawn = torch.stack([dense(Shared(seed, distribution), 0, 20, 20).flatten() for seed in range(3)])
        assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 0.25


def moments(B: Tensor) -> tuple[float, float, float]:
    """Return mean, standard deviation and kurtosis (3 for a normal)."""
    B = B.double()
    centred = B - B.mean()
    variance = (centred**2).mean()
    return float(B.mean()), float(variance.sqrt()), float((centred**4).mean() / variance**2)


# A normal cut at +-2: its variance and fourth moment, from the density phi and distribution function Phi.
PHI2 = math.exp(-2) / math.sqrt(2 * math.pi)
INSIDE = math.erf(2 / math.sqrt(2))
CUT_STD = math.sqrt(1 - 2 * 2 * PHI2 / INSIDE)
CUT_KURTOSIS = (3 - 2 * (2**3 + 3 * 2) * PHI2 / INSIDE) / CUT_STD**4


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", STORAGES.values())
class TestDistributions:
    """On 10 x 20,000 numbers: a standard error of the mean of 0.0022 std, of std 0.0016, of kurtosis about 0.01."""

    C, n = 10, 20_000

    def draw(self, kind: type[Feedback], distribution: str, scale: float) -> Tensor:
        return dense(kind(3, distribution, scale), 0, self.C, self.n)

    def check(self, B: Tensor, std: float, kurtosis: float) -> None:
        mean, got_std, got_kurtosis = moments(B)
        assert abs(mean) < 0.012 * std
        assert got_std == pytest.approx(std, rel=0.008)
        assert got_kurtosis == pytest.approx(kurtosis, abs=0.06)

    def test_he_normal_is_a_truncated_normal_of_variance_two_over_the_error_size(self, kind, scale):
        std = scale * math.sqrt(2 / self.C)
        B = self.draw(kind, "he_normal", scale)
        self.check(B, std, CUT_KURTOSIS)
        bound = 2 * std / CUT_STD  # two standard deviations of the normal that was cut
        assert 0.99 * bound < B.abs().max() <= bound * (1 + 1e-6)

    def test_normal_has_variance_one_over_the_error_size_and_long_tails(self, kind, scale):
        std = scale * math.sqrt(1 / self.C)
        B = self.draw(kind, "normal", scale)
        self.check(B, std, 3)
        assert B.abs().max() > 3.8 * std

    def test_uniform_lies_within_one_over_the_root_of_the_output_size(self, kind, scale):
        bound = scale / math.sqrt(self.n)
        B = self.draw(kind, "uniform", scale)
        self.check(B, bound / math.sqrt(3), 9 / 5)
        assert 0.999 * bound < B.abs().max() <= bound * (1 + 1e-6)


class TestDistributionsOfOtherShapes:
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    @pytest.mark.parametrize("shape", [(10, 300), (30, 12), (8, 8)])
    @pytest.mark.parametrize("kind", INDEPENDENT)
    def test_orthogonal_matrices_have_singular_values_all_one(self, kind, shape, scale):
        B = dense(kind(1, "orthogonal", scale), 0, *shape)
        values = torch.linalg.svdvals(B.double())
        assert values == pytest.approx(scale * torch.ones(min(shape)), abs=1e-5)

    def test_orthogonal_filters_are_orthogonal_too(self):
        B = Stored(1, "orthogonal").weight(0, torch.zeros(6, 3, 3, 3))
        assert torch.linalg.svdvals(B.flatten(1).double()) == pytest.approx(torch.ones(6), abs=1e-5)

    @pytest.mark.parametrize("kind", STORAGES.values())
    @pytest.mark.parametrize(
        ("shape", "fan_in"),
        [((50, 400), 50), ((400, 50), 400), ((64, 16, 5, 5), 16 * 25), ((64, 30, 9), 270), ((40, 10, 3, 3, 3), 270)],
    )
    def test_fa_matrices_have_the_weights_shape_and_the_authors_fan_in(self, kind, shape, fan_in):
        """He-normal; fan_in of a dense B is its first dimension, as W^T's stand-in, of filters their own fan_in."""
        B = kind(4).weight(0, torch.zeros(shape))
        assert B.shape == shape
        _, std, kurtosis = moments(B)
        assert std == pytest.approx(math.sqrt(2 / fan_in), rel=0.03)
        assert kurtosis == pytest.approx(CUT_KURTOSIS, abs=0.15)

    def test_shared_scales_each_block_for_itself(self):
        feedback = Shared(0, "uniform")
        large, small = dense(feedback, 0, 10, 4000), dense(feedback, 1, 10, 40)
        assert torch.allclose(small, large[:, :40] * 10, rtol=1e-6)


generator = Feedback._generator


class TestProject:
    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_the_signal_is_e_times_B_in_logical_order(self, kind):
        feedback = kind(0)
        e = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        B = dense(feedback, 2, 10, 24, e)
        by_hand = torch.zeros(4, 2, 3, 4, dtype=torch.float64)
        for c in range(2):
            for row in range(3):
                for column in range(4):
                    by_hand[:, c, row, column] = (e * B[:, (c * 3 + row) * 4 + column]).sum(1)
        for layout in (torch.contiguous_format, torch.channels_last):
            out = torch.empty(4, 2, 3, 4, dtype=torch.float64, memory_format=layout)
            signal = Signal(2, e, feedback).shaped_like(out)
            torch.testing.assert_close(signal, by_hand, rtol=1e-12, atol=1e-12)
            assert signal.stride() == out.stride()

    def test_an_error_of_more_dimensions_is_flattened(self):
        e = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(1))
        out = torch.empty(4, 7)
        signal, flat = (Signal(0, error, Stored(0)).shaped_like(out) for error in (e, e.flatten(1)))
        assert torch.equal(signal, flat)

    @pytest.mark.parametrize("examples", [3, 40])  # fewer than classes, and more
    @pytest.mark.parametrize("kind", STORAGES.values())
    def test_parts_of_the_batch_are_parts_of_the_whole_with_each_matrix_drawn_once(self, kind, examples, monkeypatch):
        drawn = []
        monkeypatch.setattr(Feedback, "_generator", lambda self, key: drawn.append(key) or generator(self, key))
        e = torch.randn(examples, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        out = torch.empty(examples, 2, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
        whole = Signal(2, e, kind(0)).shaped_like(out)
        drawn.clear()
        signal, parts = Signal(2, e, kind(0)), []
        for part in split(examples, 2, 1):
            signal = signal.reusable(24)
            parts.append(signal.of(part).shaped_like(out[part]))
        assert drawn == [drawn[0]]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)

    def test_stored_and_regenerated_give_the_same_parts_bit_for_bit(self):
        for examples in (3, 40):
            e = torch.randn(examples, 10, generator=torch.Generator().manual_seed(1))
            out = torch.empty(2, 50, 6, 6)
            one, other = (
                Signal(2, e, kind(0)).reusable(1800).of(slice(1, 3)).shaped_like(out) for kind in (Stored, Regenerated)
            )
            assert torch.equal(one, other)


class TestStorage:
    def test_stored_keeps_each_matrix_and_gives_it_again(self):
        feedback = Stored(0)
        sizes = (37, 20, 11)
        addresses = [feedback.dense(i, 10, n, LIKE).data_ptr() for i, n in enumerate(sizes)]
        assert [feedback.dense(i, 10, n, LIKE).data_ptr() for i, n in enumerate(sizes)] == addresses
        assert sum(B.numel() for B in feedback.matrices.values()) == 10 * sum(sizes)

    def test_regenerated_keeps_nothing(self):
        feedback = Regenerated(0)
        some = feedback.dense(0, 10, 37, LIKE)
        assert feedback.matrices == {}
        assert feedback.dense(0, 10, 37, LIKE).data_ptr() != some.data_ptr()

    def test_shared_keeps_one_matrix_as_large_as_the_largest_block(self):
        feedback = Shared(0)
        for i, n in enumerate((16, 320, 160)):
            feedback.dense(i, 10, n, LIKE)
        assert [B.numel() for B in feedback.matrices.values()] == [10 * 320]

    @pytest.mark.parametrize("distribution", SLICEABLE)
    def test_shared_does_not_change_when_a_larger_block_comes(self, distribution):
        for error_size in (1, 3, 10):
            for small, large in [(1, 2), (5, 17), (16, 33), (37, 1001), (300, 304)]:
                feedback = Shared(0, distribution)
                before = dense(feedback, 0, error_size, small)
                larger = dense(feedback, 1, error_size, large)
                assert torch.equal(dense(feedback, 0, error_size, small), before), (error_size, small, large)
                assert torch.equal(dense(Shared(0, distribution), 1, error_size, large), larger)

    @pytest.mark.parametrize("distribution", SLICEABLE)
    def test_shared_does_not_change_when_a_larger_weight_comes(self, distribution):
        for seed in range(5):
            feedback = Shared(seed, distribution)
            small, large = torch.zeros(3, 50), torch.zeros(4, 3, 9, 9)
            before = feedback.weight(0, small).clone()
            feedback.weight(1, large)
            assert torch.equal(feedback.weight(0, small), before)


class TestStateDict:
    @pytest.mark.parametrize(
        ("kind", "distribution"),
        [pytest.param(*pair) for pair in kinds_and_distributions()],
    )
    def test_a_loaded_feedback_has_the_same_matrices_also_those_not_yet_drawn(self, kind, distribution, tmp_path):
        first = kind(8, distribution, 0.3)
        drawn = [dense(first, 0), dense(first, 1, 10, 100)]
        torch.save(first.state_dict(), tmp_path / "feedback.pt")
        second = kind(1, "normal", 2.0)
        dense(second, 0)
        second.load_state_dict(torch.load(tmp_path / "feedback.pt", weights_only=True))
        assert_identical([dense(second, 0), dense(second, 1, 10, 100)], drawn)
        assert_identical(dense(second, 2, 10, 999), dense(first, 2, 10, 999))
        assert (second.seed, second.distribution, second.scale) == (8, distribution, 0.3)

    def test_stored_matrices_are_saved_themselves(self):
        """So that a matrix set by hand, or drawn by another torch, survives."""
        first, second = Stored(0), Stored(0)
        first.dense(0, 10, 37, LIKE).mul_(3)
        second.load_state_dict(first.state_dict())
        assert torch.equal(dense(second), dense(Stored(0)) * 3)
        first.dense(0, 10, 37, LIKE).zero_()
        assert dense(second).abs().sum() > 0

    @pytest.mark.parametrize("ours", STORAGES.values())
    @pytest.mark.parametrize("theirs", STORAGES.values())
    def test_a_state_of_another_kind_is_refused_and_changes_nothing(self, ours, theirs):
        if ours is theirs:
            return
        feedback, other = ours(1), theirs(2, "normal", 3.0)
        before, _ = dense(feedback), dense(other)
        with refuses(ValueError, theirs.__name__, ours.__name__, f"ml.feedback.{theirs.__name__}()"):
            feedback.load_state_dict(other.state_dict())
        assert (feedback.seed, feedback.distribution, feedback.scale) == (1, "he_normal", 1.0)
        assert torch.equal(dense(feedback), before)


@pytest.mark.parametrize("kind", STORAGES.values())
class TestRefused:
    def test_an_unknown_distribution(self, kind):
        with refuses(ValueError, "'cauchy'", *DISTRIBUTIONS):
            kind(0, "cauchy")

    @pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None])
    def test_a_seed_that_is_not_a_whole_number_from_zero_on(self, kind, seed):
        with refuses(ValueError, "seed must be a whole number"):
            kind(seed)

    @pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
    def test_a_scale_that_is_not_a_finite_number_above_zero(self, kind, scale):
        with refuses(ValueError, "scale must be"):
            kind(0, "normal", scale)


def test_shared_refuses_orthogonal_and_says_what_to_use():
    with refuses(ValueError, "Stored", "Regenerated"):
        Shared(0, "orthogonal")
