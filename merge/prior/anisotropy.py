r"""Anisotropic falloff of the mean intensity, in the form that the point group allows.

A crystal whose order differs between directions has ``log Sigma(h) = spline(1/d^2) + T(h)``,

    T(h) = -h^T M h = -1/2 s^T B s,    s = h F    [1/A], Cartesian

where F holds a*, b*, c* in its rows. For amplitudes that fall off as exp(-2 pi^2 h^T U* h)
(Trueblood et al. 1996, Acta Cryst. A52, 770), M = 4 pi^2 U* and B = 8 pi^2 U. Sigma has the
symmetry of the point group, so M lies in the tensors that its operations leave as they are:
none beside the isotropic one for cubic crystals, then 1 (trigonal, tetragonal, hexagonal),
2 (orthorhombic), 3 (monoclinic) or 5 (triclinic). The isotropic one is the spline's.
"""

from __future__ import annotations

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.reciprocal_asu import ReciprocalAsu
from braggflux.integrator.crystal.symmetry import rotations

Array = NDArray[np.float64]

#: Gaussian prior of each component of B [A^2]: ratios of a hundred at 2 A are within reach.
B_SD = 20.0


def invariant_tensors(cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> Array:
    """Orthonormal Cartesian tensors B that the point group allows, traceless, (m, 3, 3).

    The six symmetric tensors are averaged over the operations as they act on Miller indices, where
    they are integers: measured cells do not have the symmetry to the last digit.
    """
    to_cartesian = np.linalg.inv(np.array(cell.frac.mat.tolist()))  # F^-1
    rotation = rotations(space_group).astype(float)

    def average(m: Array) -> Array:
        return np.einsum("nij,jk,nlk->il", rotation, m, rotation) / len(rotation)

    def cartesian(m: Array) -> Array:
        return to_cartesian @ m @ to_cartesian.T

    def basis(i: int, j: int) -> Array:
        m = np.zeros((3, 3))
        m[i, j] = m[j, i] = 1.0
        return m

    back = np.linalg.inv(to_cartesian)
    found = [cartesian(average(back @ back.T))]
    found[0] /= np.linalg.norm(found[0])
    for i, j in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        tensor = cartesian(average(back @ basis(i, j) @ back.T))
        for known in found:
            tensor = tensor - (tensor * known).sum() * known
        size = np.linalg.norm(tensor)
        if size > 1e-6:
            found.append(tensor / size)
    return np.array(found[1:]).reshape(-1, 3, 3)


def anisotropic_design(asu: ReciprocalAsu, tensors: Array) -> Array:
    """``-1/2 s^T B s`` of each unit tensor B at each row, (R, m) [1/A^2].

    Parameters
    ----------
    asu : ReciprocalAsu
    tensors : (m, 3, 3)
        From :func:`invariant_tensors`.
    """
    s = asu.asu_index @ np.array(asu.cell.frac.mat.tolist())
    return -0.5 * np.einsum("ri,mij,rj->rm", s, tensors, s)
