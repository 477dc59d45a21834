"""Ice rings, hot pixels, a shadow and zingers: the run ends, and its result means what it says.

The frames are those of the other tests here, spoilt: the crystal and its truth are the same.
"""

from __future__ import annotations

import json
import math

import gemmi
import numpy as np
import pytest

from braggflux.fixtures.presets import effect_overrides
from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.dials import DialsFlag, read_reflections
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.types import Flag
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.integration.run import run
from braggflux.pipelines.workspace.matching import match_observations
from braggflux.pipelines.workspace.records.readers import read_rows

pytestmark = pytest.mark.slow

SPOILING = ("ice", "hot-pixel", "shadow", "zinger")
ICE = (3.90, 3.67, 3.44, 2.67, 2.25)
SHORT = {"training.epochs": 3, "training.batch_size": 512, "training.device": "cpu"}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Give the spoilt frames; the truth is that of the clean ones."""
    folder = tmp_path_factory.mktemp("spoilt")
    # few frames: more of what strikes few reflections
    many = {"artefacts.zingers": 25.0, "artefacts.hot_pixels": 50}
    return simulate(folder, preset="tiny", seed=0, overrides=effect_overrides(SPOILING) | many)


def configuration(frames, out, **options) -> RunConfig:
    config = RunConfig(expt=frames.expt, refl=frames.refl, model=frames.model, out=out)
    return updated(config, SHORT | {k.replace("__", "."): v for k, v in options.items()})


@pytest.fixture(scope="module")
def spoilt(frames, tmp_path_factory):
    return run(configuration(frames, tmp_path_factory.mktemp("runs") / "spoilt"))


def amplitudes(path, label) -> dict[tuple[int, ...], float]:
    mtz = gemmi.read_mtz_file(str(path))
    hkl = map(tuple, mtz.make_miller_array().tolist())
    values = zip(hkl, mtz.column_with_label(label), strict=True)
    return {h: v for h, v in values if np.isfinite(v)}


def correlation(a: dict, b: dict, least: int = 200) -> float:
    shared = sorted(a.keys() & b.keys())
    assert len(shared) > least
    return float(np.corrcoef([a[h] for h in shared], [b[h] for h in shared])[0, 1])


def observations(directory, frames) -> dict[str, np.ndarray]:
    """Whole rocking curves: z (NaN where not used), resolution, flags of the store and place."""
    table = read_reflections(directory.integrated_refl)
    with np.load(frames.truth) as file:
        truth = {k: file[k] for k in file}
    a, b = match_observations(
        table["miller_index"], table["xyzcal.px"], truth["miller_index"], truth["xyz_px"]
    )
    whole = truth["recorded"][b] > 0.98
    a, b = a[whole], b[whole]
    value, variance = (table[f"intensity.prf.{k}"][a] for k in ("value", "variance"))
    with ShoeboxStore.open(directory.shoeboxes) as store:
        flags = store.flags.numpy()[a]
    is_used = table.has_flag(DialsFlag.INTEGRATED_PRF)[a]
    assert (variance[is_used] > 0).all()  # the others have none
    z = (value - truth["photons"][b]) / np.sqrt(np.where(is_used, variance, np.nan))
    return {"z": z, "d": truth["d"][b], "flags": flags, "xyz": truth["xyz_px"][b]} | {
        k: truth[k] for k in ("zingers", "hot_pixels")
    }


def spread(z) -> float:
    return float(np.diff(np.nanquantile(z, [0.1587, 0.8413]))[0] / 2)


def is_hit(found: dict[str, np.ndarray]) -> np.ndarray:
    """Observations with a zinger or hot pixel within two pixels and a frame of the centroid."""
    xyz = found["xyz"]
    hit = np.zeros(len(xyz), bool)
    for _, frame, slow, fast in found["zingers"]:
        near = np.abs(xyz - (fast + 0.5, slow + 0.5, frame + 0.5)) < (2.0, 2.0, 0.8)
        hit |= near.all(1)
    for _, slow, fast in found["hot_pixels"]:
        hit |= (np.abs(xyz[:, :2] - (fast + 0.5, slow + 0.5)) < 2.0).all(1)
    return hit


def test_nothing_in_the_files_is_not_a_number(spoilt):
    for row in spoilt.read_metrics():
        for key, value in row.items():
            assert value is not None or key in row["reasons"], key
            assert not isinstance(value, float) or math.isfinite(value), key
    assert not any("not finite" in json.dumps(r.get("reasons")) for r in spoilt.read_metrics())
    for row in read_rows(spoilt.statistics_file):
        assert "nan" not in {v.lower() for v in row.values()}
    mtz = gemmi.read_mtz_file(str(spoilt.merged))
    c = {column.label: np.array(column, copy=True) for column in mtz.columns}
    for sign in "+-":
        seen = np.nan_to_num(c[f"N({sign})"]) > 0
        for name in ("F", "SIGF", "I", "SIGI"):
            assert np.isfinite(c[f"{name}({sign})"][seen]).all()
    table = read_reflections(spoilt.integrated_refl)
    for kind in ("prf", "sum"):
        for name in ("value", "variance"):
            assert np.isfinite(table[f"intensity.{kind}.{name}"]).all()


def test_amplitudes_are_nearly_those_of_clean_frames(spoilt, straight, frames):
    """CC with the truth; without the search for defects it is 0.1 lower (seen 0.88 for 0.999)."""
    for label in ("F(+)", "F(-)"):
        truth = amplitudes(frames.truth_mtz, label)
        clean = correlation(amplitudes(straight.merged, label), truth)
        assert correlation(amplitudes(spoilt.merged, label), truth) > clean - 0.01


def test_what_is_hit_is_flagged_or_right_all_the_same(spoilt, frames):
    found = observations(spoilt, frames)
    hit, z = is_hit(found), np.abs(found["z"])
    assert hit.sum() > 12
    is_flagged = (found["flags"] & Flag.DEFECT) > 0
    assert is_flagged[hit].mean() > 0.8
    assert (is_flagged | (z < 5))[hit].mean() > 0.9
    # what is flagged and used all the same is right
    assert (z[is_flagged] > 5).mean() < 0.05
    # of all that was used: hardly one in a hundred is wrong by more than five sigma
    assert (z > 5).sum() < 0.01 * np.isfinite(z).sum()
    assert 0.9 < spread(found["z"]) < 1.2


def test_sigmas_under_ice_rings_are_honest(spoilt, frames):
    found = observations(spoilt, frames)
    inv_d = 1 / found["d"]
    ice = np.any([np.abs(inv_d - 1 / d) < 0.004 for d in ICE], axis=0)
    assert ice.sum() > 80
    assert 0.9 < spread(found["z"][ice]) < 1.3
    assert abs(np.nanmedian(found["z"][ice])) < 0.35


def test_the_search_can_be_switched_off(frames, tmp_path):
    """And the ablations of the merge run to the end, even on what is left then."""
    directory = run(
        configuration(
            frames,
            tmp_path / "run",
            extraction__find_defects=False,
            merge__photon_counts=False,
            merge__prior="wilson",
            merge__physical_scale=False,
            training__epochs=1,
        )
    )
    with ShoeboxStore.open(directory.shoeboxes) as store:
        assert not (store.flags & Flag.DEFECT).any()
    assert directory.read_config().merge.photon_counts is False
    # most spots are lost to the profile of a hot pixel; what is left is poor
    truth = amplitudes(frames.truth_mtz, "F(+)")
    assert correlation(amplitudes(directory.merged, "F(+)"), truth, least=100) < 0.98


def test_effects_have_names():
    assert effect_overrides([]) == {}
    assert effect_overrides(["ice"]) == {"artefacts.ice": 3.0}
    with pytest.raises(UserError, match="ice, hot-pixel, shadow, zinger"):
        effect_overrides(["snow"])
