"""Over the detector: intensity residuals, positions, profiles; and the surface of absorption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import ReflectionTable, read_reflections
from braggflux.pipelines.report.figures.panels import Panel, heatmap, line, panel
from braggflux.pipelines.report.sources import DataSource, NoDataError
from braggflux.pipelines.report.table_one import assigned

Array = NDArray[np.float64]

N_CELLS, MIN_PER_CELL = 20, 5
#: Regions of the detector along each side, spots that each profile is the mean of.
N_REGIONS, N_SPOTS = 3, 40
#: Points of the absorption surface in polar angle and azimuth.
N_POLAR, N_AZIMUTH = 25, 49


def residuals_on_detector(source: DataSource) -> list[Panel]:
    """Mean z and spread of z of the observations about their mates, by place."""
    panels = []
    for name, o in source.by_program("observations").items():
        z = assigned(o, source).z
        ok = np.isfinite(z) & np.isfinite(o.xyz[:, :2]).all(axis=1)
        if ok.sum() < 200:
            continue
        x, y = o.xyz[ok, 0], o.xyz[ok, 1]
        z = np.clip(z[ok], -6, 6)
        limits: dict[str, Any] = {"zmid": 0, "zmin": -1, "zmax": 1, "scale": "@sides"}
        panels.append(_over_detector(f"Mean z, {name}", x, y, z, **limits))
        panels.append(_over_detector(f"Mean z², {name} (1: right)", x, y, z**2, zmin=0, zmax=2.5))
    if not panels:
        raise NoDataError("the observations have no places on the detector")
    return [p | {"pair": True} for p in panels]


def _over_detector(title: str, x: Array, y: Array, value: Array, **options: Any) -> Panel:
    """Mean of ``value`` in cells of the detector, whose slow axis points down."""
    bins = [np.linspace(v.min(), v.max() + 1e-6, N_CELLS + 1) for v in (y, x)]
    n = np.histogram2d(y, x, bins)[0]
    with np.errstate(all="ignore"):
        mean = np.histogram2d(y, x, bins, weights=value)[0] / n
    mean[n < MIN_PER_CELL] = np.nan
    middle = [(b[1:] + b[:-1]) / 2 for b in bins]
    image = heatmap(mean, middle[1], middle[0], **options)
    axis = {"autorange": "reversed", "scaleanchor": "x", "constrain": "domain"}
    return panel(title, [image], "fast [px]", "slow [px]", y_axis=axis)


def positions(source: DataSource) -> list[Panel]:
    """Observed less predicted position of strong spots, against image and over the detector."""
    table = _integrated(source)
    difference, x, y, z = _shifts(table)
    frame = np.floor(z).astype(int)
    _, at = np.unique(frame // max(1, (frame.max() + 1) // 200 or 1), return_inverse=True)
    n = np.bincount(at)
    traces = []
    for k, (label, unit) in enumerate((("fast", "px"), ("slow", "px"), ("rotation", "frames"))):
        rms = np.sqrt(np.bincount(at, difference[:, k] ** 2) / n)
        image = np.bincount(at, frame) / n + 1
        total = float(np.sqrt(np.mean(difference[:, k] ** 2)))
        label = f"{label}, {total:.2f} {unit}"
        traces.append(line(image[n > 4], rms[n > 4], label, f"@{k}", mode="lines"))
    axis = {"rangemode": "tozero"}
    along = panel("Rms shift from the prediction", traces, "image", "px, frames", y_axis=axis)
    limits: dict[str, Any] = {"zmid": 0, "zmin": -0.5, "zmax": 0.5, "scale": "@sides"}
    return [
        along,
        _over_detector("Mean shift along fast [px]", x, y, difference[:, 0], **limits),
        _over_detector("Mean shift along slow [px]", x, y, difference[:, 1], **limits),
    ]


def _integrated(source: DataSource) -> ReflectionTable:
    path = source.files.integrated_refl
    if source.is_merge or not path.is_file():
        why = "a merge writes none" if source.is_merge else "it is written at the end of the run"
        raise NoDataError(f"{path.name} is not there: {why}")
    try:
        return read_reflections(path)
    except UserError as error:
        raise NoDataError(str(error)) from error


def _shifts(table: ReflectionTable) -> tuple[Array, Array, Array, Array]:
    """Shifts (n, 3) [px, px, frames] of the strong spots and where they are."""
    observed, predicted = table["xyzobs.px.value"], table["xyzcal.px"]
    variance = table["intensity.sum.variance"]
    strong = (table["intensity.sum.value"] > 10 * np.sqrt(np.maximum(variance, 1))) & (
        table["xyzobs.px.variance"] > 0
    ).all(axis=1)
    if strong.sum() < 100:
        raise NoDataError(f"only {strong.sum()} spots are strong enough, 100 needed")
    difference = np.clip((observed - predicted)[strong], -5, 5)
    return difference, *predicted[strong].T


def profiles(source: DataSource) -> list[Panel]:
    """Mean profile of strong spots in nine regions of the detector, from the shoeboxes."""
    table = source.intensities
    from braggflux.integrator.io.shoebox_store import ShoeboxStore  # HDF5, which a merge has not

    path = source.files.shoeboxes
    if not path.is_file():
        raise NoDataError(f"{path.name} is no longer there")
    metadata = table.metadata
    signal = (table.intensity / table.likelihood.variance(table.intensity).sqrt()).numpy()
    usable = table.is_integrated.numpy() & (table.flags.numpy() == 0) & (signal > 15)
    xy = metadata.xyz_px.numpy()[:, :2]
    panel_of = metadata.panel.numpy()
    usable &= panel_of == np.bincount(panel_of).argmax()
    if usable.sum() < 9 * 5:
        raise NoDataError(f"only {usable.sum()} strong, undisturbed spots")
    ends = [(xy[usable, k].min(), xy[usable, k].max() + 1) for k in (0, 1)]
    edges = [np.linspace(*end, N_REGIONS + 1) for end in ends]
    fast, slow = (np.searchsorted(edges[k], xy[:, k], side="right") - 1 for k in (0, 1))
    rng = np.random.default_rng(0)
    shapes = {}
    with ShoeboxStore.open(path) as store:
        for j, i in np.ndindex(N_REGIONS, N_REGIONS):
            rows = np.flatnonzero(usable & (fast == i) & (slow == j))
            if len(rows) < 5:
                continue
            rows = np.sort(rng.choice(rows, min(N_SPOTS, len(rows)), replace=False))
            chosen = torch.as_tensor(rows)
            batch = store.read(metadata.refl_row[chosen])
            background = table.background[chosen].numpy()
            shapes[j, i] = _mean_profile(batch.counts.numpy(), batch.is_valid.numpy(), background)
    return [_drawn_profiles(shapes)]


def _mean_profile(counts: NDArray[Any], is_valid: NDArray[np.bool_], background: Array) -> Array:
    """Mean over spots, (slow, fast), of the counts without background, each with sum 1."""
    photons = np.where(is_valid, counts - background[:, None, None, None], 0.0).sum(axis=1)
    return np.mean(photons / photons.sum(axis=(1, 2), keepdims=True), axis=0)


def _drawn_profiles(shapes: dict[tuple[int, int], Array]) -> Panel:
    """Regions side by side as they lie on the detector, each with its standard deviations."""
    height, width = next(iter(shapes.values())).shape
    tiles = np.full((N_REGIONS * (height + 1), N_REGIONS * (width + 1)), np.nan)
    notes = []
    for (j, i), shape in shapes.items():
        top, left = j * (height + 1), i * (width + 1)
        tiles[top : top + height, left : left + width] = np.sqrt(np.maximum(shape, 0))
        text = "sd {:.2f} × {:.2f} px".format(*_widths(shape))
        place = {"x": left + width / 2 - 0.5, "y": top + height - 1, "showarrow": False}
        notes.append({"text": text, "font": {"color": "#ffffff", "size": 11}} | place)
    x, y = np.arange(tiles.shape[1]), np.arange(tiles.shape[0])
    image = heatmap(tiles, x, y, "Viridis", showscale=False)
    hidden = {"visible": False, "constrain": "domain"}
    y_axis = hidden | {"autorange": "reversed", "scaleanchor": "x"}
    return panel(
        f"Mean profile in {N_REGIONS} × {N_REGIONS} regions, as they lie on the detector",
        [image],
        x_axis=hidden,
        y_axis=y_axis,
        annotations=notes,
        height=440,
        wide=True,
    )


def _widths(shape: Array) -> tuple[float, ...]:
    """Estimate the standard deviations [px] along fast and slow."""
    share = np.maximum(shape, 0) / np.maximum(shape, 0).sum()
    widths = []
    for of_axis in (share.sum(axis=0), share.sum(axis=1)):
        offset = np.arange(len(of_axis))
        centre = np.sum(of_axis * offset)
        widths.append(float(np.sqrt(np.sum(of_axis * (offset - centre) ** 2))))
    return tuple(widths)


def absorption_surface(source: DataSource) -> list[Panel]:
    """Transmission over the directions of the diffracted beam in the frame of the crystal."""
    from braggflux.merge.scale.terms.absorption import real_harmonics

    coefficients, where = _absorption(source)
    order = round(np.sqrt(len(coefficients) + 1)) - 1
    if (order + 1) ** 2 - 1 != len(coefficients):
        raise NoDataError("the file's directions were not known: there is no surface to draw")
    polar = np.linspace(0, np.pi, N_POLAR)
    azimuth = np.linspace(-np.pi, np.pi, N_AZIMUTH)
    theta, phi = np.meshgrid(polar, azimuth, indexing="ij")
    unit = np.stack(
        [np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)], axis=-1
    )
    values = real_harmonics(torch.as_tensor(unit.reshape(-1, 3)), order).numpy() @ coefficients / 2
    factor = np.exp(values - np.median(values)).reshape(theta.shape)
    limit = float(np.abs(factor - 1).max())
    image = heatmap(
        factor,
        np.degrees(azimuth),
        np.degrees(polar),
        "@sides",
        zmid=1,
        zmin=1 - limit,
        zmax=1 + limit,
    )
    title = f"Relative transmission of the diffracted beam ({where})"
    axis = {"autorange": "reversed"}
    return [panel(title, [image], "azimuth [°]", "polar angle [°]", y_axis=axis, wide=True)]


def _absorption(source: DataSource) -> tuple[Array, str]:
    """Coefficients of the surface in the last checkpoint, or the saved scales of a merge."""
    from braggflux.integrator.torch_file import load_torch

    path = _scale_file(source)
    try:
        state = load_torch(path, "delete it to go without it")
    except UserError as error:
        raise NoDataError(str(error)) from error
    for key, value in _tensors(state):
        if key.endswith("absorption.absorption"):
            return np.asarray(value.detach().double().cpu().numpy()), path.name
    raise NoDataError(f"{path.name} has no surface of absorption: the data were scaled without")


def _scale_file(source: DataSource) -> Path:
    if source.is_merge:
        path = source.files.path / "scale_model.pt"
        if path.is_file():
            return path
        raise NoDataError(f"{path.name} is not there")
    path_of_run = source.files.latest_checkpoint()
    if path_of_run is None:
        raise NoDataError("no checkpoint yet")
    return path_of_run


def _tensors(state: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Tensors of nested dicts with their joined names."""
    if not isinstance(state, dict):
        return [(prefix, state)]
    found = []
    for key, value in state.items():
        found += _tensors(value, f"{prefix}.{key}" if prefix else str(key))
    return found
