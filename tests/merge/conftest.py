"""One fitted merge of a simulated rotation experiment, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from simulated_merge import Experiment, fit, simulate

from braggflux.merge.engine.merger import Merger


@dataclass(frozen=True)
class Fitted:
    """Experiment, fitted merger, and the truth on the fit's absolute scale.

    K and F^2 share a factor that depends on resolution (the mean of B is not known, and the
    detector position that the network sees goes with resolution): it is taken from the fitted
    scales by regression and the true amplitudes are multiplied with it.
    """

    experiment: Experiment
    merger: Merger
    log_scale: np.ndarray  # (N,) fitted
    amplitude: np.ndarray  # (R,) true, on the fit's scale
    output_factor: np.ndarray  # (R,) from the fit's intensities to those of the output
    scale_error: np.ndarray  # (N,) fitted less true log-scale, without that factor
    is_seen: np.ndarray  # (R,)


@pytest.fixture(scope="session")
def fitted() -> Fitted:
    experiment = simulate(photons=4000.0, d_min=3.5, relative_error=0.02, seed=1)
    merger = experiment.merger()
    fit(merger, experiment.batch, n_steps=300)
    log_scale = merger.scale(experiment.table.metadata.refl_row).detach().numpy()
    difference = log_scale - experiment.truth.log_scale
    inv_d2 = experiment.asu.d**-2.0
    powers = np.vander(inv_d2 / inv_d2.max(), 4)
    of_observation = powers[experiment.refl_id]
    coefficients = np.linalg.lstsq(of_observation, difference, rcond=None)[0]
    return Fitted(
        experiment,
        merger,
        log_scale,
        experiment.truth.amplitude * np.exp(-0.5 * powers @ coefficients),
        merger.scale.fresh_crystal_factor(merger.inv_d2).numpy(),
        difference - of_observation @ coefficients,
        merger.n_obs.numpy() > 0,
    )
