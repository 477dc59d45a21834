"""Settings of a merge of measured intensities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: Of any number of things; more is a slip or damage.
MOST = 10**9
#: Of a B factor [A^2]; that of a structure at 10 A resolution is a few hundred.
MOST_B = 1000.0


@dataclass(frozen=True)
class MergeConfig:
    """Scale, error model, priors and their optimisation (`braggflux merge`)."""

    # Bijvoet mates have amplitudes of their own; false merges them into one.
    anomalous: bool = False
    # Still images, related to each other by nothing: their scales come from the image encoder.
    stills: bool = False
    # Polychromatic beam: wavelength spectrum and harmonic overlaps.
    laue: bool = False
    # Divide Lorentz and (mean) polarization factors of a polychromatic beam out, for integrated
    # Laue intensities that still have them; compare the held-out likelihoods with and without.
    laue_lp: bool = False
    # High-resolution limit [A]; that of the data when null.
    d_min: float | None = None
    # Rotation data: scale of each frame, B and absorption as physics knows them, where the files
    # say where observations lie on their sweeps; false leaves all to the scale network.
    physical_scale: bool = True
    # Frames of rotation data have scales of their own about a slow drift: auto keeps them where
    # they predict held-out observations better, or where every frame has many.
    flicker: Literal["auto", "on", "off"] = "auto"
    # Highest order of the spherical harmonics of the absorption surface; 0 for none.
    absorption_order: int = 4
    # Rotation between knots of the B factor along a sweep [deg].
    b_factor_spacing_deg: float = 10.0
    # Rotation between knots of the slow drift of the scale [deg]; frames flicker about it.
    drift_spacing_deg: float = 2.0
    # Width of the hidden layer of the response of the detector, a network that sees nothing but
    # where on it a spot of rotation data lies; 0 for none.
    detector_network_width: int = 8
    # Columns that the scale network sees beside resolution; when null all known ones, and none
    # (no network) beside a physical scale.
    metadata: tuple[str, ...] | None = None
    # Spots above the level where sigma / I rises again, which only saturation explains: auto
    # leaves them out.
    overloads: Literal["auto", "keep"] = "auto"
    # Distribution of the errors: studentt forgives outliers; normal.
    likelihood: str = "studentt"
    # Degrees of freedom of Student's t; learned when null.
    dof: float | None = None
    # Photon counts where the input carries them: variance and skew of the expected count; false
    # takes them as Gaussian with the variance of the observed one.
    photon_counts: bool = True
    # Blank spots (in a shadow) and stray ones (another reflection's): auto for Laue, where they
    # were tried; needs the scale network.
    alternatives: Literal["auto", "on", "off"] = "auto"
    # Learn sdfac, sdB and sdadd; false keeps them at 1, 0 and 0.
    error_model: bool = True
    # Error that observations of one reflection on one image have in common across datasets.
    pairing: Literal["auto", "none"] = "auto"
    # Indexing ambiguity of stills: auto resolves it image by image where the lattice has one.
    resolve_ambiguity: Literal["auto", "none"] = "auto"
    # Obliquity [deg] up to which a two-fold axis of the lattice may be mistaken for symmetry.
    ambiguity_tolerance: float = 0.5
    # Model or merged MTZ of the same crystal form: of ambiguous indexings, its own is taken; that
    # of --prior-model when null.
    reference_intensities: Path | None = None
    # wilson: every amplitude for itself; double-wilson: given its parent (or Bijvoet mate). auto:
    # double-wilson where amplitudes have relatives, by --parents or --anomalous.
    prior: str = "auto"
    # Correlation r of an amplitude with its parent; by shell from half sets of the data when null.
    correlation: float | None = None
    # SIGF where --parents are given: amplitude is right for F alone; difference, which auto means,
    # leaves out what relatives have in common, for programs that weigh differences as if F were
    # independent. Bijvoet mates have their difference in columns of its own, DANO and SIGDANO.
    sigma: Literal["auto", "amplitude", "difference"] = "auto"
    # Resolution shells of r.
    n_correlation_shells: int = 10
    # Resolution shells of sigma_A, the correlation of amplitudes with those of --prior-model.
    n_reference_shells: int = 10
    # Knots of the learned mean intensity against resolution.
    n_wilson_knots: int = 12
    # Mean intensity depends on the direction too, as far as the point group allows.
    anisotropic: bool = True
    # Knots of the wavelength spectrum.
    n_spectrum_knots: int = 48
    # Width of the hidden layers of the scale network; 0 for none.
    network_width: int = 32
    # Residual blocks of the scale network and of the image encoder.
    network_depth: int = 2
    # Length of the description of an image that the scale network sees.
    embedding_size: int = 8
    # Stills in memory: each image departs from what the encoder says of it by parameters of its
    # own; images never trained on have none.
    image_parameters: bool = True
    # Data fix only K F^2; this chooses whether K (scale) or F^2 (amplitudes) has the mean decay
    # with resolution. sphere: K has none where a lattice point lies on the Ewald sphere. auto:
    # scale for Laue, sphere for stills, else amplitudes.
    falloff: Literal["auto", "amplitudes", "scale", "sphere"] = "auto"
    # Where the scale keeps it: B of the amplitudes in the files [A^2], F ~ exp(-B / (4 d^2)).
    wilson_b: float = 0.0
    # Share of the images, and of the observations on the others, that are held out to predict.
    held_out: float = 0.05
    # Passes over the data.
    epochs: int = 100
    # Observations in a step, whole images; fewer where the data are few, all when null.
    batch_size: int | None = 16000
    # Stills in a store (.h5) with more observations than this are read batch by batch.
    stream_above: int = 4_000_000
    # Observations that scales are trained on then; the amplitudes see all of them.
    stream_training: int = 12_000_000
    # Step of the scale's physical terms and of the error model.
    learning_rate: float = 0.02
    # Step of the networks.
    network_learning_rate: float = 0.01
    # Half-set pairs in half_sets.mtz (F1 F2, then F3 F4, ...), each another random split; CC1/2,
    # CCanom and the spread of z are averaged over them.
    half_set_repeats: int = 1
    # Merged MTZ whose test set (FreeR_flag, R-free-flags) is kept, and extended where it lacks
    # reflections; a new one, 5 %, when null.
    free_r: Path | None = None
    # Seed of a new test set; of one crystal form the same seed gives the same set.
    free_r_seed: int = 0
    # A new test set of whole thin shells, for non-crystallographic symmetry.
    free_r_thin_shells: bool = False
    # Same seed, same result on the CPU.
    seed: int = 0
    # auto (cuda where present, else cpu), cpu, cuda or cuda:N.
    device: str = "auto"

    @property
    def has_alternatives(self) -> bool:
        """Spots may be blank or stray."""
        return self.alternatives == "on" or (self.alternatives == "auto" and self.laue)

    def __post_init__(self) -> None:
        """Check ranges."""
        positive = ("b_factor_spacing_deg", "drift_spacing_deg")
        for name in ("d_min", "dof", "learning_rate", "network_learning_rate", *positive):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise ValueError(f"`{name}` must be positive and at most {MOST}, got {value}")
        least = {"n_correlation_shells": 1, "n_wilson_knots": 2, "n_spectrum_knots": 2}
        least |= {"network_width": 0, "network_depth": 1, "embedding_size": 1, "epochs": 1}
        least |= {
            "absorption_order": 0,
            "detector_network_width": 0,
            "n_reference_shells": 1,
            "stream_above": 0,
            "stream_training": 1,
        }
        least |= {"batch_size": 1, "half_set_repeats": 1, "seed": 0, "free_r_seed": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {value}")
            if value is not None and value > MOST:
                raise ValueError(f"`{name}` must be at most {MOST}, got {value}")
        if self.correlation is not None and not 0.0 < self.correlation < 1.0:
            raise ValueError(f"`correlation` must lie in (0, 1), got {self.correlation}")
        if not 0.0 <= self.ambiguity_tolerance <= 10.0:
            raise ValueError(
                f"`ambiguity_tolerance` must lie in [0, 10], got {self.ambiguity_tolerance}"
            )
        if not abs(self.wilson_b) <= MOST_B:
            raise ValueError(f"`wilson_b` must lie in +-{MOST_B} A^2, got {self.wilson_b}")
        if not 0.0 <= self.held_out <= 0.5:
            raise ValueError(f"`held_out` must lie in [0, 0.5], got {self.held_out}")
        kind, _, index = self.device.partition(":")
        if kind not in {"auto", "cpu", "cuda"} or (index and not index.isdigit()):
            raise ValueError(f"`device` must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.stills and self.laue:
            raise ValueError("`stills` and `laue` exclude each other; give one of them")
        if self.reference_intensities is not None and not self.stills:
            raise ValueError(
                "`reference_intensities` is for `stills`, whose images choose their indices one "
                "by one; reindex whole scans with --reindex"
            )
        if self.stills and not self.network_width:
            raise ValueError("`stills` needs a `network_width` above 0")
