"""Place of an observation on its sweep, as metadata of unmerged observations.

Files of rotation data say it in their own ways: DIALS by the experiment's models, MTZ files by the
headers of their batches. Here is what the scale of a sweep needs of it, under fixed names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import reciprocal_metric

if TYPE_CHECKING:
    from scipy.spatial.transform import Rotation

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Number of the sweep; rotation from its start in frames, and the width of one [deg].
SWEEP, FRAME, FRAME_WIDTH = "sweep", "frame", "frame_width"
#: ``|e . m2|``, e along the rotation axis and m2 along s1 x s0: the rocking curve is wider by its
#: inverse than the mosaic spread.
ZETA = "zeta"
#: Standard deviation of the rocking curve without the width of a frame [deg], where the
#: integrator states it; else the mosaic spread is learned.
ROCKING = "rocking"
#: Unit vectors of the incident and the diffracted beam in the frame of the crystal.
BEAMS = ("s0c_x", "s0c_y", "s0c_z", "s1c_x", "s1c_y", "s1c_z")
SWEEP_COLUMNS = (SWEEP, FRAME, FRAME_WIDTH, ZETA, *BEAMS)

#: Offsets of numbers in a batch header (layout: CCP4 ``cmtzlib``, MTZBAT).
_CELL, _U, _PHI, _AXIS, _SOURCE = slice(0, 6), slice(6, 15), 36, slice(59, 62), slice(83, 86)
#: Largest median of ``||s1| lambda - 1|`` that leaves the headers believable.
CLOSURE = 1e-3


def sweep_columns(
    mtz: gemmi.Mtz, miller_index: NDArray[np.int32], columns: Mapping[str, Array], batch_label: str
) -> dict[str, Array]:
    """Columns :data:`SWEEP_COLUMNS` from the headers of the batches of an MTZ file.

    ``s1 = s0 + R(phi) U B h``, all in the Cambridge frame. Headers whose vectors do not end on
    the Ewald sphere are those of stills, of polychromatic data, or not filled in.

    Parameters
    ----------
    mtz : gemmi.Mtz
    miller_index : (N, 3)
        As observed.
    columns : mapping of str to (N,)
        Those of the file.
    batch_label : str
        Of the column of batch numbers.

    Returns
    -------
    dict of str to (N,)
        Empty where the headers do not say it.
    """
    headers = {b.number: b for b in mtz.batches}
    if "ROT" not in columns or not len(miller_index):
        return {}
    numbers, which = np.unique(columns[batch_label].astype(np.int64), return_inverse=True)
    if not set(numbers.tolist()) <= set(headers):
        return {}
    used = [headers[n] for n in numbers.tolist()]
    values = np.array([np.array(b.floats, dtype=np.float64) for b in used])
    wavelength = np.array([b.wavelength for b in used])
    width = values[:, _PHI + 1] - values[:, _PHI]
    norms = [np.linalg.norm(values[:, part], axis=1) for part in (_U, _AXIS, _SOURCE)]
    if np.any(np.stack([np.abs(width), wavelength, *norms]) <= 0):
        return {}
    phi = columns["ROT"]
    axis, s0 = values[which, _AXIS], -values[which, _SOURCE] / norms[2][which, None]
    setting = np.stack([_setting(header) for header in values])[which]
    fixed = np.einsum("nij,nj->ni", setting, miller_index.astype(float))
    s1, offset = diffracted_beams(fixed * wavelength[which, None], phi, axis, s0)
    miss = float(np.median(np.abs(offset)))
    if not miss < CLOSURE:
        log.debug("batch headers give no orientation: |s1| is off by %.2g", miss)
        return {}
    sweep, first = _sweeps(numbers, values[:, _PHI], width)
    # phi may be counted from another turn than the header's
    beyond = (phi - values[which, _PHI] + 180.0) % 360.0 - 180.0
    frame = numbers[which] - first[which] + beyond / width[which]
    place = {SWEEP: sweep[which].astype(float), FRAME: frame, FRAME_WIDTH: np.abs(width)[which]}
    return place | beam_columns(s0, s1, phi, axis)


def diffracted_beams(fixed: Array, phi: Array, axis: Array, s0: Array) -> tuple[Array, Array]:
    """Return the diffracted beams of reciprocal-lattice vectors brought to their angle.

    Parameters
    ----------
    fixed : (N, 3)
        ``U B h`` times the wavelength, at phi = 0, in the laboratory.
    phi : (N,)
        [deg]
    axis, s0 : (N, 3) or (3,)
        Unit vectors along the rotation axis and the incident beam.

    Returns
    -------
    s1 : (N, 3)
        Unit vectors.
    offset : (N,)
        ``|s1| - 1`` before they are normalised: how far from the Ewald sphere.
    """
    s1 = s0 + _turn(phi, axis).apply(fixed)
    length = np.linalg.norm(s1, axis=1)
    return s1 / length[:, None], length - 1.0


def beam_columns(s0: Array, s1: Array, phi: Array, axis: Array) -> dict[str, Array]:
    """Return :data:`ZETA` and :data:`BEAMS` of unit vectors, as :func:`diffracted_beams` has."""
    undo = _turn(phi, axis).inv()
    beams = [undo.apply(np.broadcast_to(v, s1.shape)) for v in (s0, s1)]
    columns = np.concatenate(beams, axis=1).T
    return {ZETA: zeta(s0, s1, axis)} | dict(zip(BEAMS, columns, strict=True))


def _turn(phi: Array, axis: Array) -> Rotation:
    from scipy.spatial.transform import Rotation  # files without orientation do without scipy

    return Rotation.from_rotvec(np.radians(phi)[:, None] * axis)


def zeta(s0: Array, s1: Array, axis: Array) -> Array:
    """Return :data:`ZETA` of each pair of beams, (N, 3) each."""
    normal = np.cross(s1, s0)
    along = np.abs(np.einsum("ni,ni->n", normal, np.broadcast_to(axis, normal.shape)))
    return along / np.maximum(np.linalg.norm(normal, axis=1), 1e-12)


def _setting(header: Array) -> Array:
    """Return U B, (3, 3), of a batch header."""
    u = header[_U].reshape(3, 3).T  # column by column
    # a* along x, b* in the xy plane
    b = np.linalg.cholesky(reciprocal_metric(gemmi.UnitCell(*header[_CELL]))).T
    return u @ b


def _sweeps(
    numbers: NDArray[np.int64], phi: Array, width: Array
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sweep of each batch, and the number that its first batch has or would have, (n,) each.

    Batches of a sweep follow each other in number and rotation; some may be missing.
    """
    expected = phi[:-1] + np.diff(numbers) * width[:-1]
    follows = np.abs(phi[1:] - expected) < 0.5 * np.abs(width[1:])
    sweep = np.concatenate([[0], np.cumsum(~follows)])
    starts = np.flatnonzero(np.concatenate([[True], ~follows]))
    return sweep, numbers[starts][sweep]


def has_sweeps(metadata: Sequence[Mapping[str, Array]]) -> bool:
    """Whether all datasets have the places of their observations on sweeps."""
    return all(name in d for d in metadata for name in SWEEP_COLUMNS)
