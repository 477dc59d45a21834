"""Overlapping spots of known intensity are split without bias and with honest sigmas."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    Spot,
    gaussian_voxels,
    make_integrator,
    poisson_boxes,
    robust_spread,
    spot_metadata,
)
from scipy.spatial import cKDTree

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.io.dials import read_experiments
from braggflux.integrator.model.build import build_integrator, start_from_strong_spots
from braggflux.integrator.model.start import stands_alone, start_profile
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.integrator.types import Flag, Neighbours

SPOT = Spot()
LEVEL = 0.5
N = 300
#: Distance of the neighbour along (fast, slow, frame), in pixels and frames.
OFFSETS = {"3 sigma": (3.0, 0.0, 0.0), "2.5 sigma and later": (1.8, -1.6, 1.0)}


def neighbours_of(metadata, offsets, zeta=None) -> Neighbours:
    """Neighbours at ``offsets`` (K, 3), the same for all boxes."""
    n, k = len(metadata), len(offsets)
    offset = torch.as_tensor(offsets, dtype=torch.float32).expand(n, k, 3)
    own = metadata.zeta[:, None].expand(n, k)
    return Neighbours(
        torch.ones(n, k, dtype=torch.bool),
        offset,
        own if zeta is None else zeta,
        torch.zeros(n, k, dtype=torch.int64),
        torch.full((n, k), -1),
    )


@pytest.fixture(scope="module")
def integrator():
    """Profile learned by EM from spots that stand alone; networks untrained."""
    torch.manual_seed(0)
    rng = np.random.default_rng(99)
    metadata = spot_metadata(400, rng, SPOT)
    intensity = rng.uniform(1000, 20000, (400, 1, 1, 1))
    strong = poisson_boxes(intensity * gaussian_voxels(metadata, SPOT) + LEVEL, metadata, rng)
    model = make_integrator(metadata, SPOT, LEVEL)
    start_profile(model, strong)
    return model


def overlapping(intensity, beside, offset, seed=0, n=N):
    """Boxes of a spot with one neighbour."""
    rng = np.random.default_rng(seed)
    metadata = spot_metadata(n, rng, SPOT)
    neighbours = neighbours_of(metadata, [offset])
    moved = replace(metadata, xyz_px=metadata.xyz_px + neighbours.offset[:, 0])
    rate = intensity * gaussian_voxels(metadata, SPOT) + LEVEL
    rate = rate + beside * gaussian_voxels(moved, SPOT)
    return replace(poisson_boxes(rate, metadata, rng), neighbours=neighbours)


def estimates(integrator, batch):
    """Intensities and their likelihoods."""
    with torch.no_grad():
        likelihood = integrator.inference(batch).marginal_likelihood
    return likelihood.mode.double().numpy(), likelihood


@pytest.mark.parametrize("offset", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize(("intensity", "beside"), [(0, 800), (60, 800), (60, 0), (800, 800)])
def test_two_spots_are_split(integrator, intensity, beside, offset):
    """Bias below 0.2 % of both spots and half a photon, within the error of the mean."""
    mode, likelihood = estimates(integrator, overlapping(intensity, beside, offset))
    error = mode - intensity
    sigma = likelihood.variance(torch.full((N,), float(intensity))).sqrt().numpy()
    allowed = 0.5 + 0.002 * (intensity + beside)
    assert abs(error.mean()) < allowed + 2 * error.std() / np.sqrt(N)
    assert robust_spread(error / sigma) == pytest.approx(1.0, abs=0.13)


@pytest.mark.parametrize(("beside", "is_curved"), [(200, False), (800, False), (800, True)])
def test_a_neighbour_that_is_not_modelled_is_a_bias(integrator, monkeypatch, beside, is_curved):
    """The same boxes without the neighbour; with curved backgrounds a strong one is seen."""
    monkeypatch.setattr(
        integrator, "config", replace(integrator.config, curved_background=is_curved)
    )
    batch = overlapping(60, beside, OFFSETS["3 sigma"])
    split, own = estimates(integrator, batch)
    alone, likelihood = estimates(integrator, replace(batch, neighbours=None))
    assert abs(split.mean() - 60) < 4
    sigma, sigma_alone = (
        x.variance(torch.full((N,), 60.0)).sqrt().mean() for x in (own, likelihood)
    )
    if is_curved:
        assert abs(alone.mean() - 60) > 15
        assert sigma_alone > 1.35 * sigma
    else:
        assert alone.mean() - 60 > 15


def test_the_split_costs_information(integrator):
    """Two spots a sigma apart: what they share is known together only."""
    near = overlapping(200, 200, (1.0, 0.0, 0.0))
    mode, likelihood = estimates(integrator, near)
    sigma = likelihood.variance(torch.full((N,), 200.0)).sqrt().numpy()
    assert robust_spread((mode - 200) / sigma) == pytest.approx(1.0, abs=0.13)
    _, apart = estimates(integrator, overlapping(200, 200, OFFSETS["3 sigma"]))
    assert sigma.mean() > 1.4 * apart.variance(torch.full((N,), 200.0)).sqrt().mean()


def test_strong_spots_beside_something_unknown_do_not_stand_alone():
    """Half of them with a spot that nobody predicted: they would widen the profile of all."""
    stranger = np.where(np.arange(N) % 2, 1500.0, 0.0)[:, None, None, None]
    batch = replace(overlapping(3000, stranger, (3.0, -3.0, 0.0)), neighbours=None)
    model = make_integrator(batch.metadata, SPOT, LEVEL)
    is_alone = stands_alone(model, batch).numpy()
    assert is_alone[::2].all()
    assert not is_alone[1::2].any()
    sound = replace(overlapping(3000, 0, (3.0, -3.0, 0.0)), neighbours=None)
    assert stands_alone(model, sound).all()


class Boxes:
    """What the start asks of a store."""

    def __init__(self, batch) -> None:
        self._batch, self.flags = batch, torch.zeros(len(batch), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._batch)

    def read(self, rows):
        return self._batch[rows]


def test_a_second_lattice_that_nobody_indexed_is_named(caplog):
    """Its spots widen no profile: the share beyond three pixels is that of sound boxes."""
    width = {}
    for share in (0, 0.3):
        has_stranger = np.arange(N) % 10 < 10 * share
        beside = np.where(has_stranger, 2500.0, 0.0)[:, None, None, None]
        batch = replace(overlapping(3000, beside, (3.0, -3.0, 0.0)), neighbours=None)
        model = make_integrator(batch.metadata, SPOT, LEVEL)
        n_used = start_from_strong_spots(model, Boxes(batch), 0)
        assert ("dials.index max_lattices=2" in caplog.text) == (share > 0)
        weights = model.profile.node_weights()[0].sum(0).detach().numpy()
        width[share] = weights[[0, -1]].sum() + weights[:, [0, -1]].sum()
        assert n_used <= (1 - share) * N
    assert width[0.3] == pytest.approx(width[0], abs=0.005)


def test_empty_places_change_nothing(integrator):
    """A batch is padded to its fullest box: a box is the same in any company."""
    batch = overlapping(60, 800, OFFSETS["3 sigma"], n=20)
    padded = neighbours_of(batch.metadata, [OFFSETS["3 sigma"], (0.5, 0.5, 0.0)])
    padded.is_present[:, 1] = False
    once, _ = estimates(integrator, batch)
    again, _ = estimates(integrator, replace(batch, neighbours=padded))
    np.testing.assert_allclose(once, again, atol=0.01)


@pytest.mark.slow
def test_crowded_frames(tmp_path):
    """From frames: masked, weak spots hold ten photons of their neighbours; modelled, none."""
    files = simulate(tmp_path, "crowded", 0, overrides={"scan.n_images": 18})
    experiments = read_experiments(files.expt)
    extent = SpotExtent(1.06, 0.98, 0.356, (11, 13, 13))
    with np.load(files.truth) as truth:
        key = np.hstack([truth["miller_index"] * 1e3, truth["xyz_px"]])
        photons, recorded = truth["photons"], truth["recorded"]
    bias = {}
    for is_modelled in (True, False):
        out = tmp_path / f"{is_modelled}.h5"
        with run_extraction(
            experiments, 3.2, out, extent_override=extent, model_neighbours=is_modelled
        ) as store:
            torch.manual_seed(0)
            integrator = build_integrator(store, IntegratorConfig(n_profile_spots=300))
            start_from_strong_spots(integrator, store, 0)
            data = store.metadata()
            place = np.hstack([data.miller_index.numpy() * 1e3, data.xyz_px.numpy()])
            distance, at = cKDTree(key).query(place)
            is_weak = (distance < 0.1) & (photons[at] < 100) & (recorded[at] > 0.98)
            rows = np.flatnonzero(is_weak & (store.flags.numpy() & Flag.REJECTED == 0))
            mode, _ = estimates(integrator, store.read(torch.as_tensor(rows)))
        error = mode - photons[at[rows]]
        assert len(error) > 200
        bias[is_modelled] = error.mean()
    assert abs(bias[True]) < 3.5  # the error of the mean is 0.75
    assert bias[False] > 6.0
