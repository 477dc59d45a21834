"""What spots may look like is no defect, and does not spoil the integration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from braggflux.fixtures.presets import SHAPES
from braggflux.fixtures.simulate import simulate
from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.io.dials import read_experiments, read_reflections
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.build import build_integrator, start_from_strong_spots
from braggflux.integrator.shoebox.extraction import run_extraction
from braggflux.integrator.types import Flag

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SHAPES if name != "fringes"]


@dataclass(frozen=True)
class Scan:
    """A simulated scan, its boxes with and without the search for defects."""

    searched: ShoeboxStore
    plain: ShoeboxStore
    truth: dict[str, np.ndarray]


def integrated(scan: Scan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photons from the starting profile, true ones, and Poisson's variance, of whole spots."""
    store, truth = scan.searched, scan.truth
    torch.manual_seed(0)
    integrator = build_integrator(store, IntegratorConfig())
    start_from_strong_spots(integrator, store, 0)
    batch = store.read(slice(0, len(store)))
    with torch.no_grad():
        table = integrator.intensity_table(
            batch.metadata, integrator.inference(batch), store.flags
        )
    likelihood = table.likelihood
    beta, exposure = likelihood.effective_background, likelihood.exposure
    photons = (likelihood.effective_counts / exposure - beta).numpy()
    far = 1e6  # keeps other indices out of reach
    place = [batch.metadata.miller_index.numpy() * far, batch.metadata.xyz_px.double().numpy()]
    known = cKDTree(np.hstack([truth["miller_index"] * far, truth["xyz_px"]]))
    distance, row = known.query(np.hstack(place))
    true = truth["photons"][row]
    kept = (distance < 1) & (truth["recorded"][row] > 0.98)
    kept &= (table.flags.numpy() & Flag.REJECTED) == 0
    return photons[kept], true[kept], ((true + beta.numpy()) / exposure.numpy())[kept]


def scan_of(shape: str, folder) -> Scan:
    files = simulate(folder, preset="tiny", seed=0, overrides=SHAPES[shape])
    stores = [
        run_extraction(
            read_experiments(files.expt),
            None,
            folder / f"{searched}.h5",
            reflections=read_reflections(files.refl),
            find_defects=searched,
        )
        for searched in (True, False)
    ]
    return Scan(*stores, dict(np.load(files.truth)))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["fringes", *SLOW])
def test_no_spot_is_a_defect_and_photons_are_as_true_as_without(shape, tmp_path):
    """As good as round spots: those have z of 0.95, and below 300 photons a bias of 1 photon."""
    scan = scan_of(shape, tmp_path)
    valid = [
        s.read(slice(0, len(s)), exclude=0).is_valid.numpy() for s in (scan.searched, scan.plain)
    ]
    assert np.array_equal(*valid)
    photons, true, variance = integrated(scan)
    bright = true > 300
    scale = photons[bright].sum() / true[bright].sum()
    assert scale == pytest.approx(1, abs=0.05)  # tails and streaks beyond the box, and inside
    error = photons / scale - true
    z = np.clip(error / np.sqrt(variance), -8, 8)
    for low, high in ((0, 20), (20, 100), (100, 300), (300, 1000)):
        rows = (true > low) & (true <= high)
        standard_error = np.sqrt(variance[rows].mean() / rows.sum())
        assert abs(error[rows].mean()) < 0.01 * true[rows].mean() + 3 * standard_error
        assert np.sqrt(np.mean(z[rows] ** 2)) < 1.25
    assert np.sqrt(np.mean((error / true)[true > 1000] ** 2)) < 0.04
    assert np.corrcoef(photons, true)[0, 1] > 0.9993
