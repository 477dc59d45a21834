"""Panels are those that dxtbx makes as the image set tells it (dials.import multi_panel=True)."""

from __future__ import annotations

import gzip
import json

import numpy as np
from image_cases import dxtbx_imageset
from wedges import run_dials

from braggflux.integrator.io.dials import read_experiments, write_experiments
from braggflux.integrator.io.images import open_frames


def mini_cbf(packed: bytes) -> bytes:
    """The image as a miniCBF: the full header would hide the modules from dxtbx."""
    whole = gzip.decompress(packed)
    header = whole[: whole.index(b"# CBF_template_file")]
    return header + b";\r\n\r\n" + whole[whole.rindex(b"_array_data.data") :]


def test_modules_of_a_pilatus_are_panels(dials, shared, tmp_path):
    """24 panels; before, "has panels of (1679, 1475)" and the .expt was to blame."""
    for n in (1, 2):
        packed = (shared / f"data/l_cysteine/l-cyst_01_{n:05d}.cbf.gz").read_bytes()
        (tmp_path / f"x_{n:04d}.cbf").write_bytes(mini_cbf(packed))
    run_dials("import", "template=x_####.cbf", "multi_panel=True", folder=tmp_path)
    expt = tmp_path / "imported.expt"
    (experiment,) = read_experiments(expt)
    assert len(experiment.panels) == 24
    with open_frames(experiment) as source:
        mask, frames = source.static_mask(), [source.read(i) for i in range(2)]
    images = dxtbx_imageset(expt)
    for i, frame in enumerate(frames):
        theirs, usable = images.get_raw_data(i), images.get_mask(i)
        for k in range(24):
            good = usable[k].as_numpy_array()
            np.testing.assert_array_equal((frame[k] >= 0) & mask[k], good)
            np.testing.assert_array_equal(frame[k][good], theirs[k].as_numpy_array()[good])
    write_experiments(tmp_path / "again.expt", [experiment])
    again = json.loads((tmp_path / "again.expt").read_text())
    assert again["imageset"][0]["params"] == json.loads(expt.read_text())["imageset"][0]["params"]
