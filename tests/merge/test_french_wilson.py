"""French-Wilson amplitudes against quadrature, another implementation and the published table."""

import importlib
import warnings

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from braggflux.merge.output.french_wilson import french_wilson


def ours(intensity, sigma, expected, centric):
    columns = np.broadcast_arrays(intensity, sigma, expected, centric)
    arguments = [torch.as_tensor(np.ascontiguousarray(c, dtype=float)) for c in columns[:3]]
    is_centric = torch.as_tensor(np.ascontiguousarray(columns[3]))
    mean, sd = french_wilson(*arguments, is_centric)
    return np.squeeze(mean.numpy()), np.squeeze(sd.numpy())


def quadrature(intensity: float, sigma: float, expected: float, centric: bool):
    """Moments of F by adaptive quadrature over F, the exponent's maximum taken out."""
    slope = 0.5 / expected if centric else 1 / expected
    centre = intensity - slope * sigma**2

    def log_p(f):
        return -0.5 * ((f * f - centre) / sigma) ** 2 + (0 if centric else np.log(f))

    width = sigma / np.sqrt(max(centre, sigma)) if centre > 0 else np.sqrt(sigma)
    decay = np.sqrt(sigma**2 / max(-centre, sigma))
    peak = np.sqrt(max(centre, 0.0))
    high = peak + 12 * width if centre > 0 else 9 * max(decay, 0) + 1e-12
    low = max(peak - 12 * width, 1e-9)
    grid = np.linspace(low, high, 2001)
    top = log_p(grid).max()
    moment = lambda k: integrate.quad(  # noqa: E731
        lambda f: f**k * np.exp(log_p(f) - top), low, high, limit=500, points=[max(peak, low)]
    )[0]
    norm, first, second = (moment(k) for k in range(3))
    return first / norm, np.sqrt(second / norm - (first / norm) ** 2)


@pytest.mark.parametrize("centric", [False, True])
@pytest.mark.parametrize("expected", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("h", [-40.0, -8.0, -4.0, -1.0, 0.0, 0.5, 2.0, 8.0, 100.0])
def test_equals_quadrature(h, expected, centric):
    mean, sd = ours(h, 1.0, expected, centric)
    exact_mean, exact_sd = quadrature(h, 1.0, expected, centric)
    assert mean == pytest.approx(exact_mean, rel=2e-3)
    assert sd == pytest.approx(exact_sd, rel=1e-2)


@pytest.mark.parametrize("centric", [False, True])
def test_equals_reciprocalspaceship(centric):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its pandas complains of the system's bottleneck
        reference = importlib.import_module(
            "reciprocalspaceship.algorithms.scale_merged_intensities"
        )
    rng = np.random.default_rng(0)
    expected = 10 ** rng.uniform(0, 3, 200)
    # its nodes span 20 sigma and miss the posterior where sigma is far above Sigma
    sigma = expected * 10 ** rng.uniform(-2, 0.3, 200)
    intensity = rng.gamma(1.0, expected) + sigma * rng.normal(size=200)
    flags = np.full(200, centric)
    _, _, f, sigma_f = reference._french_wilson_posterior_quad(
        intensity, sigma, expected, flags, 200
    )
    mean, sd = ours(intensity, sigma, expected, flags)
    np.testing.assert_allclose(mean, f, rtol=5e-3)
    np.testing.assert_allclose(sd, sigma_f, rtol=3e-2)


# French & Wilson (1978), Acta Cryst. A34, 517, table 1, for sigma = 1 and Sigma = 20:
# I, acentric <F> and sigma(F), centric <F> and sigma(F).
PUBLISHED = [
    (-3.0, 0.472, 0.238, 0.304, 0.226),
    (-2.0, 0.545, 0.268, 0.355, 0.260),
    (-1.0, 0.650, 0.305, 0.435, 0.308),
    (0.0, 0.812, 0.347, 0.574, 0.373),
    (1.0, 1.056, 0.376, 0.824, 0.444),
    (2.0, 1.372, 0.360, 1.216, 0.447),
    (3.0, 1.691, 0.307, 1.623, 0.352),
    (4.0, 1.987, 0.252, 1.938, 0.274),
    (5.0, 2.225, 0.225, 2.194, 0.233),
    (6.0, 2.439, 0.205, 2.417, 0.210),
    (10.0, 3.154, 0.159, 3.146, 0.160),
    (20.0, 4.467, 0.112, 4.465, 0.112),
    (50.0, 7.068, 0.071, 7.068, 0.071),
]
# The same authors' supplement, as cctbx tabulates it: h = I / sigma - sigma / Sigma (acentric) or
# I / sigma - sigma / (2 Sigma) (centric), and the same four columns in units of sigma^(1/2).
SUPPLEMENT = [
    (-4.0, 0.423, 0.216, 0.269, 0.203),
    (-2.0, 0.549, 0.269, 0.356, 0.261),
    (0.0, 0.822, 0.349, 0.578, 0.375),
    (1.0, 1.070, 0.376, 0.832, 0.445),
    (3.0, 1.706, 0.304, 1.632, 0.349),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_equals_the_published_table(row):
    """From I = 4 on the table holds the root of h, 0.8 % above the mean; below it, quadrature."""
    for centric, expected in ((False, row[1:3]), (True, row[3:])):
        found = ours(row[0], 1.0, 20.0, centric)
        np.testing.assert_allclose(found, expected, atol=0.018 if row[0] >= 4 else 0.005)
        np.testing.assert_allclose(found, quadrature(row[0], 1.0, 20.0, centric), rtol=2e-3)


@pytest.mark.parametrize("row", SUPPLEMENT)
def test_equals_the_supplement_whatever_sigma_is(row):
    for sigma in (0.3, 40.0):
        for centric, expected in ((False, row[1:3]), (True, row[3:])):
            wilson = 20.0 * sigma
            intensity = sigma * (row[0] + (0.5 if centric else 1.0) * sigma / wilson)
            found = np.array(ours(intensity, sigma, wilson, centric)) / sigma**0.5
            # centric entries are up to 0.004 below the exact quadrature of the test above
            np.testing.assert_allclose(found, expected, atol=0.005)


@pytest.mark.parametrize("centric", [False, True])
def test_strong_data_are_the_square_root(centric):
    mean, sd = ours(1e4, 10.0, 5e3, centric)
    assert mean == pytest.approx(100.0, rel=1e-3)
    assert sd == pytest.approx(10.0 / (2 * 100.0), rel=1e-2)


@pytest.mark.parametrize(
    ("centric", "mean"), [(False, (np.pi / 4) ** 0.5), (True, (2 / np.pi) ** 0.5)]
)
def test_no_data_give_wilson(centric, mean):
    value, sd = ours(0.0, 1e4, 1.0, centric)
    assert value == pytest.approx(mean, rel=5e-3)
    assert sd == pytest.approx((1 - mean**2) ** 0.5, rel=2e-2)


def test_any_scale_of_the_data():
    """F scales as the root of the units of I, from photons to megaphotons."""
    h = np.array([-3.0, 0.1, 4.0, 30.0])
    flags = np.array([False, True, False, True])
    reference = ours(h, 1.0, 10.0, flags)
    for unit in (1e-6, 1e6):
        found = ours(h * unit, unit, 10.0 * unit, flags)
        np.testing.assert_allclose(found[0], reference[0] * unit**0.5, rtol=1e-9)
        np.testing.assert_allclose(found[1], reference[1] * unit**0.5, rtol=1e-7)


def test_bias_free_on_data_drawn_from_the_prior():
    """Bayes is calibrated on average over the prior: <E[F | I]> = <F>."""
    rng = np.random.default_rng(3)
    intensity = rng.gamma(1.0, 10.0, 20_000)
    measured = intensity + 5.0 * rng.normal(size=len(intensity))
    mean, sd = ours(measured, 5.0, 10.0, False)
    z = (mean - np.sqrt(intensity)) / sd
    assert abs((mean - np.sqrt(intensity)).mean()) < 5 * np.sqrt(intensity).std() / 20_000**0.5
    assert (z**2).mean() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("centric", [False, True])
@pytest.mark.parametrize("sigma_a", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("e_calc", [0.2, 1.0, 2.5])
@pytest.mark.parametrize(
    ("intensity", "sigma"), [(-1.0, 2.0), (6.0, 2.0), (30.0, 3.0), (5.0, 40.0)]
)
def test_prior_about_a_model_equals_quadrature(intensity, sigma, e_calc, sigma_a, centric):
    """Rice's law or the folded normal about D F_calc, by SciPy's own densities."""
    expected = 10.0
    centre, variance = sigma_a * e_calc * expected**0.5, (1 - sigma_a**2) * expected
    width = (variance if centric else variance / 2) ** 0.5
    prior = (stats.foldnorm if centric else stats.rice)(centre / width, scale=width)
    f = np.linspace(1e-6, 12 * expected**0.5, 200_001)
    log_p = prior.logpdf(f) - 0.5 * ((f**2 - intensity) / sigma) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * f).sum()
    given = [torch.tensor([x], dtype=torch.float64) for x in (intensity, sigma, expected)]
    model = tuple(torch.tensor([x], dtype=torch.float64) for x in (centre, variance))
    found, spread = french_wilson(*given, torch.tensor([centric]), model)
    assert float(found) == pytest.approx(mean, rel=2e-3)
    assert float(spread) == pytest.approx((p * (f - mean) ** 2).sum() ** 0.5, rel=1e-2)


@pytest.mark.parametrize("centric", [False, True])
def test_without_a_model_or_belief_in_it_the_prior_is_wilsons(centric):
    given = [torch.tensor([x, x], dtype=torch.float64) for x in (3.0, 2.0, 10.0)]
    flags = torch.tensor([centric, centric])
    centre = torch.tensor([torch.nan, 0.0], dtype=torch.float64)
    variance = torch.tensor([torch.nan, 10.0], dtype=torch.float64)
    found = french_wilson(*given, flags, (centre, variance))
    for a, b in zip(found, french_wilson(*given, flags), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=0.0)
