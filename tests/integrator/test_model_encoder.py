"""The encoder: what it sees are derivatives, and an empty box tells it nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import Spot, gaussian_voxels, make_integrator, poisson_boxes, spot_metadata
from torch.distributions import kl_divergence

from braggflux.integrator.model.encoder import EXPONENTS, N_MOMENTS, ProfileEncoder, score_moments

# voxels well below the spot's width, so that a voxel's centre stands for all of it
FINE = Spot(sigma_x_px=2.5, sigma_y_px=2.5, sigma_m_deg=0.25, box=(15, 15, 15))


def boxes(n: int, brightness: float, level: float = 0.3, seed: int = 0, spot: Spot = FINE):
    rng = np.random.default_rng(seed)
    data = spot_metadata(n, rng, spot)
    return poisson_boxes(brightness * gaussian_voxels(data, spot) + level, data, rng)


def randomised(integrator):
    """The same integrator with networks that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for module in (integrator.encoder, integrator.profile_prior):
            for parameter in module.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return integrator


def test_moments_equal_the_explicit_sum():
    residual = torch.randn(3, 4, 5, 6)
    c = [torch.randn(3, n) for n in (4, 5, 6)]
    found = score_moments(residual, tuple(c))
    assert found.shape == (3, N_MOMENTS)
    for k, (i, j, l) in enumerate(EXPONENTS):
        weight = torch.einsum("bd,bh,bw->bdhw", c[0] ** i, c[1] ** j, c[2] ** l)
        torch.testing.assert_close(
            found[:, k], (weight * residual).sum((1, 2, 3)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(("latent", "exponent"), [(0, (0, 0, 1)), (1, (0, 1, 0)), (2, (1, 0, 0))])
def test_first_moments_are_derivatives_by_the_shift(latent, exponent):
    """M against autograd of sum_p n log r - r by the latent that shifts along that axis."""
    batch = boxes(40, 800.0)
    integrator = make_integrator(batch.metadata, FINE, 0.3)
    weights = integrator.profile.grid.voxel_weights(batch.metadata)
    z = torch.zeros(40, integrator.profile.n_latent, requires_grad=True)
    background = integrator.mean_background(batch.metadata).flatten(1)
    typical = integrator.profile.node_weights(z.detach())
    moments, _, start = integrator._encode_inputs(batch, weights, typical, background, None)
    rate = start[:, :1] * integrator.profile(weights, z).flatten(1) + background
    log_likelihood = (batch.counts.flatten(1) * rate.log() - rate).sum()
    exact = torch.autograd.grad(log_likelihood, z)[0][:, latent]
    ours = moments[:, EXPONENTS.index(exponent)]
    slope = (ours @ exact / (exact @ exact)).item()
    correlation = np.corrcoef(ours, exact)[0, 1]
    # the axes' coordinates are clamped at 3 in the basis and 4 here, and voxels are not points
    assert slope == pytest.approx(1.0, abs=0.1)
    assert correlation > 0.99


def test_second_moments_follow_the_derivative_by_the_width():
    batch = boxes(40, 800.0)
    integrator = make_integrator(batch.metadata, FINE, 0.3)
    weights = integrator.profile.grid.voxel_weights(batch.metadata)
    z = torch.zeros(40, integrator.profile.n_latent, requires_grad=True)
    background = integrator.mean_background(batch.metadata).flatten(1)
    typical = integrator.profile.node_weights(z.detach())
    moments, _, start = integrator._encode_inputs(batch, weights, typical, background, None)
    rate = start[:, :1] * integrator.profile(weights, z).flatten(1) + background
    exact = torch.autograd.grad((batch.counts.flatten(1) * rate.log() - rate).sum(), z)[0]
    second = moments[:, EXPONENTS.index((0, 0, 2))] - moments[:, EXPONENTS.index((0, 0, 0))]
    assert np.corrcoef(0.5 * second, exact[:, 3])[0, 1] > 0.98


@pytest.mark.parametrize("case", ["zero counts", "all masked"])
def test_an_empty_box_gets_the_prior_exactly(case):
    batch = boxes(5, 0.0)
    counts = torch.zeros_like(batch.counts)
    is_valid = torch.full_like(batch.is_valid, case == "zero counts")
    batch = replace(batch, counts=counts, is_valid=is_valid)
    posterior = randomised(make_integrator(batch.metadata, FINE, 0.3)).inference(batch)
    q, p = posterior.q_profile.base_dist, posterior.p_profile.base_dist
    torch.testing.assert_close(q.loc, p.loc, rtol=0, atol=0)
    torch.testing.assert_close(q.scale, p.scale, rtol=1e-6, atol=0)
    kl = kl_divergence(posterior.q_profile, posterior.p_profile)
    torch.testing.assert_close(kl, torch.zeros(5), rtol=0, atol=1e-5)


def test_bright_spots_narrow_the_posterior():
    encoder = ProfileEncoder(12, 12, 16)
    prior = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(4, 12), torch.full((4, 12), 0.2)), 1
    )
    information = torch.tensor([0.0, 10.0, 1e3, 1e6])
    q = encoder(torch.zeros(4, N_MOMENTS), information, torch.zeros(4, 12), prior)
    scale = q.base_dist.scale.detach()
    assert (scale.diff(dim=0) < 0).all()
    # as 1 / sqrt(information) once that outweighs the prior; 2 %: the untrained network
    ratio = (scale[3] / scale[2]).mean().item()
    expected = ((1 + 1e3 / np.exp(4.0)) / (1 + 1e6 / np.exp(4.0))) ** 0.5
    assert ratio == pytest.approx(expected, rel=0.02)


def test_permutation_of_the_batch_permutes_the_output():
    batch = boxes(12, 300.0, spot=Spot())
    integrator = randomised(make_integrator(batch.metadata, Spot(), 0.3))
    order = torch.randperm(12)
    plain, shuffled = integrator.inference(batch), integrator.inference(batch[order])
    for name in ("loc", "scale"):
        torch.testing.assert_close(
            getattr(plain.q_profile.base_dist, name)[order],
            getattr(shuffled.q_profile.base_dist, name),
            rtol=1e-4,
            atol=1e-5,
        )
    torch.testing.assert_close(
        plain.likelihood.mode[order], shuffled.likelihood.mode, rtol=1e-4, atol=1e-2
    )


def test_masked_voxels_are_not_read():
    """Whatever stands in a voxel that is not valid, the posterior is the same."""
    batch = boxes(6, 300.0, spot=Spot())
    is_valid = torch.rand_like(batch.counts) > 0.2
    integrator = randomised(make_integrator(batch.metadata, Spot(), 0.3))
    clean = replace(batch, counts=batch.counts * is_valid, is_valid=is_valid)
    dirty = replace(clean, counts=torch.where(is_valid, batch.counts, 65535.0))
    expected, found = integrator.inference(clean), integrator.inference(dirty)
    torch.testing.assert_close(found.q_profile.mean, expected.q_profile.mean)
    torch.testing.assert_close(found.likelihood.mode, expected.likelihood.mode)
    ours, theirs = integrator.loss(dirty, found), integrator.loss(clean, expected)
    torch.testing.assert_close(ours.log_evidence, theirs.log_evidence)
