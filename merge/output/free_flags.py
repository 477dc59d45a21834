"""Test set for R_free (Brunger, 1992, Nature 355, 472), in the convention of CCP4.

Every reflection gets a number from 0 to 19 and 0 is the test set, 5 %. The number follows from the
indices and the seed alone, so that data sets of one crystal form have the same test set, whatever
their resolution, and so have all epochs of a run.

Reflections that are alike must be in the test set together or not at all, or the model is refined
against what it is tested on: symmetry equivalents, Bijvoet mates, and those that the symmetry of
the lattice relates, which overlap in a crystal that is twinned by (pseudo-)merohedry. Those of
non-crystallographic symmetry lie near each other in resolution: for these there are thin shells
(Kleywegt & Brunger, 1996, Structure 4, 897).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.crystal.symmetry import rotations
from braggflux.merge.config import MergeConfig
from braggflux.merge.io.free_flag_file import GivenFlags, read_free_flags

Indices = NDArray[Any]
Numbers = NDArray[np.int64]

N_SETS = 20
#: Largest obliquity of a two-fold axis of the lattice [deg] that a twin may have.
TWIN_TOLERANCE = 3.0
#: Shells of equal volume in the test set, where whole shells are taken.
N_TEST_SHELLS = 20


@dataclass(frozen=True)
class FreeFlags:
    """How the test set is chosen.

    Parameters
    ----------
    seed : int
    thin_shells : bool
        Whole shells of resolution make a set; their limits follow from the data.
    given : GivenFlags, optional
        Test set to be kept; the rest is for reflections that it lacks.
    """

    seed: int = 0
    thin_shells: bool = False
    given: GivenFlags | None = None

    @classmethod
    def of(cls, config: MergeConfig) -> FreeFlags:
        """Read what the settings name.

        Raises
        ------
        UserError
            Of :func:`braggflux.merge.io.free_flag_file.read_free_flags`.
        """
        given = None if config.free_r is None else read_free_flags(config.free_r)
        return cls(config.free_r_seed, config.free_r_thin_shells, given)

    @property
    def history(self) -> tuple[str, ...]:
        """Lines for the history of a file."""
        of = "shells of resolution" if self.thin_shells else "mates of the lattice alike"
        lines = (f"FreeR_flag: 0 is the test set; seed {self.seed}, {of}",)
        if self.given is None:
            return lines
        return (*lines, f"FreeR_flag: kept from {self.given.path.name}, extended by the seed")

    def check(self, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup) -> None:
        """Refuse given flags of another crystal form with a :class:`UserError`."""
        if self.given is not None:
            self.given.check(cell, space_group)

    def numbers(
        self, miller_index: Indices, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup
    ) -> Numbers:
        """Return the set of each reflection; 0 is the test set.

        Parameters
        ----------
        miller_index : (R, 3) int
            In the CCP4 asymmetric unit.
        cell : gemmi.UnitCell
        space_group : gemmi.SpaceGroup

        Returns
        -------
        ndarray, (R,) int64
        """
        alike = one_of_those_alike(miller_index, cell, space_group)
        given, n_sets = self.given, N_SETS if self.given is None else self.given.n_sets
        if self.thin_shells:
            made = _shell_numbers(inv_d2(alike, cell), n_sets, self.seed)
        else:
            made = (_hashed(alike, self.seed) % np.uint64(n_sets)).astype(np.int64)
        if given is None:
            return made
        # in the work set under any number but 0
        work = 1 + _hashed(alike, self.seed + 1) % np.uint64(n_sets - 1)
        mates = one_of_those_alike(given.miller_index, cell, space_group)
        for theirs, ours in ((mates, alike), (given.miller_index, miller_index)):
            own, is_known = _looked_up(theirs, given.number, ours)
            made = np.where(is_known, np.where(own < 0, work.astype(np.int64), own), made)
        return made


def one_of_those_alike(
    miller_index: Indices, cell: gemmi.UnitCell, space_group: gemmi.SpaceGroup
) -> NDArray[np.int64]:
    """Return the same index for all reflections that symmetry or the lattice relates, (R, 3)."""
    lattice = gemmi.find_lattice_symmetry(cell, space_group.centring_type(), TWIN_TOLERANCE)
    turns = np.array([op.rot for op in lattice.sym_ops], dtype=np.float64) / gemmi.Op.DEN
    turns = np.unique(np.concatenate([turns, rotations(space_group)]), axis=0)
    hkl = np.asarray(miller_index, dtype=np.int64)
    best, best_key = hkl, _keys(hkl)
    for turn in np.concatenate([turns, -turns]):
        image = np.rint(hkl @ turn).astype(np.int64)
        key = _keys(image)
        is_larger = key > best_key
        best, best_key = np.where(is_larger[:, None], image, best), np.maximum(key, best_key)
    return best


def _keys(hkl: Indices) -> Numbers:
    """Return a number for each index, (R,); 20 bits for each of h, k, l."""
    shifted = hkl.astype(np.int64) + 2**19
    return (shifted[:, 0] << 40) + (shifted[:, 1] << 20) + shifted[:, 2]


def _hashed(hkl: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Mix indices and seed as SplitMix64 does (Steele et al., 2014, OOPSLA), (R,)."""
    golden = 0x9E3779B97F4A7C15
    z = _keys(hkl).astype(np.uint64) + np.uint64((seed + 1) * golden % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _shell_numbers(inv_d2: NDArray[np.float64], n_sets: int, seed: int) -> Numbers:
    """Return the set of each reflection where shells of equal volume take turns, (R,)."""
    volume = inv_d2**1.5
    low, high = volume.min(), volume.max()
    share = (volume - low) / (high - low) if high > low else np.zeros_like(volume)
    return (np.floor(share * n_sets * N_TEST_SHELLS).astype(np.int64) + seed) % n_sets


def _looked_up(
    theirs: Indices, number: Numbers, ours: Indices
) -> tuple[Numbers, NDArray[np.bool_]]:
    """Return the number that ``theirs`` gives to each index of ``ours``, and whether it does."""
    keys, first = np.unique(_keys(theirs), return_index=True)
    wanted = _keys(ours)
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return number[first[place]], keys[place] == wanted
