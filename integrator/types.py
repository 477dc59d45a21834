"""Tensors that cross module boundaries, with named shapes.

Shape letters: S samples, B reflections in a batch, N observations, R unique reflections,
D/H/W = frame, slow, fast inside a shoebox.

:class:`IntensityTable` is the stage contract: the only thing that passes from ``integrator`` to
``merge``, in memory with its graph (``joint``) or through a file (``staged``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from braggflux.integrator.distributions.shifted_poisson import ShiftedPoisson
from braggflux.integrator.records import TensorRecord


@dataclass(frozen=True)
class ReflectionMetadata(TensorRecord):
    """What is known of an observation before any photon is counted.

    Parameters
    ----------
    refl_row : Tensor, (N,) int64
        Row in the shoebox store.
    miller_index : Tensor, (N, 3) int64
        As observed, not mapped to the asymmetric unit.
    experiment : Tensor, (N,) int64
        Which experiment (sweep).
    panel : Tensor, (N,) int64
    xyz_px : Tensor, (N, 3)
        Predicted (fast, slow, frame); see ``braggflux.integrator.crystal.geometry`` for the
        origin.
    xyz_mm : Tensor, (N, 3)
        [mm, mm, rad]
    s1 : Tensor, (N, 3)
        Diffracted beam vector in the laboratory frame [1/A].
    s0_crystal, s1_crystal : Tensor, (N, 3)
        Unit vectors of the incident (towards the sample) and diffracted beam in the frame that
        turns with the crystal (goniometer rotation undone).
    d : Tensor, (N,)
        Resolution [A].
    lp : Tensor, (N,)
        L/P correction that multiplies raw intensity (DIALS column ``lp``).
    zeta : Tensor, (N,)
        ``|e1 . m2|``: apparent rotation width is sigma_m / zeta.
    frame_sigma : Tensor, (N,)
        Standard deviation of the rocking curve as frames see it, with the width of a frame
        itself [frames].
    corner : Tensor, (N, 3) int64
        (frame, slow, fast) array index of the first voxel of the box; may be negative.
    frames_per_layer : Tensor, (N,) int64
        Consecutive frames that each layer of the box sums: 1, and more where the rocking curve
        is wider than the box.
    """

    refl_row: Tensor
    miller_index: Tensor
    experiment: Tensor
    panel: Tensor
    xyz_px: Tensor
    xyz_mm: Tensor
    s1: Tensor
    s0_crystal: Tensor
    s1_crystal: Tensor
    d: Tensor
    lp: Tensor
    zeta: Tensor
    frame_sigma: Tensor
    corner: Tensor
    frames_per_layer: Tensor

    @property
    def rocking_sigma(self) -> Tensor:
        """Standard deviation of the rocking curve without the frame's own width, (N,) [frames]."""
        return (self.frame_sigma.double() ** 2 - 1 / 12).clamp_min(1e-6).sqrt()


@dataclass(frozen=True)
class Neighbours(TensorRecord):
    """Spots whose photons reach into each box, in no particular order; K of the fullest box.

    Parameters
    ----------
    is_present : Tensor, (B, K) bool
        Boxes with fewer than K have empty places.
    offset : Tensor, (B, K, 3)
        Predicted centroid less that of the box's own spot (fast, slow, frame).
    zeta : Tensor, (B, K)
        Of :class:`ReflectionMetadata`, times the width of the box's own rocking curve over that
        of the neighbour's at zeta = 1.
    experiment : Tensor, (B, K) int64
        Lattice of the neighbour: that of the box, or another on the same frames.
    store_row : Tensor, (B, K) int64
        Its own row in the shoebox store, -1 for a spot that has no box.
    """

    is_present: Tensor
    offset: Tensor
    zeta: Tensor
    experiment: Tensor
    store_row: Tensor


@dataclass(frozen=True)
class ShoeboxBatch(TensorRecord):
    """Shoeboxes of a batch of reflections.

    Parameters
    ----------
    counts : Tensor, (B, D, H, W)
        Photons; 0 where not valid.
    is_valid : Tensor, (B, D, H, W) bool
        Recorded, trusted and not claimed by a neighbour that is not modelled.
    metadata : ReflectionMetadata
    neighbours : Neighbours, optional
        Spots whose photons are modelled beside the box's own; none without.
    """

    counts: Tensor
    is_valid: Tensor
    metadata: ReflectionMetadata
    neighbours: Neighbours | None = None


@dataclass(frozen=True)
class IntensityTable(TensorRecord):
    """One row per observation: where it was seen, and what its photons say of its intensity.

    Parameters
    ----------
    metadata : ReflectionMetadata, (N,)
    likelihood : ShiftedPoisson, (N,)
        Photon-count likelihood of the intensity J [photons], free of any prior on J.
    background : Tensor, (N,)
        Mean under the spot [photons/pixel].
    flags : Tensor, (N,) int64
        Bits of :class:`Flag`.
    """

    metadata: ReflectionMetadata
    likelihood: ShiftedPoisson
    background: Tensor
    flags: Tensor

    @property
    def intensity(self) -> Tensor:
        """Maximum-likelihood intensity, (N,) [photons]; may be negative."""
        return self.likelihood.mode

    @property
    def is_integrated(self) -> Tensor:
        """Whether enough of the profile was recorded to be used, (N,) bool."""
        return (self.flags & Flag.REJECTED) == 0


class Flag:
    """Bits of ``IntensityTable.flags``."""

    PARTIAL_EDGE = 1  # box cut by the panel or the scan edge
    MASKED_CORE = 2  # some pixels that should hold signal are not valid
    OVERLAPPED = 4  # a neighbour's spot reaches into the box
    REJECTED = 8  # too little of the profile was recorded to be used
    DEFECT = 16  # a zinger, an unmasked hot pixel or a shadow took voxels of the spot
