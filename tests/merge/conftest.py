"""One fitted merge of a simulated rotation experiment, shared by the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from simulated_merge import Experiment, Merging, fit, simulate

from braggflux.merge.model.merger import Merger


@dataclass(frozen=True)
class Fitted:
    """Experiment, fitted merger, and the truth on the fit's absolute scale.

    K and F^2 share a factor that depends on resolution (the mean of B is not known, and the
    detector position that the network sees goes with resolution): it is taken from the fitted
    scales by regression and the true amplitudes are multiplied with it.
    """

    experiment: Experiment
    merging: Merging
    amplitude: np.ndarray  # (R,) true, on the fit's scale
    scale_error: np.ndarray  # (N,) fitted less true log-scale, without that factor

    @property
    def merger(self) -> Merger:
        """What was fitted."""
        return self.merging.merger

    @property
    def posterior(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of q(F), (R,) each."""
        q, unit = self.merger.inference(), self.merging.table.unit_intensity**0.5
        with torch.no_grad():
            return q.mean.numpy() * unit, q.variance.sqrt().numpy() * unit

    @property
    def is_seen(self) -> np.ndarray:
        """Reflections with an observation, (R,)."""
        return self.merger.n_obs.numpy() > 0


@pytest.fixture(scope="session")
def fitted() -> Fitted:
    experiment = simulate(photons=4000.0, d_min=3.5, relative_error=0.02, seed=1)
    merging = experiment.merging(n_correlation_shells=3)
    fit(merging, n_steps=300)
    difference = merging.log_scale() - experiment.truth.log_scale
    inv_d2 = experiment.asu.d**-2.0
    powers = np.vander(inv_d2 / inv_d2.max(), 4)
    of_observation = powers[experiment.refl_id]
    coefficients = np.linalg.lstsq(of_observation, difference, rcond=None)[0]
    return Fitted(
        experiment,
        merging,
        experiment.truth.amplitude * np.exp(-0.5 * powers @ coefficients),
        difference - of_observation @ coefficients,
    )
