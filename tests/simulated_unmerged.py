"""Small unmerged MTZ files for tests of the command line: toy amplitudes, plain noise."""

from __future__ import annotations

from pathlib import Path

import gemmi
import numpy as np

FAST = ("--epochs", "10", "--set", "network_width=8")


def write_mtz(path: Path, hkl, columns, *, cell, space_group) -> Path:
    """Write columns ``{label: (type, values)}``; without M/ISYM the indices are the original."""
    mtz = gemmi.Mtz(with_base=True)
    mtz.spacegroup = gemmi.SpaceGroup(space_group)
    mtz.set_cell_for_all(gemmi.UnitCell(*cell))
    mtz.add_dataset("d").wavelength = 1.0
    for label, (kind, _) in columns.items():
        mtz.add_column(label, kind)
    values = [values for _, values in columns.values()]
    mtz.set_data(np.column_stack([hkl, *values]).astype(np.float32))
    mtz.write_to_file(str(path))
    return path


def observed(asu, rng, n_images=12, n_per_image=150):
    """Indices and columns of images whose reflections are drawn from ``asu``."""
    f2 = np.random.default_rng(99).exponential(1000.0, len(asu)) * asu.epsilon
    image = np.repeat(np.arange(n_images), n_per_image)
    row = np.concatenate(
        [rng.choice(len(asu), n_per_image, replace=False) for _ in range(n_images)]
    )
    sigma = np.full(len(image), 30.0)
    intensity = f2[row] + sigma * rng.standard_normal(len(image))
    x, y = rng.uniform(0, 1000, (2, len(image)))
    columns = {
        "I": ("J", intensity),
        "SIGI": ("Q", sigma),
        "BATCH": ("B", image + 1),
        "X": ("R", x),
        "Y": ("R", y),
    }
    return asu.miller_index[row], columns


def toy_model(path: Path, space_group: str, cell, n_atoms: int = 120) -> Path:
    """Atoms at random places, as a PDB file."""
    rng = np.random.default_rng(0)
    structure = gemmi.Structure()
    structure.cell, structure.spacegroup_hm = gemmi.UnitCell(*cell), space_group
    chain = gemmi.Chain("A")
    for number in range(n_atoms):
        atom, residue = gemmi.Atom(), gemmi.Residue()
        atom.name, atom.b_iso = "CA", 20.0
        atom.element = gemmi.Element("S" if number % 10 == 0 else "C")
        atom.pos = structure.cell.orthogonalize(gemmi.Fractional(*rng.random(3)))
        residue.name, residue.seqid = "GLY", gemmi.SeqId(str(number + 1))
        residue.add_atom(atom)
        chain.add_residue(residue)
    model = gemmi.Model("1")
    model.add_chain(chain)
    structure.add_model(model)
    structure.write_pdb(str(path))
    return path
