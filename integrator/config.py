"""Settings of the integrator."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class IntegratorConfig:
    """Profile, background and encoder of the integrator."""

    # Nodes of the profile grid per standard deviation of the spot, along each axis.
    nodes_per_sigma: float = 1.5
    # Half width of the profile grid along the rotation, in rocking-curve standard deviations.
    rotation_n_sigma: float = 4.0
    # Rounds of expectation maximisation for the mean strong-spot profile.
    profile_em_rounds: int = 15
    # Strong spots from which the mean profile starts.
    n_profile_spots: int = 2000
    # Width of the hidden layers of the encoder.
    encoder_width: int = 48
    # Rounds of Fisher scoring for intensity and background given the profile.
    n_scoring_rounds: int = 2
    # Prior standard deviation of the log background level about the mean background image.
    background_level_sd: float = 0.1
    # Prior standard deviation of the relative background slope across half a box.
    background_slope_sd: float = 0.1
    # Curved surface for boxes whose background contradicts its prior (salt, reflexes).
    curved_background: bool = False
    # Standard deviation, in pixels, of the smoothing of the mean background image.
    background_smoothing_px: float = 2.0
    # Step of the networks, and of the profile's mean and directions, at the first epoch.
    learning_rate: float = 2e-3
    profile_learning_rate: float = 3e-4
    # An observation with less than this share of its profile on valid pixels is rejected.
    min_exposure: float = 0.2

    def __post_init__(self) -> None:
        """Check ranges."""
        positive = (
            "nodes_per_sigma",
            "rotation_n_sigma",
            "background_level_sd",
            "background_slope_sd",
            "encoder_width",
            "learning_rate",
            "profile_learning_rate",
        )
        for name in positive:
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        least = {"n_profile_spots": 1, "profile_em_rounds": 0, "n_scoring_rounds": 0}
        for name, bound in (least | {"background_smoothing_px": 0}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {getattr(self, name)}.")
        if not 0.0 <= self.min_exposure < 1.0:
            raise ValueError(f"`min_exposure` must lie in [0, 1), got {self.min_exposure}.")
