"""Maps around sites and a residue, ours beside DIALS, as sections and in three dimensions."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.merge.io.mtz import MergedMtz
from braggflux.pipelines.maps.anomalous_peaks import amplitudes
from braggflux.pipelines.maps.atomic_model import Site, read_model
from braggflux.pipelines.maps.difference_map import DifferenceMap, NoMapError
from braggflux.pipelines.report.figures.panels import Panel, heatmap, line, numbers, panel
from braggflux.pipelines.report.sources import OURS, DataSource, NoDataError

Array = NDArray[np.float64]

#: Sites shown, of the strongest.
MAX_SITES = 4
#: Half the edge of a section and its step [A].
REACH, STEP = 7.0, 0.4
#: Residues whose rings show at first sight whether a density is good.
RINGS = {
    "TRP": ("CG", "CD1", "NE1", "CE2", "CZ2", "CH2", "CZ3", "CE3", "CD2"),
    "TYR": ("CG", "CD1", "CE1", "CZ", "CE2", "CD2", "OH"),
    "PHE": ("CG", "CD1", "CE1", "CZ", "CE2", "CD2"),
    "HIS": ("CG", "ND1", "CE1", "NE2", "CD2"),
}
#: In three dimensions: cubes around the strongest sites, points along an edge, step [A], and a
#: level's step [sigma].
MAX_CUBES, CUBE, CUBE_STEP, LEVEL = 16, 17, 0.4, 0.25
MAX_ATOMS = 2500
#: Sites are labelled from this share of the highest peak on.
LABELLED = 0.4


def anomalous_maps(source: DataSource) -> dict[str, DifferenceMap]:
    """Anomalous difference maps by program; the same as the peak heights are measured in."""
    model = source.anomalous_model
    found = {}
    for name, merged in source.by_program("merged").items():
        try:
            found[name] = _anomalous_map(model, merged)
        except (NoMapError, ValueError) as reason:
            if name == OURS:
                raise NoDataError(f"no anomalous map: {reason}") from reason
    return found


def _anomalous_map(model: Any, merged: MergedMtz) -> DifferenceMap:
    table = merged.table
    if table.has_coupled_differences:
        return model.coupled_map(table.miller_index, table.difference)
    return model.difference_map(table.miller_index, *amplitudes(table))


def strongest_sites(source: DataSource) -> list[tuple[Site, dict[str, float]]]:
    """Sites of the model and their heights by program, from the highest of ours."""
    maps = source.once(anomalous_maps)
    sites = source.anomalous_model.sites
    if not sites:
        raise NoDataError(source.anomalous_model.why_no_sites)
    heights = [
        {n: max(m.height_near(x) for x in site.fractional) for n, m in maps.items()}
        for site in sites
    ]
    order = sorted(range(len(sites)), key=lambda i: -heights[i][OURS])
    return [(sites[i], heights[i]) for i in order]


def anomalous_sections(source: DataSource) -> list[Panel]:
    """Sections through the strongest sites, parallel to the a b plane, a panel per program."""
    maps = source.once(anomalous_maps)
    atoms = _atoms(source)
    axes = np.eye(3)
    panels = []
    for site, heights in source.once(strongest_sites)[:MAX_SITES]:
        cell = source.merged.cell
        centre = np.array(cell.orthogonalize(gemmi.Fractional(*site.fractional[0])).tolist())
        top = max(heights.values())
        for name, density in maps.items():
            title = f"{site.residue} {site.chain}{site.seqid}, {name}: {heights[name]:.1f} σ"
            z = _section(density.grid, centre, axes)
            limits = {"zmin": -0.25 * top, "zmax": top}
            panels.append(_drawn_section(title, z, limits, _in_plane(atoms, centre, axes)))
    return panels


def density_sections(source: DataSource) -> list[Panel]:
    """Electron density in the plane of the best ordered ring, a panel per program."""
    residue, name = _best_ring(source)
    ring = np.array([residue[a][0].pos.tolist() for a in RINGS[residue.name]])
    centre = ring.mean(axis=0)
    axes = np.linalg.svd(ring - centre)[2]
    atoms = _atoms(source)
    panels = []
    for program, merged in source.by_program("merged").items():
        grid = _density(source, merged)
        if grid is None:
            continue
        z = _section(grid, centre, axes)
        title = f"{name}, {program}"
        limits = {"zmin": 0.5, "zmax": 4.0, "colorscale": "@density"}
        panels.append(_drawn_section(title, z, limits, _in_plane(atoms, centre, axes)))
    return panels


def _density(source: DataSource, merged: MergedMtz) -> gemmi.FloatGrid | None:
    """Map of |F| and the model's phases, in units of its rms."""
    table = merged.table
    f = table.f if np.isfinite(table.f).any() else np.sqrt(np.maximum(table.i_mean, 0.0))
    phase = source.anomalous_model.phases(table.miller_index)
    ok = np.isfinite(f) & np.isfinite(phase)
    if not ok.any():
        return None
    coefficient = (f[ok] * np.exp(1j * phase[ok])).astype(np.complex64)
    hkl = np.ascontiguousarray(table.miller_index[ok])
    data = gemmi.ComplexAsuData(merged.cell, merged.space_group, hkl, coefficient)
    grid = data.transform_f_phi_to_map(sample_rate=3.0)
    grid.normalize()
    return grid


def _best_ring(source: DataSource) -> tuple[gemmi.Residue, str]:
    """Return the complete ring with the lowest B factors, and its name."""
    rings = []
    for chain in _structure(source)[0]:
        for residue in chain:
            names = RINGS.get(residue.name, ())
            if names and all(a in residue for a in names):
                b = float(np.mean([residue[a][0].b_iso for a in names]))
                label = f"{residue.name} {chain.name}{residue.seqid}"
                rings.append((residue.name != "TRP", b, label, residue.clone()))
    if not rings:
        raise NoDataError("the model has no complete ring (Trp, Tyr, Phe, His) to look at")
    _, _, label, residue = min(rings, key=lambda r: r[:3])
    return residue, label


def _structure(source: DataSource) -> gemmi.Structure:
    if source.model is None:
        raise NoDataError(source.notes.get("peaks", "no model was given (--model)"))
    try:
        return read_model(source.model)
    except UserError as error:
        raise NoDataError(str(error)) from error


def _atoms(source: DataSource) -> tuple[Array, list[str]]:
    """Positions, (n, 3), and labels of the model's atoms."""
    places, labels = [], []
    for chain in _structure(source)[0]:
        for residue in chain:
            for atom in residue:
                if not atom.is_hydrogen():
                    places.append(atom.pos.tolist())
                    labels.append(f"{residue.name} {chain.name}{residue.seqid} {atom.name}")
    return np.array(places), labels


def _section(grid: gemmi.FloatGrid, centre: Array, axes: Array) -> Array:
    """Values on a square in the plane of the first two ``axes``, (slow, fast)."""
    n = int(2 * REACH / STEP) + 1
    values = np.zeros((n, n, 1), dtype=np.float32)
    step = axes.T * STEP
    origin = centre - REACH * (axes[0] + axes[1])
    transform = gemmi.Transform(gemmi.Mat33(step.tolist()), gemmi.Vec3(*origin))
    grid.interpolate_values(values, transform)
    return values[:, :, 0].T.astype(float)


def _in_plane(atoms: tuple[Array, list[str]], centre: Array, axes: Array) -> Any:
    """Atoms within 1 A of a section: their coordinates in it and labels."""
    places, labels = atoms
    local = (places - centre) @ axes.T
    near = (np.abs(local[:, :2]) < REACH).all(axis=1) & (np.abs(local[:, 2]) < 1.0)
    return local[near, 0], local[near, 1], [labels[i] for i in np.flatnonzero(near)]


def _drawn_section(title: str, z: Array, limits: dict[str, Any], atoms: Any) -> Panel:
    ticks = np.arange(len(z)) * STEP - REACH
    options = {"hovertemplate": "%{z:.1f} σ<extra></extra>", "zsmooth": "best"} | limits
    image = heatmap(z, ticks, ticks, **({"scale": "@map"} | options))
    x, y, labels = atoms
    marks = line(x, y, "", "@ink", mode="markers", text=labels)
    marks |= {"hovertemplate": "%{text}<extra></extra>"}
    marks["marker"] = {"color": "rgba(0,0,0,0)", "size": 7, "line": {"color": "@ink", "width": 1}}
    square = {"scaleanchor": "x", "constrain": "domain"}
    drawing = panel(
        title, [image, marks], "Å", "Å", y_axis=square, x_axis={"constrain": "domain"}, height=230
    )
    return drawing | {"pair": True}


def three_dimensions(source: DataSource) -> dict[str, Any]:
    """Anomalous maps around the sites and the model, for a viewer in the page.

    Returns
    -------
    dict
        ``model`` (PDB text, the backbone alone of a large one); ``size``, ``step`` [A] and
        ``level`` (sigma of a step) of the cubes of map; and for each site ``label`` (empty for the
        weaker ones), ``at``, ``origin`` [A] and ``maps``: one byte a point, base64, x slowest, by
        program.
    """
    maps = source.once(anomalous_maps)
    structure = _structure(source)
    structure.remove_hydrogens()
    structure.remove_waters()
    found = source.once(strongest_sites)[:MAX_CUBES]
    top = found[0][1][OURS]
    cell = source.merged.cell
    sites = []
    for site, height in found:
        centre = np.array(cell.orthogonalize(gemmi.Fractional(*site.fractional[0])).tolist())
        origin = centre - CUBE_STEP * (CUBE - 1) / 2
        sites.append(
            {
                "label": _short_name(site) if height[OURS] > LABELLED * top else "",
                "at": numbers(centre),
                "origin": numbers(origin),
                "maps": {name: _cube(density.grid, origin) for name, density in maps.items()},
            }
        )
    return {
        "model": _pdb_text(structure, {site.residue for site, _ in found}),
        "size": CUBE,
        "step": CUBE_STEP,
        "level": LEVEL,
        "programs": list(maps),
        "sites": sites,
    }


def _short_name(site: Site) -> str:
    return f"{site.residue} {site.chain}{site.seqid}"


def _cube(grid: gemmi.FloatGrid, origin: Array) -> str:
    """Map in a cube, in steps of :data:`LEVEL` sigma, one byte a point, base64."""
    step = (np.eye(3) * CUBE_STEP).tolist()
    values = np.zeros((CUBE, CUBE, CUBE), dtype=np.float32)
    grid.interpolate_values(values, gemmi.Transform(gemmi.Mat33(step), gemmi.Vec3(*origin)))
    steps = np.clip(values / LEVEL, 0, 255).round().astype(np.uint8)
    return base64.b64encode(steps.tobytes()).decode()


def _pdb_text(structure: gemmi.Structure, kept: Iterable[str]) -> str:
    if structure[0].count_atom_sites() > MAX_ATOMS:
        for chain in structure[0]:
            for residue in chain:
                for i in reversed(range(len(residue))):
                    if residue[i].name != "CA" and residue.name not in kept:
                        del residue[i]
        structure.remove_empty_chains()
    options = gemmi.PdbWriteOptions(minimal=True)
    return structure.make_pdb_string(options)
