"""The O(1) bilateral filter against sums over the window in numpy, with the power of a cosine and with the Gaussian."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from reference import refuses

from memdfa_lab.neighbours.bilateral import Bilateral, box, terms_for


def images(*shape, seed=0):
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_numpy(f, radius, g):
    """Return the filter with the range kernel g, pixel by pixel."""
    out = np.zeros_like(f)
    for x in np.ndindex(f.shape):
        window = f[tuple(slice(max(0, i - radius), i + radius + 1) for i in x)]
        weights = g(window - f[x])
        out[x] = (weights * window).sum() / weights.sum()
    return out


@pytest.mark.parametrize("radius", [1, 2, 5, 30])
@pytest.mark.parametrize("shape", [(7, 9), (2, 3, 4, 6), (1, 5)], ids=str)
def test_box_sums_what_is_in_the_window(shape, radius):
    t = images(*shape)
    expected = np.zeros(shape)
    for *lead, i, j in np.ndindex(shape):
        rows, columns = (slice(max(0, k - radius), k + radius + 1) for k in (i, j))
        expected[(*lead, i, j)] = t.numpy()[(*lead, rows, columns)].sum()
    np.testing.assert_allclose(box(t, radius), expected, rtol=1e-12)


@pytest.mark.parametrize("terms", [1, 2, 5, 20])
@pytest.mark.parametrize("radius", [1, 3])
def test_it_is_the_filter_with_the_power_of_a_cosine(radius, terms):
    f, sigma = images(8, 11), 0.8  # so that the cosine does not come back, nor vanish
    found = Bilateral(radius, sigma, terms)(f)
    expected = by_numpy(f.numpy(), radius, lambda s: np.cos(s / (sigma * np.sqrt(terms))) ** terms)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("sigma", [0.15, 0.3])
def test_direct_is_the_definition_and_the_error_falls_as_terms_grow(sigma):
    f = images(10, 12)
    expected = by_numpy(f.numpy(), 2, lambda s: np.exp(-(s**2) / (2 * sigma**2)))
    np.testing.assert_allclose(Bilateral(2, sigma).direct(f), expected, rtol=1e-12)
    least = terms_for(sigma)
    errors = [
        (Bilateral(2, sigma, n)(f) - torch.from_numpy(expected)).abs().max().item() for n in least * 2 ** np.arange(5)
    ]
    for one, other in pairwise(errors):
        assert other < 0.65 * one  # about half: the next term of the series is of order 1 / N
    assert errors[-1] < 0.01


def test_each_image_and_channel_is_filtered_by_itself_in_its_dtype():
    f = images(2, 3, 6, 6)
    whole = Bilateral()(f)
    for i, c in np.ndindex(2, 3):
        torch.testing.assert_close(whole[i, c], Bilateral()(f[i, c]))
    assert Bilateral()(f.float()).dtype is torch.float32
    torch.testing.assert_close(Bilateral()(f.float()), whole.float(), rtol=1e-5, atol=1e-5)


def test_a_level_image_stays_an_edge_stays_and_noise_beside_it_goes():
    level = torch.full((9, 9), 0.3)
    torch.testing.assert_close(Bilateral()(level), level)
    edge = torch.cat([torch.zeros(12, 6), torch.ones(12, 6)], 1)
    noisy = edge + 0.02 * (images(12, 12).float() - 0.5)
    clean = Bilateral(sigma=0.1, terms=200)(noisy)
    assert (clean - edge).abs().max() < 0.015
    assert (clean - edge).norm() < 0.5 * (noisy - edge).norm()


@pytest.mark.parametrize("sigma", [0.1, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("top", [1.0, 2.0, 255.0])
def test_values_as_wide_as_the_spread_are_filtered_and_wider_ones_refused(sigma, top):
    """Two pixels at the ends of the range: neither has a negative weight for the other, so that the mean is between."""
    spread, sigma = top, sigma * top
    f = images(9, 9) * spread
    f[4, 4:6] = torch.tensor([0.0, spread])
    chosen = Bilateral(2, sigma, spread=spread)
    out = chosen(f)
    assert 0 <= out.min() <= out.max() <= spread
    assert (out - chosen.direct(f)).abs().max() < 0.1 * spread
    with refuses(ValueError, "values of a channel differ by", f"{3 * spread:.4g}", "a larger spread"):
        chosen(torch.stack([f, 3 * f]))
    assert torch.isfinite(Bilateral(2, sigma, spread=3 * spread)(3 * f)).all()


def test_a_pixel_unlike_its_many_neighbours_is_filtered_in_any_window():
    f = torch.zeros(150, 150)  # in float32, whose running sums would be off by 3e-4
    f[75, 75], f[10, 10] = 1, 0.99
    weights = torch.exp(-((f - 1) ** 2) / (2 * 0.1**2))  # those of this pixel, whose window is the whole image
    exact = (weights * f).sum() / weights.sum()
    torch.testing.assert_close(Bilateral(150, 0.1)(f)[75, 75], exact, rtol=0, atol=1e-5)


def test_bad_input_is_refused_in_one_line():
    for settings, hint in (
        ({"radius": 0}, "radius"),
        ({"sigma": 0}, "sigma"),
        ({"terms": 0}, "terms"),
        ({"spread": -1}, "spread"),
    ):
        with refuses(ValueError, f"{hint} must be"):
            Bilateral(**settings)
    for method in (Bilateral(), Bilateral().direct):
        with refuses(TypeError, "images must be a tensor of floats", ".float()"):
            method(torch.ones(3, 3, dtype=torch.uint8))
        with refuses(TypeError, "list"):
            method([[1.0]])
        with refuses(ValueError, "(..., H, W)", "(3,)"):
            method(torch.ones(3))
        for bad in (torch.nan, torch.inf):
            with refuses(ValueError, "NaN or inf", "nan_to_num"):
                method(images(5, 5).index_fill(0, torch.tensor([2]), bad))
    with refuses(ValueError, "differ by 255"):
        Bilateral()(torch.tensor([[0.0, 255.0]]))
    with refuses(ValueError, "sigma must be"):
        terms_for(0)
    with refuses(ValueError, "spread must be"):
        terms_for(0.1, -1)
    with refuses(ValueError, "radius must be"):
        box(torch.ones(3, 3), -1)
    with refuses(ValueError, "dimensions of t (..., H, W)"):
        box(torch.ones(3), 1)
