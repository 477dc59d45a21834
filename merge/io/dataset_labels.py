"""Labels of a data set: names, title, wavelength."""

from __future__ import annotations

from typing import NamedTuple

#: Characters of a title that MTZ files keep.
MAX_TITLE = 70


class DatasetNames(NamedTuple):
    """The three names an MTZ file gives to a data set."""

    project: str = "braggflux"
    crystal: str = "crystal"
    dataset: str = "dataset"


class DatasetLabels(NamedTuple):
    """Labels that go from the input to the merged file.

    Parameters
    ----------
    names : DatasetNames
    title : str
        Of the file.
    wavelength : float or None
        [A] of the whole data set; None where the input does not know it.
    """

    names: DatasetNames = DatasetNames()
    title: str = ""
    wavelength: float | None = None
