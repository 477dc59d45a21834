"""Unmerged observations in mmCIF files, as deposited and as DIALS, gemmi and autoPROC write them.

Two categories hold them: ``diffrn_refln`` and, of the next version of the dictionary,
``pdbx_diffrn_unmerged_refln``. Indices are the original ones, and intensities free of the Lorentz
and polarization factors.
"""

from __future__ import annotations

import re
from pathlib import Path

import gemmi
import numpy as np
from gemmi import cif
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError, brief
from braggflux.merge.io.dataset_split import split_sets
from braggflux.merge.io.formats.text_files import stem_of
from braggflux.merge.io.formats.unmerged_mtz import offsets_of
from braggflux.merge.io.observations import UnmergedData, make_unmerged

Array = NDArray[np.float64]

#: Categories of unmerged observations, and in each the names of an item in order of preference.
CATEGORIES = {
    "_diffrn_refln.": {
        "h": ("index_h",),
        "k": ("index_k",),
        "l": ("index_l",),
        "intensity": ("intensity_net",),
        "sigma": ("intensity_sigma", "intensity_u", "intensity_net_su"),
        "scan": ("diffrn_id",),
        "image": ("pdbx_image_id", "batch_id"),
        "XDET": ("pdbx_detector_x",),
        "YDET": ("pdbx_detector_y",),
        "ROT": ("pdbx_scan_angle",),
    },
    "_pdbx_diffrn_unmerged_refln.": {
        "h": ("index_h",),
        "k": ("index_k",),
        "l": ("index_l",),
        "intensity": ("intensity_meas", "intensity_prf", "intensity_sum"),
        "sigma": ("intensity_sigma", "intensity_prf_sigma", "intensity_sum_sigma"),
        "scan": ("scan_id",),
        "first": ("image_id_begin",),
        "last": ("image_id_end",),
        "ROT": ("scan_angle_reflection",),
        "partiality": ("partiality",),
    },
}
#: The name of the first block, after comments.
_FIRST_LINE = re.compile(rb"(\s*#[^\n]*\n|\s)*data_", re.IGNORECASE)
_REQUIRED = ("h", "k", "l", "intensity", "sigma")
_METADATA = ("XDET", "YDET", "ROT", "partiality")
_CELL = [
    *(f"length_{axis}" for axis in "abc"),
    *(f"angle_{a}" for a in ("alpha", "beta", "gamma")),
]
_SPACE_GROUP = (
    "_space_group.name_H-M_alt",
    "_symmetry.space_group_name_H-M",
    "_space_group.IT_number",
    "_symmetry.Int_Tables_number",
)


def is_cif(head: bytes) -> bool:
    """Whether a file begins like a CIF file."""
    return _FIRST_LINE.match(head) is not None


def read_mmcif(
    path: str | Path,
    space_group: gemmi.SpaceGroup | None = None,
    cell: gemmi.UnitCell | None = None,
) -> list[UnmergedData]:
    """Read all unmerged observations of a file.

    Metadata: ``BATCH`` (the image; of later scans, beginning at a thousand of its own) and what
    the file has of ``XDET YDET ROT partiality``.

    Parameters
    ----------
    path : str or Path
        May be compressed (gzip).
    space_group : gemmi.SpaceGroup, optional
        Instead of that of the file.
    cell : gemmi.UnitCell, optional
        Of a file that does not say it.

    Returns
    -------
    list of UnmergedData
        One for each wavelength.

    Raises
    ------
    UserError
        Not a CIF file, merged, or without images, cell or space group.
    """
    path = Path(path)
    try:
        document = cif.read(str(path))
    except Exception as error:  # of whatever a decoder raises
        raise UserError(
            f"{path} is not a readable CIF file ({brief(error)}); give another"
        ) from error
    found = [(b, c) for b in document for c in CATEGORIES if b.find_values(f"{c}index_h")]
    if not found:
        raise UserError(
            f"{path} holds no unmerged observations (diffrn_refln); merged ones are not enough: "
            "give a file with both, or the unmerged MTZ file"
        )
    return [
        part
        for number, (block, category) in enumerate(found)
        for part in _Block(document, block, category, path).read(
            space_group,
            cell,
            stem_of(path) if len(found) == 1 else f"{stem_of(path)}_{number + 1}",
        )
    ]


class _Block:
    """One block with unmerged observations."""

    def __init__(
        self, document: cif.Document, block: cif.Block, category: str, path: Path
    ) -> None:
        self.document, self.block, self.path = document, block, path
        self.columns = {}
        for name, items in CATEGORIES[category].items():
            for item in items:
                if values := list(block.find_values(category + item)):
                    convert = cif.as_string if name == "scan" else cif.as_number
                    self.columns[name] = np.array([convert(value) for value in values])
                    break

    def read(
        self, space_group: gemmi.SpaceGroup | None, cell: gemmi.UnitCell | None, name: str
    ) -> list[UnmergedData]:
        columns = self.columns
        if missing := [item for item in _REQUIRED if item not in columns]:
            raise UserError(
                f"{self.path} has no {', '.join(missing)} of unmerged observations; give a file "
                "with intensities and their sigmas"
            )
        scan = columns.setdefault("scan", np.full(len(columns["h"]), "1"))
        index, image = np.stack([columns[axis] for axis in "hkl"], axis=1), self._image(scan)
        keep = np.isfinite(index).all(axis=1) & np.isfinite(image)
        if not keep.any():
            raise UserError(f"{self.path}: no observation has its index and image; give another")
        columns = {key: column[keep] for key, column in columns.items()}
        index, image = index[keep], image[keep]
        scans, which = _in_order(columns["scan"])
        images = [image[which == i] for i in range(len(scans))]
        offsets = offsets_of([(int(i.min()), int(i.max())) for i in images])
        batch = image + np.array(offsets)[which]
        cells = {i: self._cell(scan, cell) for i, scan in enumerate(scans.tolist())}
        metadata = {key: columns[key] for key in _METADATA if key in columns}
        data = make_unmerged(
            source=str(self.path),
            miller_index=index,
            intensity=columns["intensity"],
            sigma=columns["sigma"],
            image_label=batch,
            metadata=metadata | {"BATCH": batch},
            wavelength=None,
            cell=cells[0],
            space_group=space_group or self._space_group(cells[0]),
            name=name,
            has_lp_applied=True,
        )
        wavelengths = {i: self._wavelength(scan) for i, scan in enumerate(scans.tolist())}
        return split_sets(data, batch, which, wavelengths, cells)

    def _image(self, scan: NDArray[np.str_]) -> Array:
        """Image of each observation, (N,), from its angle where only a range is given."""
        columns = self.columns
        if "image" in columns:
            return columns["image"]
        if not {"first", "last"} <= columns.keys():
            raise UserError(
                f"{self.path} does not say on which image an observation is (pdbx_image_id); "
                "merging needs that: give the unmerged MTZ file"
            )
        image = np.ceil((columns["first"] + columns["last"]) / 2)
        names = ("scan_id", "image_id_begin", "image_id_end", "scan_angle_begin", "scan_angle_end")
        for row in self.block.find("_pdbx_diffrn_scan.", names):
            first, last, start, end = (cif.as_number(row[i]) for i in range(1, 5))
            rows = (scan == row[0]) & ("ROT" in columns)
            if rows.any() and end != start:
                turned = (columns["ROT"][rows] - start) / (end - start)
                image[rows] = first + np.floor(turned * (last - first + 1))
                image[rows] = np.clip(image[rows], first, last)
        return image

    def _cell(self, scan: str, given: gemmi.UnitCell | None) -> gemmi.UnitCell:
        """Cell of a scan, else of the block, else of another block, else as given."""
        values = [self._of_scan(scan, f"cell_{name}") for name in _CELL]
        for block in (self.block, *self.document):
            if not all(value > 0 for value in values):
                values = [
                    cif.as_number(block.find_value(f"_cell.{name}") or "?") for name in _CELL
                ]
        if all(value > 0 for value in values):
            return gemmi.UnitCell(*values)
        if given is None:
            raise UserError(
                f"{self.path} does not say its cell (_cell.length_a); give it with --unit-cell, "
                "for example 79.4,79.4,37.8,90,90,90"
            )
        return given

    def _of_scan(self, scan: str, item: str) -> float:
        """Item of pdbx_diffrn_unmerged_cell that belongs to a scan; NaN without one."""
        category = "_pdbx_diffrn_unmerged_cell."
        rows = self.block.find(category, ["ordinal", "crystal_id", item])
        crystal = {
            row[0]: row[1]
            for row in self.block.find("_pdbx_diffrn_scan.", ["scan_id", "crystal_id"])
        }
        for column, wanted in ((0, str(scan)), (1, crystal.get(str(scan)))):
            # DIALS writes one row for each scan
            if column == 0 and len(rows) != len(crystal):
                continue
            for row in rows:
                if row[column] == wanted:
                    return cif.as_number(row[2])
        return float("nan")

    def _space_group(self, cell: gemmi.UnitCell) -> gemmi.SpaceGroup:
        for block in (self.block, *self.document):
            for item in _SPACE_GROUP:
                text = cif.as_string(block.find_value(item) or "?")
                if text.isdigit() and int(text):
                    text = gemmi.SpaceGroup(int(text)).hm
                group = text and gemmi.find_spacegroup_by_name(text, cell.alpha, cell.gamma)
                if group:
                    return group
        raise UserError(
            f"{self.path} does not say its space group; give it with --space-group, for example "
            "P43212"
        )

    def _wavelength(self, scan: str) -> float:
        """Wavelength of a scan [A]; 0 where unknown."""
        own = self._of_scan(scan, "wavelength")
        if own > 0:
            return own
        known = self.block.find("_diffrn_radiation_wavelength.", ["id", "wavelength"])
        of_id = {row[0]: cif.as_number(row[1]) for row in known}
        used = self.block.find("_diffrn_radiation.", ["diffrn_id", "wavelength_id"])
        of_scan = {row[0]: of_id.get(row[1], 0.0) for row in used}
        value = of_scan.get(scan)
        if value is None and len(of_id) == 1:
            (value,) = of_id.values()
        if value is None:
            text = cif.as_string(
                self.block.find_value("_diffrn_source.pdbx_wavelength_list") or "?"
            )
            value = cif.as_number(text)
        return value if value is not None and value > 0 else 0.0


def _in_order(scan: NDArray[np.str_]) -> tuple[NDArray[np.str_], NDArray[np.int64]]:
    """Name of each scan, by number or as they come, and which each observation is of, (N,)."""
    names, first, which = np.unique(scan, return_index=True, return_inverse=True)
    numbers = np.array([cif.as_number(name) for name in names.tolist()])
    order = np.argsort(numbers if np.isfinite(numbers).all() else first)
    return names[order], np.argsort(order)[which]
