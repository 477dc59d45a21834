"""Cut shoeboxes out of the frames in one pass.

Rows are sorted by their first frame, so that the boxes open on a frame are consecutive rows, all
are filled with one gather, and finished ones leave for the file in order. Memory holds one frame,
the open boxes, and images of the background statistic. Several processes take a range of the
frames each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials.sweeps import describe_experiment
from braggflux.integrator.io.shoebox_store import ShoeboxStore, writing_store
from braggflux.integrator.shoebox.cutting.parts import Cutting, Workforce, add_part
from braggflux.integrator.shoebox.extent import SpotExtent
from braggflux.integrator.shoebox.mask import MaskSettings
from braggflux.integrator.shoebox.sweep import Sweep

Progress = Callable[[int, int], None]


def extract_shoeboxes(
    sweeps: Sequence[Sweep],
    extent: SpotExtent,
    store_path: str | Path,
    *,
    settings: MaskSettings | None = None,
    attributes: dict[str, object] | None = None,
    find_defects: bool = True,
    workforce: Workforce = Workforce(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> ShoeboxStore:
    """Write the shoeboxes of all sweeps to a store; every frame is read once.

    Parameters
    ----------
    sweeps : sequence of Sweep
    extent : SpotExtent
        Shared by all sweeps, which share the box.
    store_path : str or Path
    settings : MaskSettings, optional
    attributes : dict, optional
        Further attributes of the file (software version, d_min ...).
    find_defects : bool
        Leave out zingers, hot pixels and shadows that the masks of the frames do not know.
    workforce : Workforce
        Processes that share the work; each returns the store.
    progress : callable, optional
        Called with (frames done, frames in all).

    Returns
    -------
    ShoeboxStore
        Opened.

    Raises
    ------
    UserError
        Without reflections, or when no voxel of any box was recorded.
    """
    cutting = Cutting(sweeps, extent, settings or MaskSettings(), find_defects)
    if cutting.n_rows == 0:
        raise UserError(
            "no reflection falls on the frames: check that the EXPT and REFL files belong "
            "together, or give a smaller --d-min"
        )
    total = sum(sweep.frames.n_images for sweep in sweeps)
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    with workforce.parts(cutting, Path(store_path), tick) as parts:
        if workforce.processes.is_first:
            _write_store(cutting, store_path, attributes or {}, parts, tick)
        workforce.processes.wait()
    return ShoeboxStore.open(store_path)


def _write_store(
    cutting: Cutting,
    store_path: str | Path,
    attributes: Mapping[str, object],
    parts: Sequence[Path],
    tick: Callable[[], None],
) -> None:
    """Cut all sweeps, or put the parts together that others have cut."""
    extent = cutting.extent
    with writing_store(store_path, cutting.n_rows, extent.box, cutting.dtype) as writer:
        columns, pairs, max_count = [], [], 0
        for number in range(len(cutting.sweeps)):
            with closing(cutting.cutter(number, writer)) as cutter:
                if not parts:
                    cutter.cut(tick)
                for part in parts:
                    add_part(part, number, cutter, writer)
                columns.append(cutter.finish(number))
            pairs.append(cutter.neighbours(number))
            max_count = max(max_count, cutter.max_count)
        merged = {k: np.concatenate([c.pop(k) for c in columns]) for k in list(columns[0])}
        if not merged["recorded_fraction"].any():
            raise UserError(
                "no pixel of any shoebox was recorded: all are masked, overloaded or outside of "
                "the frames; check the pixel mask and the trusted range of the images"
            )
        writer.write_columns(merged)
        writer.write_neighbours({k: np.concatenate([p[k] for p in pairs]) for k in pairs[0]})
        masks = {f"mask_{name}_sigma": value for name, value in asdict(cutting.settings).items()}
        writer.write_header(
            {
                "extent": np.array([extent.sigma_x_px, extent.sigma_y_px, extent.sigma_m_deg]),
                "extent_units": "pixels, pixels, degrees",
                "rocking": np.array(astuple(extent.rocking_width)),
                "box": np.array(extent.box),
                "max_count": max_count,
                **masks,
                **attributes,
            },
            [describe_experiment(sweep.experiment) for sweep in cutting.sweeps],
        )
