"""Which rows of DIALS tables are used, and with which intensity."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from simulated_integration import changed, write_integrated

from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, read_reflections
from braggflux.merge.io.formats.dials import read_dials

DEBIAN_BUILD = Path("/usr/lib/cctbx/python3.11")
pytestmark = pytest.mark.realdata


@pytest.fixture(scope="module")
def integrated(shared, tmp_path_factory):
    return write_integrated(shared, tmp_path_factory.mktemp("a"), n_sweeps=2)


@pytest.mark.dials
def test_sums_stand_in_for_profiles_as_in_dials_scale(integrated, dials, caplog):
    """``intensity_choice=combine``: DIALS' own function gives each row's starting intensity."""
    if DEBIAN_BUILD.is_dir():
        os.environ.setdefault("LIBTBX_BUILD", str(DEBIAN_BUILD))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from dials.algorithms.scaling.scaler_factory import ScalerFactory
        from dials.algorithms.scaling.scaling_library import choose_initial_scaling_intensities
        from dials.array_family import flex
    table = flex.reflection_table.from_file(str(integrated[0]))
    table = ScalerFactory.filter_bad_reflections(table, min_isigi=None)
    table = choose_initial_scaling_intensities(table, "combine")
    good = ~np.array(table.get_flags(table.flags.excluded_for_scaling))
    x, y, _ = np.array(table["xyzcal.px"])[good].T
    index = np.array(list(table["miller_index"]))[good]
    with caplog.at_level("INFO"):
        ours = read_dials(*integrated)
    order = np.lexsort((x, y, *index.T))
    mine = np.lexsort((ours.metadata["XDET"], ours.metadata["YDET"], *ours.miller_index.T))
    assert len(ours) == good.sum()
    np.testing.assert_array_equal(ours.miller_index[mine], index[order])
    np.testing.assert_allclose(ours.intensity[mine], np.array(table["intensity"])[good][order])
    np.testing.assert_allclose(
        ours.sigma[mine] ** 2, np.array(table["variance"])[good][order], rtol=1e-9
    )
    rows = read_reflections(integrated[0])
    fitted, summed = (
        (rows["flags"] & np.uint64(flag)) != 0
        for flag in (DialsFlag.INTEGRATED_PRF, DialsFlag.INTEGRATED_SUM)
    )
    usable = summed & ~fitted & (rows["partiality"] >= 0.4) & (rows["qe"] > 0)
    assert f"{usable.sum()} observations whose profile was not fitted" in caplog.text


def test_a_sweep_without_a_usable_row_is_left_out(integrated, tmp_path):
    table = read_reflections(integrated[0])
    flags = np.where(table["id"] == 0, np.uint64(1), table["flags"])
    with_one = read_dials(*changed(integrated[0], tmp_path / "a", flags=flags))
    alone = read_dials(*changed(integrated[0], tmp_path / "b", rows=table["id"] == 1))
    for name in ("miller_index", "intensity", "sigma", "image"):
        np.testing.assert_array_equal(getattr(with_one, name), getattr(alone, name))
    assert with_one.cell.parameters == alone.cell.parameters


def test_no_usable_row_at_all(integrated, tmp_path):
    flags = np.ones(len(read_reflections(integrated[0])), dtype=np.uint64)
    with pytest.raises(UserError, match="no integrated reflection"):
        read_dials(*changed(integrated[0], tmp_path, flags=flags))
