"""Anomalous peak heights at the sites of a model, as CSV on standard output.

Anomalous difference Fourier with phases of the model, in units of the map's rms; the maximum
within 1 A of each site. Coefficients are DANO exp(i (phi - 90 deg)) where the file has the coupled
difference of a double-Wilson merge (difference: coupled), else w (|F+| - |F-|) exp(i (phi - 90
deg)) with weights from the errors (own), whose height is in peak_sigma_own in any case.

Examples
--------
braggflux peaks run/merged.mtz model.pdb
braggflux peaks merged.mtz model.pdb --d-min 2.0 --elements I,S > peaks.csv
"""

from __future__ import annotations

import argparse
from pathlib import Path

from braggflux.pipelines.config import schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the files, the resolution limit and the elements."""
    parser.add_argument("mtz", type=Path, metavar="MERGED.mtz")
    parser.add_argument("model", type=Path, metavar="MODEL.pdb")
    parser.add_argument("--d-min", metavar="D", help="high-resolution limit [A]")
    parser.add_argument(
        "--elements", metavar="I,S", help="elements of the sites [phosphorus and heavier]"
    )


def run(args: argparse.Namespace) -> None:
    """Score and write rows."""
    d_min = schema.coerce(args.d_min, float | None, "--d-min")
    elements = schema.coerce(args.elements or (), tuple[str, ...], "--elements")

    from braggflux.pipelines.maps.anomalous_peaks import peak_heights_from_mtz
    from braggflux.pipelines.report.terminal import write_csv
    from braggflux.pipelines.workspace.file_sums import tell_changed

    tell_changed([args.mtz])
    peaks = peak_heights_from_mtz(args.mtz, args.model, d_min=d_min, elements=elements or None)
    columns = ("chain", "seqid", "residue", "atom", "peak_sigma", "difference", "peak_sigma_own")
    rows = [[getattr(peak, column) for column in columns] for peak in peaks]
    write_csv(columns, rows)
