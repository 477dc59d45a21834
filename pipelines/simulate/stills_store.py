"""Simulated stills to disk: observations as a store to merge, and beside them the truth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.io.arrays import write_arrays
from braggflux.merge.io.observations import UnmergedData
from braggflux.merge.io.stores.unmerged_store import write_unmerged_store


class StillsFiles(NamedTuple):
    """Paths of one simulation.

    ``observations`` is a :class:`braggflux.merge.io.stores.unmerged_store.UnmergedStore`,
    ``truth_mtz`` has the true F(+) and F(-), ``truth_images`` the arrays ``orientation scale
    falloff width operator`` by image, the last a number in ``operators`` (A, 3, 3): ``h' = h M``.
    """

    observations: Path
    truth_mtz: Path
    truth_images: Path


def write_stills(
    out_dir: str | Path,
    experiment: Any,
    progress: Callable[[int, int], None] | None = None,
) -> StillsFiles:
    """Write stills one chunk after the other.

    Parameters
    ----------
    out_dir : str or Path
        Made when missing.
    experiment : braggflux.fixtures.stills.StillsExperiment
        Not imported here: data with known truth are no part of the program.
    progress : callable (done, total), optional
        Images.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    files = StillsFiles(*(folder / n for n in ("stills.h5", "truth.mtz", "truth_images.npz")))
    truth: dict[str, list[NDArray[Any]]] = {}

    def recorded() -> Iterator[Any]:
        for chunk in experiment.chunks():
            for name in ("orientation", "scale", "falloff", "width", "operator"):
                truth.setdefault(name, []).append(getattr(chunk, name).astype(np.float32))
            yield chunk
            if progress is not None:
                progress(chunk.first_image + chunk.n_images, experiment.settings.n_images)

    write_unmerged_store(files.observations, as_unmerged(recorded(), experiment))
    with replacing(files.truth_mtz) as temporary:
        experiment.truth.write_mtz(temporary)
    arrays = {name: np.concatenate(parts) for name, parts in truth.items()}
    write_arrays(files.truth_images, arrays | {"operators": experiment.operators}, pack=False)
    return files


def as_unmerged(chunks: Iterable[Any], experiment: Any) -> Iterator[UnmergedData]:
    """Turn chunks of simulated stills into observations of the merge."""
    for chunk in chunks:
        yield UnmergedData(
            miller_index=chunk.miller_index,
            intensity=chunk.intensity,
            sigma=chunk.sigma,
            image=chunk.image,
            wavelength=chunk.wavelength,
            metadata=chunk.metadata,
            cell=experiment.cell,
            space_group=experiment.space_group,
            name="stills",
            has_lp_applied=False,
        )
