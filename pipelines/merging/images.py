"""images.csv: scale, B, R and I/sigma of every image of a merge in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger
from braggflux.pipelines.workspace.image_statistics import ImageStatistics, write_image_statistics


@torch.no_grad()
def write_images(
    merger: Merger, table: ObservationTable, numbers: NDArray, names: Sequence[str], path: Path
) -> None:
    """Write a row for each image.

    Parameters
    ----------
    merger : Merger
        Fitted, on the CPU.
    table : ObservationTable
    numbers : (G,)
        Of the images in their files.
    names : sequence of str
        Of the datasets.
    path : Path
    """
    batch = table.everything()
    e = merger.generative(batch, merger.inference())
    o = batch.observations
    known = batch.of_first_terms(batch.terms.base_log_scale)
    image, dataset = o.image.numpy(), o.dataset.numpy()
    statistics = ImageStatistics.of(
        image,
        (e.scale.log() - known).numpy(),
        batch.of_first_terms(batch.terms.inv_d2).numpy(),
        o.intensity.numpy(),
        e.alone.variance.sqrt().numpy(),
        e.mean.numpy(),
    )
    first = np.unique(image, return_index=True)[1]
    write_image_statistics(path, statistics, numbers, [names[k] for k in dataset[first]])
