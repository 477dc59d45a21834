"""Merged data for tests of the report."""

from __future__ import annotations

import numpy as np

from braggflux.merge.output.merged_table import MergedTable


def merged_table(hkl, value, sigma, minus=None) -> MergedTable:
    """Merged data of mates together, or of intensities of both where ``minus`` is given."""
    none = np.full(len(hkl), np.nan)
    is_anomalous = minus is not None
    minus = none if minus is None else minus
    f, f_minus = np.sqrt(np.maximum(value, 0)), np.sqrt(np.maximum(minus, 0))
    sigma_f, sigma_minus = sigma / (2 * f + 1), np.where(np.isfinite(minus), sigma, np.nan)
    return MergedTable(
        hkl.astype(np.int32),
        *(f, sigma_f, f_minus, sigma_minus / (2 * f_minus + 1)),
        *(value, sigma, minus, sigma_minus),
        *(f, sigma_f, value, sigma),
        *(np.full(len(hkl), 4.0), none),
        *(none, none, none, none),
        is_anomalous,
    )
