"""The anomalous difference map around the sites of the model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.cell import inv_d2
from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines.maps.anomalous_peaks import AnomalousModel, amplitudes
from braggflux.pipelines.maps.atomic_model import Site, find_sites, read_model
from braggflux.pipelines.maps.difference_map import DifferenceMap, NoMapError
from braggflux.pipelines.maps.sections import cube_around
from braggflux.pipelines.workspace.rundir import REFERENCE, RunDirectory

Array = NDArray[Any]

#: Points along an edge of the cube that is shown, and their distance [A].
POINTS, STEP = 41, 0.3


class SiteMaps:
    """Maps of a run's amplitudes, and of the reference's, made when first asked for.

    Parameters
    ----------
    run : RunDirectory
        Of one data set.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._sites: list[Site] | None = None
        self._maps: dict[str, tuple[DifferenceMap, AnomalousModel] | str] = {}

    @property
    def sites(self) -> list[Site]:
        """Sites of the model.

        Raises
        ------
        UserError
            The run had no model, or the model has no anomalous scatterer.
        """
        with self._lock:
            if self._sites is None:
                path = self._model_file()
                self._sites = find_sites(read_model(path))
                if not self._sites:
                    raise UserError(f"{path.name} has no anomalous scatterer (P or heavier)")
            return self._sites

    def site(self, number: int) -> Site:
        """Return a site by its number, from 0."""
        sites = self.sites
        if not 0 <= number < len(sites):
            raise UserError(f"no site {number}: there are {len(sites)}, from 0")
        return sites[number]

    def around(self, number: int) -> dict[str, Any]:
        """Cubes of the map around a site, the heights there, and the atoms in it."""
        site = self.site(number)
        found: dict[str, Any] = {"points": POINTS, "step": STEP, "maps": []}
        for name in ("braggflux", REFERENCE):
            try:
                density, model = self._map(name)
            except UserError as error:
                found["maps"].append({"name": name, "reason": str(error)})
                continue
            [peak] = [p for p in model.peaks_in(density) if p.label == site.label]
            cube = cube_around(density.grid, site.fractional[0], POINTS, STEP)
            found["maps"].append(
                {
                    "name": name,
                    "height": peak.peak_sigma,
                    "d_min": density.d_min,
                    "pairs": density.n_pairs,
                    "cube": np.round(cube, 2).ravel().tolist(),
                }
            )
        found["atoms"] = atoms_around(self._model_file(), site.fractional[0])
        return found

    def _model_file(self) -> Path:
        model = self._run.read_config().model
        if model is None:
            raise UserError("the run had no model (--model), so there are no phases for a map")
        return model

    def _map(self, name: str) -> tuple[DifferenceMap, AnomalousModel]:
        with self._lock:
            if name not in self._maps:
                try:
                    self._maps[name] = self._make(name)
                except (UserError, NoMapError) as error:
                    self._maps[name] = str(error)
            found = self._maps[name]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _make(self, name: str) -> tuple[DifferenceMap, AnomalousModel]:
        path = self._run.merged if name != REFERENCE else self._run.read_config().reference
        if path is None:
            raise UserError("the run had no reference (--reference)")
        merged = read_merged_mtz(path)
        table = merged.table
        if not table.is_anomalous:
            raise UserError(f"{path.name} has no Bijvoet differences")
        d_min = float(inv_d2(table.miller_index, merged.cell).max() ** -0.5)
        if (limit := self._run.read_config().extraction.d_min) is not None:
            d_min = max(limit, d_min)
        model = AnomalousModel(self._model_file(), merged.cell, merged.space_group, d_min)
        if table.has_coupled_differences:
            density = model.coupled_map(table.miller_index, table.difference, d_min)
        else:
            density = model.difference_map(table.miller_index, *amplitudes(table), d_min=d_min)
        return density, model


def atoms_around(path: Path, fractional: Array) -> list[dict[str, Any]]:
    """List atoms, no hydrogens, of a model and its mates in the cube around a point, in A."""
    structure = read_model(path)
    structure.remove_hydrogens()
    reach = STEP * (POINTS // 2)
    search = gemmi.NeighborSearch(structure[0], structure.cell, reach * 1.8).populate()
    centre = structure.cell.orthogonalize(gemmi.Fractional(*fractional))
    found = []
    for mark in search.find_atoms(centre, "\0", radius=reach * 1.75):
        atom = mark.to_cra(structure[0])
        at = structure.cell.find_nearest_pbc_position(centre, atom.atom.pos, mark.image_idx)
        relative = np.array(at.tolist()) - np.array(centre.tolist())
        if np.abs(relative).max() <= reach:
            name = f"{atom.residue.name}{atom.residue.seqid} {atom.atom.name}"
            element = atom.atom.element.name
            found.append({"name": name, "element": element, "xyz": np.round(relative, 2).tolist()})
    return found
