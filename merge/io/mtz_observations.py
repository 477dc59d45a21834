"""Observations from unmerged MTZ files, whichever program wrote them.

Original indices come from M/ISYM where the file has it. Partials (M flag set, as MOSFLM writes
them) are summed by FRACTIONCALC; programs that sum partials themselves leave the flag unset.
"""

from __future__ import annotations

import logging
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from integrator.errors import UserError
from merge.io.observations import UnmergedData, make_unmerged
from merge.io.sweep_columns import sweep_columns
from merge.io.unmerged_mtz import load_mtz

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Intensity labels in the order of preference; profile-fitted before summed.
INTENSITY_LABELS = ("IPR", "I", "IOBS", "I-OBS", "INTENSITY", "IOBSERVED")
WAVELENGTH_LABELS = ("WAVELENGTH", "LAMBDA")
#: Labels that only rotation data have; programs that write them have applied LP already.
ROTATION_LABELS = ("LP", "ROT", "PHI")
#: M/ISYM = 256 M + ISYM.
PARTIAL_FLAG = 256
#: Total fraction of the parts of one reflection that counts as all of it (AIMLESS' default).
FULL_FRACTION = (0.95, 1.05)

#: Where the reflections of an MTZ file begin [bytes].
DATA_OFFSET = 80


def read_mtz(path: str | Path) -> UnmergedData:
    """Read observations with their original indices from an unmerged MTZ file.

    Rows that the file flags as rejected (FLAG, of MOSFLM and XDS) or without a positive sigma are
    left out. Images are the batches. Metadata are all other columns under their own labels,
    BATCH included, and :data:`~merge.io.sweep_columns.SWEEP_COLUMNS` where the batch headers of a
    sweep give them.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    UnmergedData

    Raises
    ------
    UserError
        Not a complete MTZ file, merged, without intensities or sigmas, without any usable row, or
        with partials that cannot be summed.
    """
    path = Path(path)
    mtz = load_mtz(path)
    check_complete(mtz, path)
    return observations_of(mtz, path)


def observations_of(mtz: gemmi.Mtz, path: Path) -> UnmergedData:
    """Take observations from a file in memory; its indices become the original ones."""
    isym_label = column_of_type(mtz, "Y")
    batch_label = column_of_type(mtz, "B")
    if batch_label is None:
        raise UserError(
            f"{path} is merged, or its images are unknown (no BATCH column; found "
            f"{' '.join(mtz.column_labels())}); give the unmerged file of the same data"
        )
    intensity_label, sigma_label = _intensity_labels(mtz, path)
    isym = np.array(mtz.column_with_label(isym_label)) if isym_label else np.zeros(1)
    if isym_label:
        mtz.switch_to_original_hkl()
    columns = {c.label: np.array(c, dtype=np.float64) for c in mtz.columns[3:]}
    columns.pop(isym_label, None)
    keep = columns.get("FLAG", np.zeros(mtz.nreflections)) == 0
    if not keep.all():
        log.info("%s: %d observations flagged as rejected are left out", path, np.sum(~keep))
    table = _Table(mtz.make_miller_array()[keep], {n: c[keep] for n, c in columns.items()})
    is_partial = (np.broadcast_to(isym, keep.shape)[keep].astype(int) & PARTIAL_FLAG) != 0
    if is_partial.any() and "NPART" not in columns:  # AIMLESS, which writes NPART, has summed
        table = table.sum_partials(is_partial, (batch_label, intensity_label, sigma_label), path)
    of_sweep = sweep_columns(mtz, table.miller_index, table.columns, batch_label)
    batch = table.columns.pop(batch_label)
    wavelength = next((n for n in table.columns if n.upper() in WAVELENGTH_LABELS), None)
    return make_unmerged(
        source=str(path),
        miller_index=table.miller_index,
        intensity=table.columns.pop(intensity_label),
        sigma=table.columns.pop(sigma_label),
        image_label=batch,
        wavelength=None if wavelength is None else table.columns.pop(wavelength),
        metadata=table.columns | of_sweep | {"BATCH": batch},
        cell=mtz.cell,
        space_group=mtz.spacegroup,
        name=path.stem,
        has_lp_applied=bool(set(ROTATION_LABELS) & {n.upper() for n in columns}),
    )


def check_complete(mtz: gemmi.Mtz, path: Path) -> None:
    """Refuse a file that ends within its header, which gemmi reads as far as it goes."""
    with path.open("rb") as file:
        file.seek(DATA_OFFSET + 4 * len(mtz.columns) * mtz.nreflections)
        if b"MTZENDOFHEADERS" not in file.read():
            raise UserError(
                f"{path} is not a complete MTZ file (it ends before MTZENDOFHEADERS); write it "
                "again or give another"
            )


def column_of_type(mtz: gemmi.Mtz, kind: str) -> str | None:
    """Label of the first column of a type, if there is one."""
    found = mtz.columns_with_type(kind)
    return found[0].label if len(found) else None


def _intensity_labels(mtz: gemmi.Mtz, path: Path) -> tuple[str, str]:
    """Labels of the intensity and its sigma."""
    known = {c.label.upper(): c.label for c in mtz.columns if c.type in "JR"}
    of_type = [c.label for c in mtz.columns_with_type("J")]
    label = next((known[n] for n in INTENSITY_LABELS if n in known), None)
    label = label or next(iter(of_type), None)
    if label is None:
        raise UserError(
            f"{path} has no intensity column (type J, like I or IPR); found "
            f"{' '.join(mtz.column_labels())}; give a file with intensities, amplitudes do not do"
        )
    by_name = {c.label.upper(): c.label for c in mtz.columns}
    sigma = by_name.get(f"SIG{label.upper()}") or column_of_type(mtz, "Q")
    if sigma is None:
        raise UserError(
            f"{path} has no column SIG{label} (type Q) for the intensities {label}; found "
            f"{' '.join(mtz.column_labels())}; write the file with sigmas"
        )
    return label, sigma


class _Table:
    """Rows of an MTZ file: original indices and columns by label."""

    def __init__(self, miller_index: NDArray[np.int32], columns: dict[str, Array]) -> None:
        self.miller_index, self.columns = miller_index, columns

    def sum_partials(
        self, is_partial: NDArray[np.bool_], labels: tuple[str, str, str], path: Path
    ) -> _Table:
        """Sum the parts of each reflection on neighbouring images.

        Every other column, the batch included, is that of the largest part. Reflections whose
        parts do not add up to a full one are left out.
        """
        batch_label, intensity_label, sigma_label = labels
        if "FRACTIONCALC" not in self.columns:
            raise UserError(
                f"{path} holds {is_partial.sum()} partials but no FRACTIONCALC to sum them by; "
                "sum them first (aimless with OUTPUT UNMERGED) and give its output"
            )
        batch, fraction = self.columns[batch_label], self.columns["FRACTIONCALC"]
        # A full observation is a group of its own: parts of one reflection have the same index
        # and consecutive batches.
        order = np.lexsort((batch, is_partial, *self.miller_index.T[::-1]))
        index, partial = self.miller_index[order], is_partial[order]
        starts = np.ones(len(order), dtype=bool)
        starts[1:] = (index[1:] != index[:-1]).any(axis=1) | (np.diff(batch[order]) != 1.0)
        starts[1:] |= ~partial[1:] | ~partial[:-1]
        first = np.flatnonzero(starts)
        group = np.cumsum(starts) - 1
        total = np.add.reduceat(fraction[order], first)
        is_full = ~partial[first] | ((total >= FULL_FRACTION[0]) & (total <= FULL_FRACTION[1]))
        largest = order[np.lexsort((-fraction[order], group))[first]][is_full]
        log.info(
            "%s: %d partials make up %d reflections; %d incomplete ones are left out",
            path,
            partial.sum(),
            np.sum(partial[first] & is_full),
            np.sum(~is_full),
        )
        columns = {label: column[largest] for label, column in self.columns.items()}
        columns[intensity_label] = np.add.reduceat(self.columns[intensity_label][order], first)[
            is_full
        ]
        sigma = self.columns[sigma_label][order]
        square = np.where(sigma > 0.0, sigma**2, np.nan)  # one bad part spoils the whole
        variance = np.add.reduceat(square, first)[is_full]
        columns[sigma_label] = np.sqrt(variance)
        columns["FRACTIONCALC"] = total[is_full]
        return _Table(self.miller_index[largest], columns)
