"""Metadata that the networks see: which columns, in which units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.columns import Columns
from braggflux.merge.data.feature_scaling import LOW_ANGLE, FeatureScaling, mean_and_spread
from braggflux.merge.io.observations import UnmergedData

Array = NDArray[np.float64]

#: Metadata the network is shown without being asked, where a file has them.
KNOWN_METADATA = (
    *("X", "Y", "XDET", "YDET", "xobs", "yobs", "xyzobs_x", "xyzobs_y"),
    *("Wavelength", "ROT", "ewald_offset"),
)
EWALD_OFFSETS = ("ewald_offset", "ewald_offset_invA")
RESOLUTION = "dHKL"


def metadata_columns(
    data: Sequence[UnmergedData],
    columns: Columns,
    config: MergeConfig,
    feature_scaling: FeatureScaling | None,
) -> dict[str, Array]:
    """Columns that the networks see, (N,) each, resolution first."""
    common = set.intersection(*(set(d.metadata) for d in data))
    has_wavelength = all(d.wavelength is not None for d in data)
    allowed = sorted(common | {RESOLUTION} | ({"Wavelength"} if has_wavelength else set()))
    given_names = config.metadata if feature_scaling is None else feature_scaling.names
    if given_names is None:
        known = set(allowed) if config.laue else set(allowed) - {"Wavelength"}
        wanted = [n for n in KNOWN_METADATA if n in known]
    else:
        wanted = list(given_names)
    if unknown := sorted(set(wanted) - set(allowed)):
        raise UserError(
            f"unknown metadata {', '.join(unknown)}; these files have {', '.join(allowed)}"
        )
    given = {RESOLUTION: columns.inv_d2}
    for name in wanted:
        if name == "Wavelength" and has_wavelength:
            given[name] = columns.wavelength
        elif name != RESOLUTION:
            given[name] = np.concatenate([np.asarray(d.metadata[name], float) for d in data])
            _check_complete(name, given[name])
    return given


def _check_complete(name: str, column: Array) -> None:
    """Refuse gaps: one NaN would make every amplitude NaN."""
    missing = np.count_nonzero(~np.isfinite(column))
    if missing:
        raise UserError(
            f"the metadata {name} is missing in {missing} of {len(column)} observations; leave it "
            "out of --metadata, or give files without these observations"
        )


def measure_feature_scaling(
    columns: Columns, given: Mapping[str, Array], order: NDArray[np.int64]
) -> FeatureScaling:
    """Measure the units in these data."""
    low_angle = _low_angle(columns.inv_d2[order])
    return FeatureScaling(
        float(np.mean(np.abs(columns.intensity[order]))),
        {name: mean_and_spread(column) for name, column in given.items()}
        | {LOW_ANGLE: mean_and_spread(low_angle)},
    )


def _low_angle(inv: Array) -> Array:
    """Log of d: 1/d^2 would show all low angles alike, where wavelength and beam stop matter."""
    return -0.5 * np.log(inv)


def features(
    given: Mapping[str, Array],
    feature_scaling: FeatureScaling,
    source: NDArray[np.int64],
    inv: Array,
    wavelength: Array,
) -> tuple[Array, Array]:
    """Standardised features of each term, (T, m), and its Ewald offset, (T,).

    Parameters
    ----------
    given : mapping of str to (N,)
        Of :func:`metadata_columns`.
    feature_scaling : FeatureScaling
    source : (T,)
        Observation of each term.
    inv, wavelength : (T,)
        1/d^2 and wavelength of its own harmonic.
    """
    own = {RESOLUTION: inv, "Wavelength": wavelength}
    columns = [
        feature_scaling(name, own[name] if name in own else column[source])
        for name, column in given.items()
    ]
    columns.append(feature_scaling(LOW_ANGLE, _low_angle(inv)))
    offset = np.zeros(len(source))
    for name in EWALD_OFFSETS:
        if name in given:
            offset = columns[list(given).index(name)]
            # which side of the sphere matters little, the distance much
            columns.append(np.abs(offset))
    return np.column_stack(columns).astype(np.float32), offset
