"""Scale model: weights, symmetry, harmonics, and recovery of known scales."""

from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from scipy import special
from simulated_merge import DAMAGE, FRAME_WIDTH, simulate

from braggflux.merge.data.scale_features import scale_features
from braggflux.merge.engine.amplitudes import merged_amplitudes
from braggflux.merge.engine.config import MergeConfig
from braggflux.merge.scale.rotation import ScaleModel


@pytest.fixture(scope="module")
def experiment():
    return simulate(d_min=5.0)


def features(experiment, table=None, **changes):
    table = table or experiment.table.metadata
    return scale_features(table, [experiment.n_frames], [FRAME_WIDTH], MergeConfig(**changes))


def test_frame_weights_sum_to_one(experiment):
    weight = features(experiment).frame_weight
    torch.testing.assert_close(weight.sum(1), torch.ones(len(weight)).double())
    assert (weight >= 0).all()


@pytest.mark.parametrize("z", [-7.0, -0.3, 0.0, 3.2, 5.999, 359.7, 360.4])
def test_frame_weights_follow_the_rocking_curve(experiment, z):
    """Each frame has the Gaussian's integral over it, renormalised to the scan."""
    row = experiment.table.metadata[:1]
    xyz = row.xyz_px.clone()
    xyz[0, 2] = z
    sigma = 0.7
    row = replace(row, xyz_px=xyz, frame_sigma=torch.tensor([(sigma**2 + 1 / 12) ** 0.5]))
    found = features(experiment, row)
    z = float(xyz[0, 2])  # as float32 holds it
    edges = special.ndtr((np.arange(experiment.n_frames + 1) - z) / sigma)
    expected = np.diff(edges)
    if expected.sum() < 1e-8:
        expected = np.zeros(experiment.n_frames)
        expected[0 if z < 0 else -1] = 1.0
    expected /= expected.sum()
    dense = np.zeros(experiment.n_frames)
    np.add.at(dense, found.frame[0].numpy(), found.frame_weight[0].numpy())
    np.testing.assert_allclose(dense, expected, atol=1e-6)


def test_frames_of_sweeps_do_not_mix(experiment):
    table = experiment.table.metadata[:50]
    table = replace(table, experiment=torch.arange(50) % 2)
    n = experiment.n_frames
    found = scale_features(table, [n, n], [FRAME_WIDTH] * 2, MergeConfig())
    assert (found.frame[0::2] < n).all()
    assert (found.frame[1::2] >= n).all()
    # B of the other sweep only shifts the mean
    half = found.b_design.shape[1] // 2
    inv_d2 = table.d.double() ** -2
    per_b = found.b_design[0::2, half:] / (inv_d2 - inv_d2.mean())[0::2, None]
    torch.testing.assert_close(per_b, per_b[:1].expand_as(per_b))


def test_b_factor_is_piecewise_linear_with_mean_zero(experiment):
    design = features(experiment).b_design
    b = torch.linspace(1, 5, design.shape[1], dtype=torch.float64).sin()
    along = np.interp(experiment.table.metadata.xyz_px[:, 2], np.linspace(0, 360, 37), b)
    inv_d2 = experiment.table.metadata.d.double().numpy() ** -2
    expected = -0.5 * (along - along.mean()) * (inv_d2 - inv_d2.mean())
    np.testing.assert_allclose(design @ b, expected, atol=1e-8)


def test_reversed_path_has_the_same_absorption(experiment):
    """The Friedel mate measured along (s0, s1) -> (-s1, -s0) crosses the same matter."""
    table = experiment.table.metadata
    mate = replace(table, s0_crystal=-table.s1_crystal, s1_crystal=-table.s0_crystal)
    for order in (1, 3, 4, 6):
        ours = features(experiment, absorption_order=order).harmonics
        theirs = features(experiment, mate, absorption_order=order).harmonics
        assert torch.equal(ours, theirs)
        assert ours.shape[1] == (order + 1) ** 2 - 1


def test_untrained_scale_is_the_lorentz_polarization_factor(experiment):
    model = ScaleModel(features(experiment), MergeConfig())
    rows = torch.tensor([3, 0, 77])
    expected = -experiment.table.metadata.lp[rows].double().log()
    torch.testing.assert_close(model(rows), expected)


def test_network_alone(experiment):
    model = ScaleModel(features(experiment), MergeConfig(physical_scale=False))
    with torch.no_grad():
        model.log_frame_scale.fill_(5.0)
    rows = torch.arange(10)
    torch.testing.assert_close(model(rows), -experiment.table.metadata.lp[:10].double().log())


def test_gradients(experiment):
    model = ScaleModel(features(experiment), MergeConfig())
    rows = torch.arange(0, 200, 9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    value = lambda: model(rows).sin().sum() + 1e-3 * model.penalty()  # noqa: E731
    value().backward()
    for p in model.parameters():
        k = int(p.grad.abs().argmax())
        flat, step = p.data.view(-1), 1e-6
        with torch.no_grad():
            flat[k] += step
            high = value().item()
            flat[k] -= 2 * step
            low = value().item()
            flat[k] += step
        ours = p.grad.view(-1)[k].item()
        assert ours == pytest.approx((high - low) / (2 * step), rel=1e-4, abs=1e-6)


def test_penalty_is_the_log_prior(experiment):
    """Differences of the penalty against SciPy-free Gaussian log-densities."""
    model = ScaleModel(features(experiment), MergeConfig(scale_network_width=0))
    rest = model.penalty().item()
    with torch.no_grad():
        model.b_factor[3] = 2.0
        model.absorption[1] = 0.1
        # a straight drift with flicker of alternating sign about it
        n, knots = experiment.n_frames, len(model.drift)
        flicker = 0.002 * (-1.0) ** torch.arange(n)
        middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        model.drift[:] = 0.004 * torch.arange(knots)
        model.log_frame_scale[:] = 0.004 * (knots - 1) * middle + flicker
    mean = 0.5 * (float(model.log_frame_scale.detach().mean()) / 0.1) ** 2
    walk = 0.5 * (n * 0.002**2 + (knots - 1) * 0.004**2) / 0.03**2
    bends = 0.5 * (2.0**2 + 4.0**2 + 2.0**2) / 0.1**2  # second differences of one knot at 2
    expected = (
        bends + 0.5 * (2 / model.b_sd) ** 2 + 0.5 * (0.1 / model.harmonic_sd) ** 2 + walk + mean
    )
    assert model.penalty().item() - rest == pytest.approx(expected, rel=tolerances.SCIPY)


def test_frame_scales_are_recovered(fitted):
    """Frame scales stand for the mean 1/d^2: the rest of the simulated damage is B's."""
    n = fitted.experiment.n_frames
    inv_d2 = fitted.experiment.table.metadata.d.numpy() ** -2.0
    damage = DAMAGE * (np.arange(n) + 0.5) / n * inv_d2.mean() / 2
    true = fitted.experiment.truth.log_frame_scale - damage
    found = fitted.merger.scale.log_frame_scale.detach().numpy()
    assert np.corrcoef(true, found)[0, 1] > 0.99


def test_damage_is_recovered(fitted):
    b = fitted.merger.scale.b_factor.detach().numpy()
    slope = np.polyfit(np.linspace(0, 1, len(b)), b, 1)[0]
    assert slope == pytest.approx(DAMAGE, abs=0.5)


def test_scales_are_recovered(fitted):
    """Frames, damage and absorption together; 25 observations a frame at 3 % each."""
    assert fitted.scale_error.std() < 0.013


def test_bijvoet_differences_are_not_absorbed(fitted):
    """Fitted on true differences: slope 1 within 3 %, and the residual is what sigma says."""
    asu = fitted.experiment.asu
    merged = merged_amplitudes(fitted.merger, fitted.experiment.batch)
    plus = np.flatnonzero((asu.friedel_sign > 0) & ~asu.is_centric)
    minus = asu.friedel_mate[plus]
    both = fitted.is_seen[plus] & fitted.is_seen[minus]
    plus, minus = plus[both], minus[both]
    intensity = fitted.amplitude**2 * fitted.output_factor
    true = intensity[plus] - intensity[minus]
    found = (merged.intensity[plus] - merged.intensity[minus]).numpy()
    sigma = np.hypot(merged.sigma_intensity[plus], merged.sigma_intensity[minus])
    weight = sigma**-2.0
    slope = (weight * true * found).sum() / (weight * true**2).sum()
    assert slope == pytest.approx(1.0, abs=0.03)
    assert ((found - true) / sigma).std() == pytest.approx(1.0, abs=0.15)
