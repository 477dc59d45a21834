"""Settings of the merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MergeConfig:
    """Scale, structure factors, priors, error model and their optimisation."""

    # Bijvoet mates: false merges them into one amplitude.
    anomalous: bool = True
    # What the merge sees of an observation: photon-counts, its whole likelihood; or gaussian, an
    # intensity and a sigma from its own counts, as conventional programs hand on (an ablation).
    handover: Literal["photon-counts", "gaussian"] = "photon-counts"
    # Couple Bijvoet mates by the double-Wilson prior; false gives each its own Wilson prior.
    double_wilson: bool = True
    # Scale, B factor and absorption as physics knows them; false leaves the network alone.
    physical_scale: bool = True
    # Highest order of the spherical harmonics of the absorption surface; 0 for none.
    absorption_order: int = 4
    # Rotation between knots of the B factor along the scan [deg].
    b_factor_spacing_deg: float = 10.0
    # Rotation between knots of the slow drift of the scale [deg]; frames flicker about it.
    drift_spacing_deg: float = 2.0
    # Width of the hidden layer of the scale network; 0 for none.
    scale_network_width: int = 8
    # Knots of the learned mean intensity against resolution.
    n_wilson_knots: int = 12
    # Mean intensity depends on the direction too, as far as the point group allows.
    anisotropic: bool = False
    # Resolution shells of the correlation between Bijvoet mates.
    n_friedel_shells: int = 10
    # Nodes of the quadrature over each structure factor.
    n_nodes: int = 5
    # Start of the relative error of an observation that is not Poisson (nu = 1 / error^2).
    relative_error: float = 0.02
    # Start of the share of outliers.
    outlier_fraction: float = 0.01
    # Full-batch steps for the merge in each epoch.
    steps_per_epoch: int = 60
    # Step of the merge's parameters at the first and the last epoch.
    learning_rate: float = 0.03
    final_learning_rate: float = 0.003

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in (
            "b_factor_spacing_deg",
            "drift_spacing_deg",
            "relative_error",
            "learning_rate",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0.0 < self.outlier_fraction < 0.5:
            raise ValueError(
                f"`outlier_fraction` must lie in (0, 0.5), got {self.outlier_fraction}."
            )
        for name in ("n_wilson_knots", "n_friedel_shells", "n_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.absorption_order < 0 or self.scale_network_width < 0:
            raise ValueError("`absorption_order` and `scale_network_width` must not be negative.")
        if not (self.physical_scale or self.scale_network_width):
            raise ValueError("`physical_scale: false` needs a `scale_network_width` above 0.")
