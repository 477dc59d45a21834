"""Tensor of the mean intensity: which ones symmetry allows, and that the merge finds it."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch
from simulated_merge import simulate
from simulated_priors import crystal, fitted, observe

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import rotations
from braggflux.merge.config import MergeConfig
from braggflux.merge.fit.training import start
from braggflux.merge.prior.anisotropy import B_SD, anisotropic_design, invariant_tensors
from braggflux.merge.prior.wilson import Wilson
from braggflux.merge.rows import UniqueRows

CRYSTALS = [
    ("P 1", (40, 50, 60, 80, 95, 105), 5),
    ("P 1 21 1", (40, 50, 60, 90, 105, 90), 3),
    ("P 1 1 21", (40, 50, 60, 90, 90, 105), 3),
    ("C 2 2 21", (40, 50, 60, 90, 90, 90), 2),
    ("P 43 21 2", (79, 79, 38, 90, 90, 90), 1),
    ("P 61 2 2", (93, 93, 130, 90, 90, 120), 1),
    ("R 3 2:H", (60, 60, 90, 90, 90, 120), 1),
    ("R 3 2:R", (60, 60, 60, 80, 80, 80), 1),
    ("P 2 3", (50, 50, 50, 90, 90, 90), 0),
]


@pytest.mark.parametrize(("name", "cell", "n_free"), CRYSTALS)
def test_tensors_are_those_that_symmetry_allows(name, cell, n_free):
    cell, group = gemmi.UnitCell(*cell), gemmi.SpaceGroup(name)
    tensors = invariant_tensors(cell, group)
    assert tensors.shape == (n_free, 3, 3)
    # gemmi lists the constrained ADPs, the isotropic one among them
    allowed = np.array(gemmi.adp_symmetry_constraints(group))
    assert len(allowed) == n_free + 1
    to_hkl = np.array(cell.frac.mat.tolist())
    index = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])
    for b in tensors:
        u_star = (to_hkl @ b @ to_hkl.T)[index]
        rest = u_star - allowed.T @ np.linalg.lstsq(allowed.T, u_star, rcond=None)[0]
        assert np.abs(rest).max() < 1e-9 * np.abs(u_star).max()
        assert abs(np.trace(b)) < 1e-9
    gram = np.einsum("aij,bij->ab", tensors, tensors)
    np.testing.assert_allclose(gram, np.eye(n_free), atol=1e-9)


@pytest.mark.parametrize(("name", "cell", "n_free"), CRYSTALS)
def test_equivalent_reflections_have_one_sigma(name, cell, n_free):
    cell, group = gemmi.UnitCell(*cell), gemmi.SpaceGroup(name)
    tensors = invariant_tensors(cell, group)
    rng = np.random.default_rng(0)
    hkl = rng.integers(-9, 10, (40, 3))
    to_hkl = np.array(cell.frac.mat.tolist())
    value = [
        np.einsum("ri,mij,rj->rm", s, tensors, s)
        for s in (hkl @ rotation @ to_hkl for rotation in rotations(group))
    ]
    for other in value[1:]:
        np.testing.assert_allclose(other, value[0], atol=1e-9)
    asu = ReciprocalAsu(cell, group, 6.0, True)
    design = anisotropic_design(asu, tensors)
    np.testing.assert_allclose(design[asu.friedel_mate], design, atol=1e-12)
    s = asu.asu_index @ to_hkl
    np.testing.assert_allclose(design, -0.5 * np.einsum("ri,mij,rj->rm", s, tensors, s))


def test_a_cell_that_is_not_quite_symmetric_keeps_the_number_of_tensors():
    cell = gemmi.UnitCell(79.4, 79.47, 37.8, 90.05, 89.96, 90.0)
    assert len(invariant_tensors(cell, gemmi.SpaceGroup("P 43 21 2"))) == 1


def test_isotropic_prior_has_no_tensor():
    x = torch.linspace(0.01, 0.2, 50, dtype=torch.float64)
    arguments = x, torch.ones(50), torch.zeros(50, dtype=torch.bool), 4
    plain, none = Wilson(*arguments), Wilson(*arguments, torch.zeros(50, 0))
    for prior in (plain, none):
        assert list(dict(prior.named_parameters())) == ["log_sigma"]
        assert float(prior.penalty()) == 0.0
        assert prior.anisotropic_b() is None


def known_tensor() -> np.ndarray:
    return np.diag([24.0, -8.0, -16.0])


def test_start_finds_the_tensor():
    c = crystal(d_min=2.5, tensor=known_tensor())
    prior = Wilson.of_rows(UniqueRows([c.asu]), 12, is_anisotropic=True)
    prior.start(torch.as_tensor(c.amplitude**2), torch.ones(len(c.asu), dtype=torch.bool))
    found = prior.anisotropic_b().numpy()
    # 4,000 logarithms of spread 1.28 to 2.2
    np.testing.assert_allclose(found, known_tensor(), atol=4.0)


@pytest.mark.parametrize("noise", [3.0, 60.0])
def test_merge_recovers_the_tensor(noise):
    """With noise of 3 nearly every reflection is measured, with 60 few in the outer shells."""
    c = crystal(d_min=3.0, tensor=known_tensor())
    config = MergeConfig(network_width=0, epochs=60, batch_size=None)
    _, merger = fitted([observe(c, noise)], config)
    found = merger.prior.anisotropic_b().numpy()
    design = anisotropic_design(c.asu, invariant_tensors(c.asu.cell, c.asu.space_group))
    # information of a log-mean: 1 of an acentric, 1/2 of a centric intensity, less with noise
    signal = c.asu.epsilon * c.sigma
    share = (signal / (signal + noise / 2)) ** 2 * np.where(c.asu.is_centric, 0.5, 1.0)
    error = np.sqrt(np.linalg.inv((design * share[:, None]).T @ design).trace())
    assert np.linalg.norm(found - known_tensor()) < 4 * error
    assert 4 * error < 0.3 * np.linalg.norm(known_tensor())


def test_without_anisotropy_none_is_found():
    c = crystal(d_min=3.0)
    config = MergeConfig(network_width=0, epochs=60, batch_size=None)
    _, merger = fitted([observe(c, 10.0)], config)
    assert np.abs(merger.prior.anisotropic_b().numpy()).max() < 2.0
    _, merger = fitted(
        [observe(c, 10.0)], MergeConfig(network_width=0, epochs=1, anisotropic=False)
    )
    assert merger.prior.anisotropic_b() is None


def test_the_tensor_is_there_only_where_asked():
    experiment = simulate(d_min=5.0)
    plain = experiment.merging(anisotropic=False).merger
    assert not [name for name in plain.state_dict() if "anisotrop" in name or "tensor" in name]
    merging = experiment.merging()
    merger = merging.merger
    start(merger, merging.table)
    terms = merger.loss(merging.table.everything(), merger.inference())
    own, wilson = terms.scale_penalty - merger.scale.penalty(), merger.prior.part(Wilson)
    torch.testing.assert_close(own, 0.5 * ((wilson.tensor_coefficients() / B_SD) ** 2).sum())
    (terms.kl_structure_factor + terms.scale_penalty).backward()
    gradient = wilson.anisotropy.grad
    assert gradient.shape == (2,)
    assert (gradient != 0).all()
