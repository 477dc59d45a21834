"""An atomic model as a source of phases and of sites to look at."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError, reading

Array = NDArray[np.float64]

#: Mean bulk-solvent density [e/A^3] and B factor [A^2] of proteins (Fokine & Urzhumtsev 2002).
SOLVENT_DENSITY = 0.35
SOLVENT_B = 46.0
#: Model and data cells may differ by this much and still share their phases (relative; degrees).
LENGTH_TOLERANCE = 0.015
ANGLE_TOLERANCE = 1.5
#: Phosphorus, sulfur and everything heavier scatters anomalously at usual wavelengths.
LIGHTEST_SITE = 15
#: Coordinate or length of a cell [A], B factor [A^2] or occupancy that no model has.
LARGEST = 1e5


@dataclass(frozen=True)
class Site:
    """An atom of the model, all its alternate conformers together.

    ``fractional`` is (n_conformers, 3).
    """

    chain: str
    seqid: str
    residue: str
    atom: str
    fractional: Array

    @property
    def name(self) -> tuple[str, str, str, str]:
        """(chain, seqid, residue, atom)."""
        return self.chain, self.seqid, self.residue, self.atom

    @property
    def label(self) -> str:
        """Short name, like ``A/IOD204:I``."""
        return f"{self.chain}/{self.residue}{self.seqid}:{self.atom}"


def read_model(path: str | Path) -> gemmi.Structure:
    """Read a PDB or mmCIF file.

    Raises
    ------
    UserError
        It does not exist, cannot be read, has no atoms, cell or space group, or atoms that are
        nowhere.
    """
    if not Path(path).is_file():
        raise UserError(f"model {path} does not exist; give a PDB or mmCIF file")
    with reading(f"model {path}", "give a PDB or mmCIF file"):
        structure = gemmi.read_structure(str(path))
        _require_possible(structure, path)
    structure.setup_entities()
    return structure


def _require_possible(structure: gemmi.Structure, path: str | Path) -> None:
    if len(structure) == 0 or structure[0].count_atom_sites() == 0:
        raise UserError(f"model {path} has no atoms; give a PDB or mmCIF file with coordinates")
    *sides, alpha, beta, gamma = structure.cell.parameters
    # NaN is neither
    is_cell = all(1 <= side < LARGEST for side in sides) and all(
        1 <= angle <= 179 for angle in (alpha, beta, gamma)
    )
    if not is_cell or not structure.cell.is_crystal() or structure.find_spacegroup() is None:
        raise UserError(
            f"model {path} has no unit cell or no known space group (cell "
            f"{_cell_text(structure.cell)}, space group {structure.spacegroup_hm!r}); "
            "add its CRYST1 record"
        )
    _require_finite_atoms(structure, path)


def _require_finite_atoms(structure: gemmi.Structure, path: str | Path) -> None:
    """Refuse a model of which a number would make all structure factors NaN."""
    for found in structure[0].all():
        atom = found.atom
        numbers = [*atom.pos.tolist(), atom.b_iso, atom.occ, *atom.aniso.elements_pdb()]
        # of every atom: names that are no text are noticed here
        place = f"{found.chain.name}/{found.residue.name}{found.residue.seqid}:{atom.name}"
        if not all(abs(number) < LARGEST for number in numbers):  # NaN neither
            raise UserError(
                f"model {path}: atom {place} has the position, B factor or occupancy "
                f"{', '.join(f'{number:g}' for number in numbers[:5])}; all must be numbers below "
                f"{LARGEST:g}: correct the file or give another"
            )


def check_same_crystal(
    structure: gemmi.Structure,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    path: str | Path,
) -> None:
    """Refuse a model whose phases do not hold for the data.

    Raises
    ------
    UserError
        Cell or space group differ.
    """
    check_same_form(structure.cell, structure.find_spacegroup(), cell, space_group, path)


def check_same_form(
    model_cell: gemmi.UnitCell,
    model_group: gemmi.SpaceGroup,
    cell: gemmi.UnitCell,
    space_group: gemmi.SpaceGroup,
    path: str | Path,
) -> None:
    """Refuse cells or space groups that differ.

    Raises
    ------
    UserError
    """
    if model_group.operations() != space_group.operations():
        raise UserError(
            f"model {path} is in space group {model_group.xhm()} but the data are in "
            f"{space_group.xhm()}; process the data in the model's space group and setting "
            "(--space-group) or give a model of this crystal form"
        )
    ours, theirs = np.array(cell.parameters), np.array(model_cell.parameters)
    too_long = np.abs(ours[:3] / theirs[:3] - 1) > LENGTH_TOLERANCE
    if too_long.any() or (np.abs(ours[3:] - theirs[3:]) > ANGLE_TOLERANCE).any():
        raise UserError(
            f"model {path} has the cell {_cell_text(model_cell)} but the data have "
            f"{_cell_text(cell)}; allowed are differences of {100 * LENGTH_TOLERANCE:g} % and "
            f"{ANGLE_TOLERANCE:g} degrees; give a model of this crystal form, refined against it"
        )


def _cell_text(cell: gemmi.UnitCell) -> str:
    return " ".join(f"{x:g}" for x in np.round(cell.parameters, 3))


def find_sites(structure: gemmi.Structure, elements: Collection[str] | None = None) -> list[Site]:
    """List the atoms of the first model that scatter anomalously, alternate conformers joined.

    Parameters
    ----------
    structure : gemmi.Structure
    elements : collection of str, optional
        Element symbols; phosphorus and heavier without it.

    Raises
    ------
    UserError
        Unknown element.
    """
    wanted = None if elements is None else {_atomic_number(e) for e in elements}
    conformers: dict[tuple[str, str, str, str], list[list[float]]] = {}
    for atom in structure[0].all():
        number = atom.atom.element.atomic_number
        if number >= LIGHTEST_SITE if wanted is None else number in wanted:
            residue = atom.residue
            key = (atom.chain.name, str(residue.seqid), residue.name, atom.atom.name)
            position = structure.cell.fractionalize(atom.atom.pos)
            conformers.setdefault(key, []).append(position.tolist())
    return [Site(*key, np.array(positions)) for key, positions in conformers.items()]


def _atomic_number(symbol: str) -> int:
    number = gemmi.Element(symbol).atomic_number
    if number == 0:
        raise UserError(
            f"unknown element {symbol!r}; give symbols of the periodic table, like I or S"
        )
    return number


def structure_factors(
    structure: gemmi.Structure, d_min: float
) -> tuple[NDArray[np.int32], NDArray[np.complex64]]:
    """Structure factors of atoms and flat bulk solvent, without anomalous scattering.

    Parameters
    ----------
    structure : gemmi.Structure
    d_min : float
        [A]

    Returns
    -------
    hkl : (R, 3) int32
        All in the CCP4 asymmetric unit to ``d_min``, without absences.
    value : (R,) complex64
    """
    density = gemmi.DensityCalculatorX()
    density.d_min, density.rate = d_min, 2.0
    density.grid.setup_from(structure)
    density.set_refmac_compatible_blur(structure[0])
    density.put_model_density_on_grid(structure[0])
    atoms = gemmi.transform_map_to_f_phi(density.grid, half_l=True).prepare_asu_data(
        dmin=d_min, unblur=density.blur
    )
    mask = gemmi.FloatGrid()
    mask.setup_from(structure, spacing=min(0.6, d_min / 3))
    masker = gemmi.SolventMasker(gemmi.AtomicRadiiSet.Cctbx)
    masker.put_mask_on_float_grid(mask, structure[0])
    solvent = gemmi.transform_map_to_f_phi(mask, half_l=True).prepare_asu_data(dmin=d_min)
    hkl = np.array(atoms.miller_array)
    if not np.array_equal(hkl, solvent.miller_array):
        raise RuntimeError("gemmi listed different reflections for atoms and solvent")
    stol2 = np.array(atoms.make_1_d2_array()) / 4
    smear = SOLVENT_DENSITY * np.exp(-SOLVENT_B * stol2)
    return hkl, np.array(atoms.value_array) + smear * np.array(solvent.value_array)
