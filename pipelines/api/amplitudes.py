"""Merged amplitudes in an MTZ file, ours or another program's."""

from __future__ import annotations

import html
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gemmi

from braggflux.merge.io.mtz import MergedMtz, read_merged_mtz
from braggflux.pipelines.api import figures, tables
from braggflux.pipelines.api.optional import needed
from braggflux.pipelines.maps.anomalous_peaks import (
    AnomalousModel,
    amplitudes,
    peak_heights_from_mtz,
)
from braggflux.pipelines.maps.difference_map import DifferenceMap

if TYPE_CHECKING:
    import pandas
    import reciprocalspaceship
    from matplotlib.figure import Figure

PathLike = str | Path


class Amplitudes:
    """A merged MTZ file.

    It is path-like: ``open`` and the functions of this package take it for its file.

    Parameters
    ----------
    path : str or Path
        MTZ of merged amplitudes, of this program or another.

    Examples
    --------
    >>> import braggflux as bf
    >>> merged = bf.Amplitudes("run/merged.mtz")
    >>> merged.space_group.xhm()
    'P 43 21 2'
    >>> merged.table()[["F", "SIGF", "DANO"]].shape[1]
    3
    >>> merged.peaks("frames/model.pdb")["site"][0].startswith("A/")
    True
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._merged  # noqa: B018 - what cannot be read is told now

    @cached_property
    def _merged(self) -> MergedMtz:
        return read_merged_mtz(self.path)

    @property
    def cell(self) -> gemmi.UnitCell:
        """Unit cell [A, deg]."""
        return self._merged.cell

    @property
    def space_group(self) -> gemmi.SpaceGroup:
        """Space group."""
        return self._merged.space_group

    @property
    def d_min(self) -> float:
        """High-resolution limit [A]."""
        return float(self.cell.calculate_d_array(self._merged.table.miller_index).min())

    @property
    def is_anomalous(self) -> bool:
        """Whether Friedel mates were kept apart."""
        return self._merged.table.is_anomalous

    def __len__(self) -> int:
        """Return the number of unique reflections."""
        return len(self._merged.table)

    def __fspath__(self) -> str:
        """Return the path of the file."""
        return str(self.path)

    def table(self) -> pandas.DataFrame:
        """All columns of the file as a pandas table, rows by (H, K, L)."""
        mtz = gemmi.read_mtz_file(str(self.path))
        columns = {c.label: c.array.copy() for c in mtz.columns}
        found = tables.table(columns)
        indices = ["H", "K", "L"]
        return found.astype(dict.fromkeys(indices, int)).set_index(indices)

    def dataset(self) -> reciprocalspaceship.DataSet:
        """All columns of the file as a reciprocalspaceship data set."""
        with needed("data sets of reciprocalspaceship"):
            import reciprocalspaceship
        return reciprocalspaceship.read_mtz(str(self.path))

    def peaks(
        self,
        model: PathLike,
        *,
        d_min: float | None = None,
        elements: Collection[str] | None = None,
    ) -> pandas.DataFrame:
        """Heights of the anomalous difference map at the sites of a model, the highest first.

        Parameters
        ----------
        model : str or Path
            PDB or mmCIF.
        d_min : float, optional
            Leave out finer reflections [A].
        elements : collection of str, optional
            Elements of the sites; phosphorus and heavier without it.

        Returns
        -------
        pandas.DataFrame
            ``peak_sigma`` in units of the map's rms; see ``braggflux peaks``.
        """
        found = peak_heights_from_mtz(self.path, model, d_min=d_min, elements=elements)
        return tables.peak_table(found)

    def map(self, model: PathLike, *, d_min: float | None = None) -> DifferenceMap:
        """Anomalous difference map with phases of a model, in units of its rms.

        Parameters
        ----------
        model, d_min
            As :meth:`peaks`.
        """
        return self._map(model, d_min)[0]

    def _map(self, model: PathLike, d_min: float | None) -> tuple[DifferenceMap, AnomalousModel]:
        table = self._merged.table
        limit = max(self.d_min, d_min or 0.0)
        phased = AnomalousModel(model, self.cell, self.space_group, limit)
        if table.has_coupled_differences:
            return phased.coupled_map(table.miller_index, table.difference, d_min), phased
        found = phased.difference_map(table.miller_index, *amplitudes(table), d_min=d_min)
        return found, phased

    def plot_map(
        self, model: PathLike, site: str | None = None, *, d_min: float | None = None
    ) -> Figure:
        """Draw three sections of the anomalous difference map through a site.

        Parameters
        ----------
        model, d_min
            As :meth:`peaks`.
        site : str, optional
            Label like ``A/IOD205:I``; the highest site without it.
        """
        return figures.map_sections(*self._map(model, d_min), site)

    def __repr__(self) -> str:
        mates = ", F(+) and F(-)" if self.is_anomalous else ""
        return (
            f"<Amplitudes {self.path}: {len(self)} reflections{mates}, "
            f"{self.space_group.xhm()}, to {self.d_min:.2f} A>"
        )

    def facts(self) -> dict[str, Any]:
        """Say what the file holds."""
        return {
            "file": str(self.path),
            "unique reflections": len(self),
            "Friedel mates": "apart" if self.is_anomalous else "together",
            "space group": self.space_group.xhm(),
            "cell [A, deg]": " ".join(f"{x:.2f}" for x in self.cell.parameters),
            "resolution [A]": f"{self.d_min:.2f}",
        }

    def _repr_html_(self) -> str:
        return facts_html("Amplitudes", self.facts())


def facts_html(title: str, facts: dict[str, Any]) -> str:
    """Small table of names and values."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(str(k))}</th>"
        f"<td style='text-align:left'>{html.escape(str(v))}</td></tr>"
        for k, v in facts.items()
    )
    return f"<table><caption><b>{html.escape(title)}</b></caption><tbody>{rows}</tbody></table>"
