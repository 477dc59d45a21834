"""Rows of a file of shoeboxes that no spot of its sweeps can be, and those that can."""

import gemmi
import numpy as np
import pytest

from braggflux.integrator.crystal.cell import d_spacing
from braggflux.integrator.io.shoebox_checks import check_rows
from braggflux.integrator.types import Flag

CELL = (78.0, 78.0, 38.0, 90.0, 90.0, 90.0)
RECORDS = [{"wavelength": 1.0, "unit_cell": CELL, "panel_shapes": [(100, 100)]}]
BOX = (3, 5, 5)


def columns_of(zeta, flags):
    n = len(zeta)
    index = np.arange(1, 3 * n + 1).reshape(n, 3)
    vectors = np.full((n, 3), 0.5)
    return {
        **dict.fromkeys(("frame_sigma", "lp", "recorded_fraction"), np.ones(n)),
        **dict.fromkeys(("s1", "s0_crystal", "s1_crystal", "xyz_mm"), vectors),
        **{name: np.zeros(n, int) for name in ("experiment", "panel", "entering")},
        "frames_per_layer": np.ones(n, int),
        "refl_row": np.arange(n),
        "miller_index": index,
        "d": d_spacing(index, gemmi.UnitCell(*CELL)),
        "corner": np.zeros((n, 3), int),
        "xyz_px": np.full((n, 3), 2.5),
        "zeta": np.array(zeta),
        "flags": np.array(flags),
    }


def test_a_row_that_grazes_the_axis_is_no_fault():
    # of two million spots half of one has a zeta below .001 on average; it is not integrated
    check_rows(columns_of([0.9, 1e-5, 0.5], [0, Flag.REJECTED, 0]), RECORDS, BOX)


def test_a_row_that_is_integrated_has_a_rocking_curve():
    with pytest.raises(ValueError, match="column zeta has values from 1e-05"):
        check_rows(columns_of([0.9, 1e-5, 0.5], [0, Flag.DEFECT, 0]), RECORDS, BOX)
