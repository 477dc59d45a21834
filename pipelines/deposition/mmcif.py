"""Structure factors for deposition: mmCIF of the PDB, merged and unmerged in one block.

gemmi writes the reflections; here are the categories that it does not know of: statistics,
software and method, in the words of the PDBx dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import gemmi
import numpy as np
from gemmi import cif

from braggflux.merge.output.statistics import Row
from braggflux.pipelines.workspace.provenance import package_version

#: Key of a statistic -> item of _reflns and _reflns_shell, the factor to its unit, decimals.
STATISTICS: dict[str, tuple[str, str, float, int]] = {
    "d_max": ("d_resolution_low", "d_res_low", 1, 3),
    "d_min": ("d_resolution_high", "d_res_high", 1, 3),
    "n_unique": ("number_obs", "number_unique_obs", 1, 0),
    "n_obs": ("pdbx_number_measured_all", "number_measured_all", 1, 0),
    "completeness": ("percent_possible_obs", "percent_possible_all", 100, 2),
    "redundancy": ("pdbx_redundancy", "pdbx_redundancy", 1, 3),
    "i_over_sigma": ("pdbx_netI_over_sigmaI", "meanI_over_sigI_obs", 1, 2),
    "r_merge": ("pdbx_Rmerge_I_obs", "Rmerge_I_obs", 1, 4),
    "r_meas": ("pdbx_Rrim_I_all", "pdbx_Rrim_I_all", 1, 4),
    "r_pim": ("pdbx_Rpim_I_all", "pdbx_Rpim_I_all", 1, 4),
    "cc_half": ("pdbx_CC_half", "pdbx_CC_half", 1, 4),
    "anomalous_completeness": (
        *("pdbx_percent_possible_anomalous", "pdbx_percent_possible_anomalous", 100, 2),
    ),
    "anomalous_redundancy": ("pdbx_redundancy_anomalous", "pdbx_redundancy_anomalous", 1, 3),
    "cc_anom": ("pdbx_CC_half_anomalous", "pdbx_CC_half_anomalous", 1, 4),
}
METHOD = (
    "Photon counts of every shoebox are explained by a profile, a background and the intensity "
    "of the spot; scales, error model and amplitudes are the maximum of the evidence (ELBO) of "
    "all observations together."
)
METHOD_OF_MERGE = (
    "Scales, error model and amplitudes are the maximum of the evidence (ELBO) of all "
    "observations together."
)


def deposition_text(
    merged: gemmi.Mtz,
    unmerged: gemmi.Mtz | None,
    rows: Sequence[Row],
    software: Sequence[tuple[str, str | None, str]],
    method: str,
) -> str:
    """Write one mmCIF block.

    Parameters
    ----------
    merged, unmerged : gemmi.Mtz
        Files of this program.
    rows : sequence of dict
        Statistics of each shell, then of all.
    software : sequence of (name, version, classification)
    method : str
        How intensities became amplitudes.

    Returns
    -------
    str
    """
    writer = gemmi.MtzToCif()
    writer.with_comments, writer.free_flag_value = False, 0
    if unmerged is not None:
        unmerged.switch_to_original_hkl()  # else those of the asymmetric unit
    files = [merged] if unmerged is None else [merged, unmerged]
    text = writer.write_cif_to_string(*files)
    head, loop, reflections = text.partition("\nloop_\n_refln.")
    document = cif.read_string(head)
    block = document.sole_block()
    wavelengths = block.find_values("_diffrn_radiation_wavelength.wavelength")
    for row, wavelength in enumerate(wavelengths):
        if float(wavelength) == 0.0:  # MTZ's way to say unknown
            wavelengths[row] = "?"
    _add_software(block, software)
    _add_statistics(block, merged, rows, method)
    return f"{document.as_string()}{loop}{reflections}"


def _add_software(block: cif.Block, software: Sequence[tuple[str, str | None, str]]) -> None:
    today = date.today().isoformat()
    made_by = f"braggflux {package_version()}"
    block.set_mmcif_category(
        "_audit.",
        {"revision_id": ["1"], "creation_date": [today], "creation_method": [made_by]},
    )
    names, versions, kinds = zip(*software, strict=True)
    block.set_mmcif_category(
        "_software.",
        {
            "pdbx_ordinal": [str(k + 1) for k in range(len(names))],
            "name": list(names),
            "version": [v or None for v in versions],
            "classification": list(kinds),
            "type": ["package"] * len(names),
        },
    )


def _add_statistics(block: cif.Block, merged: gemmi.Mtz, rows: Sequence[Row], method: str) -> None:
    """Add _reflns and _reflns_shell; what is not known is ``?``."""
    *shells, overall = rows
    reflns = {
        "entry_id": "xxxx",
        "pdbx_ordinal": "1",
        "pdbx_diffrn_id": "1",
        "observed_criterion": "all measured reflections, negative intensities among them",
        "pdbx_CC_split_method": "by_observation",
        "data_reduction_details": method,
        "details": "F: posterior mean of the amplitude; I: mean of the scaled observations, free "
        "of a prior",
        "R_free_details": _lines_of(merged, "FreeR_flag"),
    }
    reflns |= {item: _text(overall, key) for key, (item, *_) in STATISTICS.items()}
    block.set_mmcif_category("_reflns.", {k: [v] for k, v in reflns.items()})
    shell = {
        "pdbx_ordinal": [str(k + 1) for k in range(len(shells))],
        "pdbx_diffrn_id": ["1"] * len(shells),
        "number_possible": [_count(row.get("n_possible")) for row in shells],
    }
    for key, (_, item, *_) in STATISTICS.items():
        shell[item] = [_text(row, key) for row in shells]
    block.set_mmcif_category("_reflns_shell.", shell)


def _text(row: Mapping[str, Any], key: str) -> str | None:
    _, _, factor, decimals = STATISTICS[key]
    value = row.get(key)
    if not isinstance(value, int | float) or not np.isfinite(value):
        return None
    return f"{factor * value:.{decimals}f}"


def _count(value: Any) -> str | None:
    return None if value is None else str(int(value))


def _lines_of(mtz: gemmi.Mtz, label: str) -> str | None:
    """Lines of the history about a column."""
    return "; ".join(line.strip() for line in mtz.history if line.startswith(label)) or None
