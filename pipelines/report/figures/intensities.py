"""What merged intensities show: Wilson plot, twinning, pseudo-translation, anisotropy."""

from __future__ import annotations

from typing import NamedTuple

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.symmetry import epsilon, is_centric
from braggflux.merge.io.mtz import MergedMtz
from braggflux.pipelines.report.figures.panels import (
    COLOURS,
    Panel,
    Trace,
    heatmap,
    level,
    line,
    panel,
    resolution_axis,
)
from braggflux.pipelines.report.sources import OURS, DataSource, NoDataError, finite_mean

Array = NDArray[np.float64]

#: Atoms of an average residue of a protein (with its hydrogens).
RESIDUE = {"C": 5.0, "N": 1.35, "O": 1.5, "S": 0.05, "H": 8.0}
N_BINS = 30
#: B is fitted beyond this resolution, where Wilson statistics hold [A].
WILSON_D_MAX = 4.5
#: Reflections of shells with this mean I/sigma, or more, are sure enough for the L test.
L_TEST_SIGNAL = 4.0
#: Patterson function: resolution [A] and the distance from the origin that counts [A].
PATTERSON_D_MIN, PATTERSON_D_MAX, PATTERSON_DISTANCE = 5.0, 15.0, 10.0
#: Points of it that are looked at together, from the highest.
N_CANDIDATES = 20_000
#: Half the opening of the cones about the axes [deg]; I/sigma that sets the limit.
CONE_DEG, LIMIT_SIGNAL = 30.0, 2.0


def wilson_plot(source: DataSource) -> list[Panel]:
    """Log of mean intensity over that of the atoms against 1/(4 d^2), and its slope."""
    traces: list[Trace] = []
    own = _wilson(source.merged)
    for name, merged in source.by_program("merged").items():
        x, y = own if name == OURS else _wilson(merged)
        y = y + np.mean(np.interp(x, *own) - y)  # on our scale
        b = wilson_b(x, y)
        label = name if b is None else f"{name}, B {b:.1f} Å²"
        traces.append(line(x, y, label, COLOURS[name]))
    ticks = resolution_axis(4 * np.asarray(x))
    axis = {"tickvals": [t / 4 for t in ticks["tickvals"]], "ticktext": ticks["ticktext"]}
    y_title = "ln(⟨I⟩ / Σf²)"
    return [panel("Wilson plot", traces, "resolution d [Å]", y_title, x_axis=axis, wide=True)]


def _wilson(merged: MergedMtz) -> tuple[Array, Array]:
    """1/(4 d^2) and ln(mean I / (epsilon sum f^2)) of bins of equal width in 1/d^2."""
    table = merged.table
    value = _intensity(merged) / epsilon(table.miller_index, merged.space_group)
    inv_d2 = merged.cell.calculate_1_d2_array(table.miller_index)
    ok = np.isfinite(value)
    bins = np.linspace(inv_d2[ok].min(), inv_d2[ok].max() * (1 + 1e-9), N_BINS + 1)
    at = np.digitize(inv_d2[ok], bins) - 1
    n = np.bincount(at, minlength=N_BINS)[:N_BINS]
    with np.errstate(all="ignore"):
        mean = np.bincount(at, value[ok], N_BINS)[:N_BINS] / n
        middle = (bins[1:] + bins[:-1]) / 8
        y = np.log(mean / _sum_f2(middle))
    y[n < 5] = np.nan
    return middle[np.isfinite(y)], y[np.isfinite(y)]


def _sum_f2(stol2: Array) -> Array:
    total = np.zeros(len(stol2))
    for element, number in RESIDUE.items():
        factor = gemmi.Element(element).it92
        total += number * np.array([factor.calculate_sf(s) for s in stol2]) ** 2
    return total


def wilson_b(x: Array, y: Array) -> float | None:
    """B [A^2] from the slope beyond 4.5 A; None where too little lies there."""
    beyond = x > WILSON_D_MAX**-2 / 4
    if beyond.sum() < 5:
        return None
    return float(-0.5 * np.polyfit(x[beyond], y[beyond], 1)[0])


def _intensity(merged: MergedMtz) -> Array:
    table = merged.table
    return table.i_mean if np.isfinite(table.i_mean).any() else table.f**2


class LTest(NamedTuple):
    """Mean |L| and L^2 and the cumulative distribution of |L|; ``n`` pairs."""

    mean: float
    mean_square: float
    x: Array
    y: Array
    n: int


def l_test(merged: MergedMtz) -> LTest:
    """L test of Padilla & Yeates (2003), L = (I1 - I2) / (I1 + I2) of acentric neighbours.

    Neighbours differ by 2 in one index (by 3 in lattices that 2 leaves), so that centring,
    screw axes and pseudo-translations by halves do not enter.

    Raises
    ------
    NoDataError
        Too few pairs.
    """
    table = merged.table
    value, sigma = _intensity(merged), table.sigma_i_mean
    keep = np.isfinite(value) & ~is_centric(table.miller_index, merged.space_group)
    keep &= _well_measured(merged, value, sigma)
    operations = merged.space_group.operations()
    asu = gemmi.ReciprocalAsu(merged.space_group)
    known = {tuple(h): v for h, v in zip(table.miller_index.tolist(), value, strict=True)}
    step = 3 if merged.space_group.centring_type() in "RH" else 2
    pairs = []
    for h in np.flatnonzero(keep):
        index = table.miller_index[h].tolist()
        for axis in range(3):
            other = index.copy()
            other[axis] += step
            mate = known.get(tuple(other))
            if mate is None:
                mate = known.get(tuple(asu.to_asu(other, operations)[0]))
            if mate is not None and np.isfinite(mate):
                pairs.append((value[h], mate))
    if len(pairs) < 200:
        raise NoDataError(f"only {len(pairs)} pairs of well measured neighbours, 200 needed")
    first, second = np.maximum(np.array(pairs), 0.0).T
    l = np.abs(first - second)[first + second > 0] / (first + second)[first + second > 0]
    x = np.linspace(0, 1, 41)
    y = np.searchsorted(np.sort(l), x, side="right") / len(l)
    return LTest(float(l.mean()), float((l**2).mean()), x, y, len(l))


def _well_measured(merged: MergedMtz, value: Array, sigma: Array) -> NDArray[np.bool_]:
    """Reflections of the shells where the mean I/sigma is high enough."""
    inv_d2 = merged.cell.calculate_1_d2_array(merged.table.miller_index)
    order = np.argsort(inv_d2)
    keep = np.zeros(len(value), dtype=bool)
    for shell in np.array_split(order, 20):
        signal = finite_mean(value[shell] / sigma[shell])
        keep[shell] = signal is None or signal >= L_TEST_SIGNAL
    return keep


def twinning(source: DataSource) -> list[Panel]:
    """Cumulative distribution of |L| beside those of no and of perfect twinning."""
    found = source.once(own_l_test)
    x = found.x
    traces = [
        line(x, found.y, f"data, ⟨|L|⟩ {found.mean:.3f}", "@0", mode="lines"),
        line(x, x, "no twin, 0.500", "@soft", mode="lines", dash="dot"),
        line(x, x * (3 - x**2) / 2, "perfect twin, 0.375", "@1", mode="lines", dash="dash"),
    ]
    laws = _twin_laws(source.merged)
    note = f"{found.n} pairs; twin laws that the lattice allows: {laws}"
    return [panel("L test", traces, "|L|", "fraction below") | {"note": note}]


def own_l_test(source: DataSource) -> LTest:
    """L test of our merged intensities."""
    return l_test(source.merged)


def _twin_laws(merged: MergedMtz) -> str:
    laws = gemmi.find_twin_laws(merged.cell, merged.space_group, 3.0, False)
    return ", ".join(law.as_hkl().triplet() for law in laws) or "none"


class PattersonPeak(NamedTuple):
    """Highest peak away from the origin: share of the origin's height, place, a section."""

    height: float
    at: tuple[float, float, float]
    section: Array


def patterson_peak(source: DataSource) -> PattersonPeak:
    """Patterson function of 15 to 5 A, without its origin's surroundings.

    Raises
    ------
    NoDataError
        Too few reflections.
    """
    merged = source.merged
    table, cell = merged.table, merged.cell
    value = _intensity(merged)
    d = cell.calculate_d_array(table.miller_index)
    ok = np.isfinite(value) & (d > PATTERSON_D_MIN) & (d < PATTERSON_D_MAX)
    if ok.sum() < 100:
        raise NoDataError(f"only {ok.sum()} reflections between 15 and 5 Å, 100 needed")
    hkl, value = table.miller_index[ok], value[ok]
    rotations = [np.array(o.rot) // o.DEN for o in merged.space_group.operations().sym_ops]
    turned = [hkl @ rotation for rotation in rotations]
    reach = np.abs(turned).max(axis=(0, 1))
    size = np.maximum(8, 2 ** np.ceil(np.log2(2.5 * reach + 1))).astype(int)
    box = np.zeros(size)
    for index in turned:
        for sign in (1, -1):
            box[tuple((sign * index % size).T)] = value
    patterson = np.fft.fftn(box).real
    patterson /= patterson[0, 0, 0]
    for start in range(0, patterson.size, N_CANDIDATES):
        order = np.argsort(patterson, axis=None)[::-1][start : start + N_CANDIDATES]
        places = np.stack(np.unravel_index(order, patterson.shape), axis=1) / size
        far = np.flatnonzero(_from_origin(places, cell) > PATTERSON_DISTANCE)
        if len(far):
            best = order[far[0]]
            place = tuple(places[far[0]].tolist())
            w = np.unravel_index(best, patterson.shape)[2]
            return PattersonPeak(float(patterson.flat[best]), place, patterson[:, :, w])
    raise NoDataError("the cell is too small: all of it lies near the origin")


def _from_origin(fractional: Array, cell: gemmi.UnitCell) -> Array:
    """Shortest distance [A] to a lattice point, (n,), in an oblique cell too."""
    matrix = np.array(cell.orth.mat.tolist()).T
    near = fractional - np.round(fractional)
    shifts = np.array(list(np.ndindex(3, 3, 3))) - 1
    return np.min([np.linalg.norm((near + s) @ matrix, axis=-1) for s in shifts], axis=0)


def pseudo_translation(source: DataSource) -> list[Panel]:
    """Section of the Patterson function through its highest peak away from the origin."""
    peak = source.once(patterson_peak)
    u, v = (np.arange(n) / n for n in peak.section.shape)
    at = ", ".join(f"{x:.2f}" for x in peak.at)
    limit = max(0.3, float(peak.height))
    image = heatmap(
        peak.section.T,
        u,
        v,
        "@sides",
        zmid=0,
        zmin=-limit,
        zmax=limit,
    )
    title = f"Patterson section, peak {100 * peak.height:.0f} % of the origin at ({at})"
    square = {"scaleanchor": "x", "constrain": "domain"}
    return [panel(title, [image], "u", "v", y_axis=square, x_axis={"constrain": "domain"})]


def anisotropy(source: DataSource) -> list[Panel]:
    """I/sigma against resolution in cones about the three axes of the reciprocal cell."""
    curves = source.once(directional_signal)
    traces = [
        line(x, y, f"{axis}, to {_limit_text(limit)}", f"@{k}")
        for k, (axis, (x, y, limit)) in enumerate(curves.items())
    ]
    x = next(iter(curves.values()))[0]
    shapes = [level(LIMIT_SIGNAL)]
    axis = resolution_axis(x)
    title = "Mean I/σ(I) along the axes"
    return [panel(title, traces, "resolution d [Å]", "", x_axis=axis, shapes=shapes)]


def _limit_text(limit: tuple[float, bool]) -> str:
    return f"{limit[0]:.2f} Å{'' if limit[1] else ' or beyond'}"


def directional_signal(source: DataSource) -> dict[str, tuple[Array, Array, tuple[float, bool]]]:
    """Curve of mean I/sigma along each axis; the limit [A] and whether the data reach past it.

    The limit is where the mean I/sigma falls below 2 for good.
    """
    merged = source.merged
    table, cell = merged.table, merged.cell
    ratio = _intensity(merged) / table.sigma_i_mean
    recip = table.miller_index @ np.array(cell.frac.mat.tolist())
    inv_d2 = (recip**2).sum(axis=1)
    ok = np.isfinite(ratio) & (inv_d2 > 0)
    if ok.sum() < 300:
        raise NoDataError("too few reflections")
    edges = np.linspace(inv_d2[ok].min() ** 1.5, inv_d2[ok].max() ** 1.5, 13) ** (2 / 3)
    shell = np.clip(np.searchsorted(edges, inv_d2, side="right") - 1, 0, len(edges) - 2)
    middle = (edges[1:] + edges[:-1]) / 2
    rotations = [np.array(o.rot) / o.DEN for o in merged.space_group.operations().sym_ops]
    curves = {}
    for k, axis in enumerate(("a*", "b*", "c*")):
        direction = np.array(cell.frac.mat.tolist())[k]
        direction = direction / np.linalg.norm(direction)
        cosine = np.zeros(len(ratio))
        for rotation in rotations:
            turned = (table.miller_index @ rotation) @ np.array(cell.frac.mat.tolist())
            cosine = np.maximum(cosine, np.abs(turned @ direction) / np.sqrt(inv_d2))
        inside = ok & (cosine > np.cos(np.radians(CONE_DEG)))
        n = np.bincount(shell[inside], minlength=len(middle))
        with np.errstate(all="ignore"):
            y = np.bincount(shell[inside], ratio[inside], len(middle)) / n
        y[n < 5] = np.nan
        above = np.flatnonzero(y >= LIMIT_SIGNAL)
        last = int(above[-1]) if len(above) else 0
        passed = last < len(middle) - 1 and bool(np.isfinite(y[last + 1 :]).any())
        limit = float(edges[last + 1] ** -0.5)
        curves[axis] = (middle, y, (limit, passed))
    return curves
