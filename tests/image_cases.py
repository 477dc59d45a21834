"""Copies of a small simulated sweep, for tests to change, and what dxtbx reads of them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np

from braggflux.fixtures.simulate import SimulatedFiles

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")


def copy_of(base: SimulatedFiles, folder: Path) -> Path:
    """Copy .expt, .refl and frames to a folder; returns the .expt, which names the new frames."""
    for path in base.expt.parent.iterdir():
        if path.suffix in (".expt", ".refl", ".h5"):
            shutil.copy(path, folder)
    expt = folder / base.expt.name
    edit(expt, lambda e: e["imageset"][0].update(template=str(folder / base.master.name)))
    return expt


def frames_of(master: Path) -> np.ndarray:
    """Frames as stored, (image, slow, fast)."""
    with h5py.File(master) as file:
        return file["entry/data/data"][()]


def store_frames(expt: Path, frames: np.ndarray, **detector: float) -> None:
    """Replace the frames of a copy, and values of its NXdetector."""
    (master,) = expt.parent.glob("*_master.h5")
    with h5py.File(master, "r+") as file:
        del file["entry/data"]
        group = file.create_group("entry/data")
        group.attrs.update({"NX_class": "NXdata", "signal": "data"})
        group.create_dataset("data", data=frames, chunks=(1, *frames.shape[1:]))
        for name, value in detector.items():
            file[f"entry/instrument/detector/{name}"][...] = value


def edit(expt: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of an .expt in place."""
    document = json.loads(expt.read_text())
    change(document)
    expt.write_text(json.dumps(document))


def set_panel(expt: Path, **values: object) -> None:
    """Set values of the (one) panel."""
    edit(expt, lambda e: e["detector"][0]["panels"][0].update(values))


def dxtbx_imageset(expt: Path):
    """The image set as dxtbx reads it, with masks and maps."""
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    os.environ.setdefault("HDF5_PLUGIN_PATH", hdf5plugin.PLUGINS_PATH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that dxtbx imports
        lists = importlib.import_module("dxtbx.model.experiment_list")
        return lists.ExperimentListFactory.from_json_file(str(expt))[0].imageset
