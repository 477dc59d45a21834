"""Settings of a merge of measured intensities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class IntensityMergeConfig:
    """Scale, error model, priors and their optimisation (`braggflux merge`)."""

    # Bijvoet mates: false merges them into one amplitude.
    anomalous: bool = False
    # Still images, related to each other by nothing: their scales come from the image encoder.
    stills: bool = False
    # Polychromatic beam: wavelength spectrum and harmonic overlaps.
    laue: bool = False
    # High-resolution limit [A]; that of the data when null.
    d_min: float | None = None
    # Columns that the scale network sees beside resolution; all known ones when null.
    metadata: tuple[str, ...] | None = None
    # Spots above the level where sigma / I rises again, which only saturation explains: auto
    # leaves them out.
    overloads: Literal["auto", "keep"] = "auto"
    # Distribution of the errors: studentt forgives outliers.
    likelihood: Literal["studentt", "normal"] = "studentt"
    # Degrees of freedom of Student's t; learned when null.
    dof: float | None = None
    # Blank spots (in a shadow) and stray ones (another reflection's): auto for Laue, where they
    # were tried; needs the scale network.
    alternatives: Literal["auto", "on", "off"] = "auto"
    # Learn sdfac, sdB and sdadd; false keeps them at 1, 0 and 0.
    error_model: bool = True
    # Error that observations of one reflection on one image have in common across datasets.
    pairing: Literal["auto", "none"] = "auto"
    # wilson: every amplitude for itself; double-wilson: given its parent (or Bijvoet mate).
    prior: Literal["wilson", "double-wilson"] = "wilson"
    # Correlation r of an amplitude with its parent; by shell from held-out data when null.
    correlation: float | None = None
    # SIGF of coupled amplitudes: amplitude is right for F alone; difference leaves out what
    # relatives have in common, for programs that weigh differences as if F were independent.
    sigma: Literal["amplitude", "difference"] = "amplitude"
    # Resolution shells of r.
    n_correlation_shells: int = 10
    # Knots of the learned mean intensity against resolution.
    n_wilson_knots: int = 12
    # Knots of the wavelength spectrum.
    n_spectrum_knots: int = 48
    # Width of the hidden layers of the scale network; 0 for none.
    network_width: int = 32
    # Residual blocks of the scale network and of the image encoder.
    network_depth: int = 2
    # Length of the description of an image that the scale network sees.
    embedding_size: int = 8
    # Share of the images, and of the observations on the others, that are held out to predict.
    held_out: float = 0.05
    # Passes over the data.
    epochs: int = 100
    # Observations in a step, whole images; fewer where the data are few, all when null.
    batch_size: int | None = 16000
    # Step of the scale's physical terms and of the error model.
    learning_rate: float = 0.02
    # Step of the networks.
    network_learning_rate: float = 0.01
    # Half-set pairs written to the MTZ; each is another random split.
    half_set_repeats: int = 1
    # Same seed, same result on the CPU.
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("d_min", "dof", "learning_rate", "network_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        least = {"n_correlation_shells": 1, "n_wilson_knots": 2, "n_spectrum_knots": 2}
        least |= {"network_width": 0, "network_depth": 1, "embedding_size": 1, "epochs": 1}
        least |= {"batch_size": 1, "half_set_repeats": 1, "seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}")
        if self.correlation is not None and not 0.0 < self.correlation < 1.0:
            raise ValueError(f"`correlation` must lie in (0, 1), got {self.correlation}")
        if not 0.0 <= self.held_out <= 0.5:
            raise ValueError(f"`held_out` must lie in [0, 0.5], got {self.held_out}")
        if self.stills and self.laue:
            raise ValueError("`stills` and `laue` exclude each other; give one of them")
        if self.stills and not self.network_width:
            raise ValueError("`stills` needs a `network_width` above 0")
