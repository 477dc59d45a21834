r"""Where spots are wider, narrower or beside their prediction, as a smooth function of the place.

Mosaic blocks that are turned about the beam smear a spot along the tangent, by a length that grows
with the diffraction angle; bandwidth smears it along the radius; refinement leaves offsets that
drift over detector and scan. One profile in pixels cannot follow. Along each axis of the profile
grid (e3, slow, fast) the distance ``u`` from the predicted centroid becomes

    u' = (u - mu(place)) / exp(omega(place)),      mu, omega linear in :class:`PlaceFeatures`,

before the profile, one density for all places, is integrated over voxels. What is left for the
latents of a spot are differences in shape.

The coefficients start from strong spots by Fisher scoring (``braggflux.integrator.model.start``)
and are then trained with everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braggflux.integrator.types import ReflectionMetadata


class PlaceFeatures(nn.Module):
    """Sweep, direction of the diffracted beam to second order, and place in the scan.

    Parameters
    ----------
    axes : Tensor, (2, 3)
        Two directions across the mean diffracted beam.
    centre, half_range : Tensor, (3,)
        Of the two components along ``axes`` and of the frame number.
    n_experiments : int
    """

    axes: Tensor
    centre: Tensor
    half_range: Tensor

    def __init__(
        self, axes: Tensor, centre: Tensor, half_range: Tensor, n_experiments: int
    ) -> None:
        super().__init__()
        self.register_buffer("axes", axes)
        self.register_buffer("centre", centre)
        self.register_buffer("half_range", half_range)
        self.n_experiments = n_experiments
        self.n_features = n_experiments + 8

    @classmethod
    def from_metadata(cls, metadata: ReflectionMetadata, n_experiments: int) -> PlaceFeatures:
        """Scale by the range of the data."""
        direction = nn.functional.normalize(metadata.s1, dim=-1)
        # the last two right singular vectors of one row span the plane across it
        axes = torch.linalg.svd(direction.mean(0, keepdim=True)).Vh[1:]
        place = cls._place(metadata, axes)
        low, high = place.min(0).values, place.max(0).values
        half_range = ((high - low) / 2).clamp_min(1e-6)
        return cls(axes, (low + high) / 2, half_range, n_experiments)

    @staticmethod
    def _place(metadata: ReflectionMetadata, axes: Tensor) -> Tensor:
        direction = nn.functional.normalize(metadata.s1, dim=-1)
        return torch.cat([direction @ axes.T, metadata.xyz_px[:, 2:]], -1)

    def forward(self, metadata: ReflectionMetadata) -> Tensor:
        """Features, (B, n_features), of about [-1, 1]."""
        place = (self._place(metadata, self.axes) - self.centre) / self.half_range
        x, y, z = place.unbind(-1)
        sweep = nn.functional.one_hot(metadata.experiment, self.n_experiments).to(place.dtype)
        smooth = [x, y, x * x, x * y, y * y, z, torch.sin(3 * z), torch.cos(3 * z)]
        return torch.cat([sweep, torch.stack(smooth, -1)], -1)


class LocalShape(nn.Module):
    """Offset and log width of the spots along (e3, slow, fast) at every place.

    Parameters
    ----------
    features : PlaceFeatures
    sigma : Tensor, (3,)
        Standard deviations of the spots along the axes: offsets are counted in them.
    """

    #: Standard deviation of the coefficients beforehand.
    prior_sd = 0.3
    #: Bounds of the offset [sigma] and of the log width: beyond, the prediction is what is wrong.
    max_offset, max_log_width = 1.5, 1.0

    sigma: Tensor

    def __init__(self, features: PlaceFeatures, sigma: Tensor) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("sigma", sigma)
        self.coefficients = nn.Parameter(torch.zeros(features.n_features, 6))

    def forward(self, metadata: ReflectionMetadata) -> tuple[Tensor, Tensor]:
        """Offset [units of the axis] and relative width, each (B, 3) along (e3, slow, fast)."""
        offset, log_width = (self.features(metadata) @ self.coefficients).chunk(2, -1)
        return (
            self.max_offset * torch.tanh(offset / self.max_offset) * self.sigma,
            torch.exp(self.max_log_width * torch.tanh(log_width / self.max_log_width)),
        )
