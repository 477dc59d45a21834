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

from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_split import check_only_one, split_by_wavelength, split_data
from braggflux.merge.io.formats.mtz_datasets import mtz_datasets
from braggflux.merge.io.formats.unmerged_mtz import load_mtz
from braggflux.merge.io.missing_values import without_missing
from braggflux.merge.io.observations import UnmergedData, make_unmerged
from braggflux.merge.io.sweep_columns import sweep_columns

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

#: Intensity labels in the order of preference; profile-fitted before summed.
INTENSITY_LABELS = ("IPR", "I", "IOBS", "I-OBS", "INTENSITY", "IOBSERVED")
WAVELENGTH_LABELS = ("WAVELENGTH", "LAMBDA")
#: Labels that only rotation data have; programs that write them have applied LP already.
ROTATION_LABELS = ("LP", "ROT", "PHI")
ISYM_LABELS = ("M/ISYM", "M_ISYM", "MISYM")
#: M/ISYM = 256 M + ISYM.
PARTIAL_FLAG = 256
#: Share of the rows, beside others, that may lack M/ISYM.
MOST_UNKNOWN = 0.1
#: An intensity column is passed over when it has less than this share of the fullest one's values.
MOSTLY_FULL = 0.5
#: Total fraction of the parts of one reflection that counts as all of it (AIMLESS' default).
FULL_FRACTION = (0.95, 1.05)

#: Rotation that one image may span [deg].
WIDEST_IMAGE = 5.0
#: Where the reflections of an MTZ file begin [bytes].
DATA_OFFSET = 80


def read_mtz(path: str | Path) -> UnmergedData:
    """Read the only data set of an unmerged MTZ file, as :func:`read_mtz_datasets` does.

    Raises
    ------
    UserError
        As there, or the file holds several data sets.
    """
    datasets = read_mtz_datasets(path)
    check_only_one([data.name for data in datasets], path)
    return datasets[0]


def read_mtz_datasets(path: str | Path) -> list[UnmergedData]:
    """Read observations with their original indices from an unmerged MTZ file.

    Rows that the file flags as rejected (FLAG, of MOSFLM and XDS) or without a positive sigma are
    left out; the file's own missing-number flag (VALM) is heeded. Images are the batches, and the
    data sets those of their headers (:mod:`braggflux.merge.io.formats.mtz_datasets`). Metadata are
    all other columns under their own labels, BATCH included, and
    :data:`~braggflux.merge.io.sweep_columns.SWEEP_COLUMNS` where the batch headers of a sweep give
    them.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    list of UnmergedData

    Raises
    ------
    UserError
        Not a complete MTZ file, merged, without intensities or sigmas, without any usable row,
        with partials that cannot be summed, or of several crystal forms.
    """
    path = Path(path)
    mtz = load_mtz(path)
    check_complete(mtz, path)
    return observations_of(mtz, path)


def observations_of(mtz: gemmi.Mtz, path: Path) -> list[UnmergedData]:
    """Take observations from a file in memory; its indices become the original ones."""
    isym_label, batch_label = isym_column(mtz), batch_column(mtz)
    if batch_label is None:
        raise UserError(
            f"{path} is merged, or its images are unknown (no BATCH column; found "
            f"{' '.join(mtz.column_labels())}); give the unmerged file of the same data"
        )
    is_partial = _to_original_indices(mtz, isym_label, path)
    columns = {c.label: np.array(c, dtype=np.float64) for c in mtz.columns}
    index = np.column_stack([columns.pop(c.label) for c in list(mtz.columns)[:3]])
    columns.pop(isym_label, None)
    intensity_label, sigma_label = _intensity_labels(mtz, columns, path)
    flag = columns.get("FLAG", np.zeros(mtz.nreflections))
    keep = (flag == 0) | np.isnan(flag)
    if not keep.all():
        log.info("%s: %d observations flagged as rejected are left out", path, np.sum(~keep))
    has_image = np.isfinite(index).all(axis=1) & np.isfinite(columns[batch_label])
    if not has_image.all():
        log.warning("%s: %d rows without index or batch are left out", path, np.sum(~has_image))
    keep &= has_image
    if not keep.any():
        raise UserError(
            f"{path}: none of {len(keep)} rows has an index and a batch and is not flagged as "
            "rejected; give another file"
        )
    table = _Table(index[keep].astype(np.int32), {n: c[keep] for n, c in columns.items()})
    is_partial = is_partial[keep]
    if is_partial.any() and "NPART" not in columns:  # AIMLESS, which writes NPART, has summed
        table = table.sum_partials(is_partial, (batch_label, intensity_label, sigma_label), path)
    table = table.with_places(intensity_label, sigma_label, str(path))
    of_sweep = sweep_columns(mtz, table.miller_index, table.columns, batch_label)
    batch = table.columns.pop(batch_label)
    wavelength = next((n for n in table.columns if n.upper() in WAVELENGTH_LABELS), None)
    data = make_unmerged(
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
    _say_if_one_batch(data, path)
    number = data.metadata["BATCH"].astype(np.int64)
    found = mtz_datasets(mtz, np.unique(number), intensity_label, path)
    parts = split_data(data, found.of_rows(number), found.suffixes, found.labels, found.cells)
    return [own for part in parts for own in split_by_wavelength(part)]


def _to_original_indices(mtz: gemmi.Mtz, isym_label: str | None, path: Path) -> NDArray[np.bool_]:
    """Turn indices into the observed ones; returns which rows are partials, (N,)."""
    if isym_label is None:
        return np.zeros(mtz.nreflections, dtype=bool)
    column = mtz.column_with_label(isym_label)
    value = np.nan_to_num(np.array(column, dtype=float)).astype(np.int64)
    isym, is_partial = value % PARTIAL_FLAG, (value & PARTIAL_FLAG) != 0
    unknown = isym == 0
    if unknown.all():
        # 1 is the identity; gemmi takes 0 for the inversion
        log.warning(
            "%s: %s is 0 in all rows, which takes indices nowhere: they are used as they stand",
            *(path, isym_label),
        )
    elif unknown.any():
        _say_unknown(unknown, isym_label, path)
    array = mtz.array
    index = [c.idx for c in list(mtz.columns)[:3]]
    lost = ~np.isfinite(array[:, index]).all(axis=1) | (unknown & ~unknown.all())
    array[:, column.idx] = np.where(unknown, 1, isym)
    column.label, column.type = "M/ISYM", "Y"
    try:
        mtz.switch_to_original_hkl()
    except (IndexError, RuntimeError) as error:
        raise UserError(
            f"{path}: {isym_label} names symmetry operation {(isym.max() + 1) // 2} and the file "
            f"lists {mtz.nsymop} for {mtz.spacegroup.xhm()}; write the file again with the "
            "space group that its indices were reduced in"
        ) from error
    column.label = isym_label
    mtz.array[np.ix_(lost, index)] = np.nan  # gemmi takes NaN for 0
    return is_partial


def _say_if_one_batch(data: UnmergedData, path: Path) -> None:
    """Warn of a sweep whose images have one number, and therefore one scale."""
    rot = data.metadata.get("ROT", np.zeros(1))
    if data.n_images == 1 and np.ptp(rot) > WIDEST_IMAGE:
        log.warning(
            "%s: all observations have one BATCH though ROT spans %.1f degrees: images have no "
            "scales of their own; write the image number to BATCH",
            *(path, np.ptp(rot)),
        )


def _say_unknown(unknown: NDArray[np.bool_], label: str, path: Path) -> None:
    """Warn that rows, (N,), are left out whose mate the file does not tell."""
    if unknown.mean() > MOST_UNKNOWN:
        raise UserError(
            f"{path}: {label} is 0 or missing in {unknown.sum()} of {len(unknown)} rows, so that "
            "nothing says which Friedel mate they are; write the file again with M/ISYM in all "
            "rows, or with indices as observed and without M/ISYM"
        )
    log.warning(
        "%s: %s is 0 or missing in %d of %d rows: nothing says which Friedel mate they are",
        *(path, label, unknown.sum(), len(unknown)),
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


def batch_column(mtz: gemmi.Mtz) -> str | None:
    """Label of the batch numbers: of type B, or named BATCH whatever its type."""
    named = [c.label for c in mtz.columns if c.label.upper() == "BATCH"]
    return next(iter([c.label for c in mtz.columns_with_type("B")] or named), None)


def isym_column(mtz: gemmi.Mtz) -> str | None:
    """Label of M/ISYM: of type Y, or named so whatever its type."""
    named = [c.label for c in mtz.columns if c.label.upper() in ISYM_LABELS]
    return next(iter([c.label for c in mtz.columns_with_type("Y")] or named), None)


def _intensity_labels(mtz: gemmi.Mtz, columns: dict[str, Array], path: Path) -> tuple[str, str]:
    """Labels of the intensity and its sigma: the first choice that is not nearly empty."""
    known = {c.label.upper(): c.label for c in mtz.columns if c.type in "JR"}
    of_type = [c.label for c in mtz.columns_with_type("J")]
    found = [known[n] for n in INTENSITY_LABELS if n in known]
    found += [label for label in of_type if label not in found]
    if not found:
        raise UserError(
            f"{path} has no intensity column (type J, like I or IPR); found "
            f"{' '.join(mtz.column_labels())}; give a file with intensities, amplitudes do not do"
        )
    sigmas = {label: _sigma_label(mtz, label) for label in found}
    found = [label for label in found if sigmas[label] is not None] or found[:1]
    if sigmas[found[0]] is None:
        raise UserError(
            f"{path} has no column SIG{found[0]} (type Q) for the intensities {found[0]}; found "
            f"{' '.join(mtz.column_labels())}; write the file with sigmas"
        )
    n_measured = [_n_measured(columns[label], columns[sigmas[label]]) for label in found]
    enough = next(k for k, n in enumerate(n_measured) if n >= MOSTLY_FULL * max(n_measured))
    for label, n in zip(found[:enough], n_measured, strict=False):
        log.warning("%s: %s is used, not %s: it has %d values", path, found[enough], label, n)
    return found[enough], sigmas[found[enough]]


def _sigma_label(mtz: gemmi.Mtz, label: str) -> str | None:
    by_name = {c.label.upper(): c.label for c in mtz.columns}
    others = {f"SIG{c.label.upper()}" for c in mtz.columns_with_type("J")}
    free = [c.label for c in mtz.columns_with_type("Q") if c.label.upper() not in others]
    return by_name.get(f"SIG{label.upper()}") or next(iter(free), None)


def _n_measured(intensity: Array, sigma: Array) -> int:
    """Count the rows with an intensity; a column of zeros has none."""
    with np.errstate(invalid="ignore"):
        return int(np.sum(np.isfinite(intensity) & (sigma > 0.0) & (intensity != 0.0)))


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

    def with_places(self, intensity_label: str, sigma_label: str, source: str) -> _Table:
        """Leave out rows and columns as :mod:`braggflux.merge.io.missing_values` says."""
        intensity, sigma = self.columns[intensity_label], self.columns[sigma_label]
        with np.errstate(invalid="ignore"):
            usable = np.isfinite(intensity) & np.isfinite(sigma) & (sigma > 0.0)
        columns, placed = without_missing(self.columns, usable, source)
        keep = placed | ~usable  # unusable rows are dealt with later
        return _Table(self.miller_index[keep], {n: c[keep] for n, c in columns.items()})
