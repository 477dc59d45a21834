"""Images whose beam was another: a shutter's fault, an attenuator that was moved."""

from __future__ import annotations

import mad_files as mad
import numpy as np
import pytest

from braggflux.pipelines import cli

FAST = ("--epochs", "20", "--set", "network_width=8", "--anomalous")
N_IMAGES = 60
#: Of :func:`mad_files.observe`, taken back.
STEADY = np.exp(-0.3 * np.sin(np.arange(N_IMAGES) / 3))


def merged(tmp_path, name, factor_of_image, *options):
    """Bijvoet correlation with the truth of a sweep whose batches are scaled by factors."""
    rows = mad.observe(mad.truth(), 0, n_images=N_IMAGES, n_per_image=80)
    factor = (STEADY * factor_of_image)[rows.columns["BATCH"].astype(int) - 1]
    rows = rows.but(I=rows.columns["I"] * factor, SIGI=rows.columns["SIGI"] * factor)
    mtz = mad.empty_mtz()
    mad.add_dataset(mtz, ("p", "x", "d"), mad.PEAK, range(1, N_IMAGES + 1))
    path = mad.write(tmp_path / f"{name}.mtz", rows, mtz)
    assert cli.main(["merge", str(path), "--out", str(tmp_path / name), *FAST, *options]) == 0
    return mad.bijvoet_correlation(tmp_path / name / "merged.mtz", mad.truth())


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    return merged(tmp_path_factory.mktemp("steady"), "steady", np.ones(N_IMAGES))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last", "factor"), [(30, 33, 0.3), (41, 41, 5.0)])
def test_images_of_another_beam_cost_what_they_hold(first, last, factor, steady, tmp_path, caplog):
    """They are named, and the rest is scaled as without them."""
    factors = np.ones(N_IMAGES)
    factors[first - 1 : last] = factor
    assert merged(tmp_path, "step", factors) > steady - 0.01
    (line,) = [r.getMessage() for r in caplog.records if "levels of their own" in r.getMessage()]
    assert f"{last - first + 1} of {N_IMAGES} images" in line
    for image in range(first, last + 1):
        assert f" {image} (" in line
    frozen = ("--freeze-scales", str(tmp_path / "step"))
    assert merged(tmp_path, "again", factors, *frozen) > steady - 0.01


@pytest.mark.slow
def test_a_steady_beam_has_no_steps(tmp_path, caplog):
    merged(tmp_path, "steady", np.ones(N_IMAGES))
    assert "levels of their own" not in caplog.text
