"""Extraction from beginning to end: predict, measure the spots, cut the boxes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, ReflectionTable, place_on_scans
from braggflux.integrator.io.dials.sweeps import images_of, require_distinct, sweeps_of
from braggflux.integrator.io.images import FrameSource, open_transient_frames
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.memory import available_bytes
from braggflux.integrator.prediction.predict import (
    Prediction,
    detector_limit,
    predict_reflections,
    prediction_from_columns,
    require_recorded,
)
from braggflux.integrator.prediction.rocking import frame_sigma
from braggflux.integrator.processes import ALONE, Processes
from braggflux.integrator.shoebox.cutting.parts import Workforce
from braggflux.integrator.shoebox.extent import SpotExtent, measure_extent
from braggflux.integrator.shoebox.extract import Progress, extract_shoeboxes
from braggflux.integrator.shoebox.mask import MaskSettings
from braggflux.integrator.shoebox.sweep import Sweep
from braggflux.integrator.version import software

Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

MIN_ROWS = 10
"""Fewer reflections than these, of more, mean that the resolution limit is a mistake."""
BYTES_PER_PIXEL = 50
"""Of a frame, that its extraction takes."""
NEIGHBOUR_RESOLUTION = 0.9
"""Spots are predicted to this part of the smallest d of the list, to know all its neighbours."""


def run_extraction(
    experiments: Sequence[Experiment],
    d_min: float | None,
    out: str | Path,
    *,
    d_max: float | None = None,
    reflections: ReflectionTable | None = None,
    extent_override: SpotExtent | None = None,
    n_sigma: float = 4.0,
    box: tuple[int, int, int] | None = None,
    settings: MaskSettings | None = None,
    find_defects: bool = True,
    model_neighbours: bool = True,
    frame_source: Callable[[Experiment], FrameSource] = open_transient_frames,
    n_workers: int = 1,
    processes: Processes = ALONE,
    progress: Progress | None = None,
) -> ShoeboxStore:
    """Predict reflections, measure the spot size and write the shoebox store.

    Parameters
    ----------
    experiments : sequence of Experiment
        Sweeps; they share one box, the largest needed. Stills and members without a crystal are
        left out: :func:`~braggflux.integrator.io.dials.sweeps.sweeps_of`.
    d_min : float or None
        Resolution limit [A]; ``None`` for all that the detector records.
    out : str or Path
        The store.
    d_max : float, optional
        Low-resolution limit [A].
    reflections : ReflectionTable, optional
        As read, its frames DIALS' array indices. A predicted or integrated table gives the
        positions. Any other (strong, indexed, refined) must agree with the experiments, and the
        full set is predicted.
    extent_override : SpotExtent, optional
        Instead of measuring.
    n_sigma : float
        Half size of the box in standard deviations of the spot.
    box : (int, int, int), optional
        (frames, slow, fast), odd, instead of what ``n_sigma`` gives.
    settings : MaskSettings, optional
    find_defects : bool
        Leave out zingers, hot pixels and shadows that the masks of the frames do not know.
    model_neighbours : bool
        Model the photons of overlapping spots together; else their voxels are masked.
    frame_source : callable
        Opens the frames of an experiment.
    n_workers : int
        Processes to start, which share the frames.
    processes : Processes
        Those that share the frames already; then no workers are started.
    progress : callable, optional
        Called with (frames done, frames in all) during the extraction.

    Returns
    -------
    ShoeboxStore
        Opened.

    Raises
    ------
    UserError
        See the steps; also when ``d_min`` is beyond what the detector records.
    """
    settings = settings or MaskSettings()
    if not model_neighbours:
        settings = replace(settings, shared=0.0)
    usable = sweeps_of(experiments)
    require_distinct(usable)
    if len(usable) < len(experiments):
        logger.warning(
            "%d of %d experiments, stills or without a crystal, are left out",
            *(len(experiments) - len(usable), len(experiments)),
        )
    tables = None if reflections is None else _tables_of_sweeps(experiments, reflections)
    experiments = usable
    is_full = reflections is not None and is_full_set(reflections)
    predictions = _positions(experiments, tables, is_full, (d_min, d_max))
    with ExitStack() as stack, _in_memory(experiments, n_workers):
        sweeps = []
        for experiment, prediction in zip(experiments, predictions, strict=True):
            frames = stack.enter_context(frame_source(experiment))
            _check_frames(experiment, frames)
            sweeps.append(Sweep(experiment, frames, prediction))
        limit = d_min if d_min is not None else min(map(detector_limit, experiments))
        extent = extent_override or processes.from_first(
            lambda: measure_extent(sweeps, n_sigma=n_sigma, find_hot=find_defects)
        )
        if box is not None:
            extent = replace(extent, box=box)
        logger.info(
            "%d reflections, boxes of %d frames x %d x %d pixels",
            sum(map(len, predictions)),
            *extent.box,
        )
        return extract_shoeboxes(
            [_with_neighbours(sweep, experiments, extent, settings) for sweep in sweeps],
            extent,
            out,
            settings=settings,
            find_defects=find_defects,
            workforce=Workforce(n_workers, processes, lambda s: frame_source(s.experiment)),
            attributes={"software": software(), "d_min": limit},
            progress=progress,
        )


@contextmanager
def _in_memory(experiments: Sequence[Experiment], n_workers: int) -> Iterator[None]:
    """Say what frames need when the memory does not suffice, before if possible."""
    n = max(sum(p.image_size[0] * p.image_size[1] for p in e.panels) for e in experiments)
    needed, left = n * BYTES_PER_PIXEL * n_workers, available_bytes()
    each = f" in {n_workers} processes" if n_workers > 1 else ""
    message = (
        f"not enough memory: frames of {n / 1e6:.1f} megapixels{each} need about "
        f"{needed / 1e9:.2g} GB "
        f"beside half a GB for the program, {left / 1e9:.2g} GB are free; end other programs, "
        "give more with --max-memory, or take a machine with more"
    )
    if needed > left:
        raise UserError(message)
    try:
        yield
    except MemoryError as error:
        raise UserError(message) from error


def is_full_set(table: ReflectionTable) -> bool:
    """Whether a table holds all reflections, not only the strong ones.

    An integrated table has integration flags; a predicted one has no strong spot at all.
    """
    if "xyzcal.px" not in table or "flags" not in table:
        return False
    predicted_only = not table.has_flag(DialsFlag.STRONG | DialsFlag.OBSERVED).any()
    return bool(table.has_flag(DialsFlag.INTEGRATED).any() or predicted_only)


def _tables_of_sweeps(
    experiments: Sequence[Experiment], table: ReflectionTable
) -> list[ReflectionTable]:
    """Reflections of each sweep that can be integrated, frames counted from its own start."""
    if len(table) == 0:
        raise UserError(
            f"{table.source} holds no reflection: give the table that belongs to the EXPT"
        )
    placed, number = place_on_scans(table, experiments)
    kept = [i for i, e in enumerate(experiments) if e.can_be_integrated]
    return [placed.select(number == i) for i in kept]


def _positions(
    experiments: Sequence[Experiment],
    tables: Sequence[ReflectionTable] | None,
    is_full: bool,
    limits: tuple[float | None, float | None],
) -> list[Prediction]:
    """Predictions of each sweep within ``limits`` (d_min, d_max): the tables' own, if full."""
    d_min, d_max = limits
    require_recorded(experiments, d_min)
    if tables is not None and d_min is not None:
        _require_rows(experiments, tables, d_min)
    if tables is not None and is_full:
        predictions = _from_tables(experiments, tables, d_min, d_max)
    else:
        predictions = [predict_reflections(e, d_min, d_max=d_max) for e in experiments]
        if tables is not None:
            _require_agreement(experiments, tables, predictions)
    return list(map(_on_valid_images, experiments, predictions))


def _require_rows(
    experiments: Sequence[Experiment], tables: Sequence[ReflectionTable], d_min: float
) -> None:
    """Refuse a resolution limit that leaves next to nothing of the tables."""
    parts = [
        1 / np.linalg.norm(index[(index != 0).any(1)] @ experiment.rotation.crystal.A.T, axis=1)
        for experiment, table in zip(experiments, tables, strict=True)
        if "miller_index" in table
        for index in [table["miller_index"]]
    ]
    d = np.concatenate([*parts, np.zeros(0)])
    n_kept = int(np.count_nonzero(d >= d_min))
    if 0 < n_kept < min(MIN_ROWS, len(d)):  # of none the steps that follow speak
        raise UserError(
            f"d_min of {d_min:g} A leaves {n_kept} of the {len(d)} reflections of "
            f"{tables[0].source}, which reach {d.min():.2f} A: give a smaller --d-min"
        )


def _from_tables(
    experiments: Sequence[Experiment],
    tables: Sequence[ReflectionTable],
    d_min: float | None,
    d_max: float | None,
) -> list[Prediction]:
    """Positions of full tables, those on the frames and within the resolution limits."""
    predictions = []
    for experiment, table in zip(experiments, tables, strict=True):
        record = prediction_from_columns(experiment, table.columns)
        xyz = record.xyz_px
        sizes = [p.image_size for p in experiment.panels]
        upper = xyz.new_tensor([(*size, experiment.rotation.scan.n_images) for size in sizes])
        keep = ((xyz >= 0) & (xyz < upper[record.panel])).all(1)
        keep &= (record.d >= (d_min or 0.0)) & (record.d <= (d_max or np.inf))
        predictions.append(record[keep])
    if not any(map(len, predictions)):
        raise UserError(
            f"none of the {sum(map(len, tables))} reflections of {tables[0].source} falls on the "
            "frames within the resolution limits: give the EXPT file of the same DIALS step, or "
            "a smaller d_min"
        )
    return predictions


def _require_agreement(
    experiments: Sequence[Experiment],
    tables: Sequence[ReflectionTable],
    predictions: Sequence[Prediction],
) -> None:
    """Refuse tables whose spots on the scan's images are not where their indices are predicted."""
    n_seen = n_near = 0
    for experiment, table, prediction in zip(experiments, tables, predictions, strict=True):
        table.require(["miller_index", "xyzobs.px.value"], "tells where spots were observed")
        index = table["miller_index"].astype(float)
        inv_d = np.linalg.norm(index @ experiment.rotation.crystal.A.T, axis=1)
        seen = table["xyzobs.px.value"]
        # of a wedge, the table may be that of the whole sweep; without a centroid it holds zeros
        on_images = (seen[:, 2] >= 0) & (seen[:, 2] < experiment.rotation.scan.n_images)
        on_images &= seen[:, :2].any(axis=1)
        in_range = (inv_d > 0) & (inv_d <= 1 / float(prediction.d.min()))
        wanted = np.nonzero(on_images & in_range)[0][:5000]
        distance = _distance_to_same_index(
            index[wanted],
            seen[wanted],
            prediction,
            _tolerance(experiment),
        )
        n_seen += len(wanted)
        n_near += int(np.isfinite(distance).sum())
    if n_near < 0.5 * n_seen or n_seen == 0:
        raise UserError(
            f"only {n_near} of {n_seen} spots of {tables[0].source} lie within 5 pixels and 2 "
            "degrees of where the EXPT file predicts their index: give the EXPT and REFL files "
            "of the same DIALS step"
        )


def _on_valid_images(experiment: Experiment, prediction: Prediction) -> Prediction:
    """Leave out spots whose centroid is on an image that ``exclude_images`` of DIALS took."""
    if not experiment.valid_images:
        return prediction
    image = np.floor(prediction.xyz_px[:, 2].numpy()) + experiment.rotation.scan.image_range[0]
    keep = np.any([(image >= a) & (image <= b) for a, b in experiment.valid_images], axis=0)
    if not keep.all():
        logger.warning(
            "%d of %d reflections are on images that the .expt excludes (exclude_images of DIALS) "
            "and are left out",
            *(np.count_nonzero(~keep), len(keep)),
        )
    return prediction[torch.from_numpy(keep)]


def _with_neighbours(
    sweep: Sweep, experiments: Sequence[Experiment], extent: SpotExtent, settings: MaskSettings
) -> Sweep:
    """Add the spots around the list: they reach into its boxes and are no background.

    So do those of other lattices on the same images.
    """
    listed, width = sweep.prediction, sweep.experiment.rotation.scan.oscillation[1]
    rocking_deg = extent.rocking_width.at(listed.d.numpy().astype(float))
    spread = frame_sigma(rocking_deg, listed.zeta.numpy(), width)
    limit = max(NEIGHBOUR_RESOLUTION * float(listed.d.min()), detector_limit(sweep.experiment))
    padding = settings.foreground * float(np.quantile(spread, 0.99))
    around = predict_reflections(sweep.experiment, limit, padding_frames=padding)
    scale = _tolerance(sweep.experiment)
    distance = _distance_to_same_index(
        around.miller_index.numpy(), around.xyz_px.numpy(), listed, scale
    )
    known = [around[torch.from_numpy(np.isinf(distance))]]
    lattices = [next(k for k, e in enumerate(experiments) if e is sweep.experiment)]
    for other, shift in _lattices_on_same_images(sweep.experiment, experiments):
        lattices.append(next(k for k, e in enumerate(experiments) if e is other))
        spots = predict_reflections(other, limit, padding_frames=padding)
        moved = spots.xyz_px + spots.xyz_px.new_tensor([0.0, 0.0, shift])
        known.append(replace(spots, xyz_px=moved))
    columns = {f.name: torch.cat([getattr(k, f.name) for k in known]) for f in fields(Prediction)}
    lattice = np.repeat(lattices, [len(k) for k in known])
    return replace(sweep, neighbours=Prediction(**columns), neighbour_experiment=lattice)


def _lattices_on_same_images(
    experiment: Experiment, experiments: Sequence[Experiment]
) -> list[tuple[Experiment, int]]:
    """Other experiments that share images, and what makes their frames those of this one."""
    place = {image: number for number, image in enumerate(images_of(experiment))}
    found = []
    for other in experiments:
        shifts = [place[image] - k for k, image in enumerate(images_of(other)) if image in place]
        if other is not experiment and shifts:
            found.append((other, shifts[0]))
    return found


def _tolerance(experiment: Experiment) -> Array:
    """(fast, slow, frame) within which a position is that of the same reflection.

    Equal indices are far apart otherwise: five pixels and two degrees tell a foreign table
    without troubling an imperfect refinement.
    """
    return np.array([5.0, 5.0, max(2.0 / abs(experiment.rotation.scan.oscillation[1]), 2.0)])


def _distance_to_same_index(hkl: Array, xyz: Array, known: Prediction, scale: Array) -> Array:
    """Distance in units of ``scale`` to a known spot of the same index, (N,); else infinite."""
    far = 1e6  # keeps other indices out of reach
    tree = cKDTree(np.hstack([known.miller_index.numpy() * far, known.xyz_px.numpy() / scale]))
    query = np.hstack([hkl * far, xyz / scale])
    return tree.query(query, distance_upper_bound=np.sqrt(3.0))[0]


def _check_frames(experiment: Experiment, frames: FrameSource) -> None:
    n_images = experiment.rotation.scan.n_images
    if frames.n_images != n_images:
        raise UserError(
            f"the images hold {frames.n_images} frames, but the scan of the EXPT file has "
            f"{n_images}: give the images that the EXPT file was made from"
        )
    shapes = [tuple(shape) for shape in frames.panel_shapes]
    expected = [panel.shape for panel in experiment.panels]
    if shapes != expected:
        raise UserError(
            f"the images have panels of (slow, fast) {shapes}, but the EXPT file describes "
            f"{expected}: give the images that the EXPT file was made from"
        )
    if not any(mask.any() for mask in frames.static_mask()):
        raise UserError(
            "all pixels of the images are masked: check the pixel mask of the image files"
        )
