"""Priors that a run takes from outside: a model's amplitudes, and other data sets."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.config.schema import updated
from braggflux.pipelines.integration.run import run

#: A hundredth of the photons of the preset.
WEAK = {"intensity.photons_per_f2": 1e-5}
SHORT = {"training.epochs": 1, "training.device": "cpu"}


def mean_amplitudes(path, labels=("F",)) -> dict[tuple[int, int, int], float]:
    """Mean of the columns of each reflection that has them all."""
    mtz = gemmi.read_mtz_file(str(path))
    values = np.mean([np.array(mtz.column_with_label(label)) for label in labels], axis=0)
    hkl = map(tuple, mtz.make_miller_array().tolist())
    return {h: v for h, v in zip(hkl, values, strict=True) if np.isfinite(v)}


def r_factor(merged, truth) -> float:
    """Sum of |k F - F_true| over that of F_true."""
    ours, true = mean_amplitudes(merged), mean_amplitudes(truth, ("F(+)", "F(-)"))
    shared = sorted(ours.keys() & true.keys())
    assert len(shared) > 300
    f, t = (np.array([d[h] for h in shared]) for d in (ours, true))
    return float(np.abs(f * (f @ t) / (f @ f) - t).sum() / t.sum())


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    return simulate(tmp_path_factory.mktemp("weak"), "tiny", overrides=WEAK)


@pytest.mark.parametrize("coupling", ["joint", "staged"])
def test_amplitudes_of_a_model_help_weak_data(weak, tmp_path, coupling):
    config = RunConfig(expt=weak.expt, refl=weak.refl)
    config = updated(config, SHORT | {"training.coupling": coupling, "extraction.box": "7,9,9"})
    plain = run(updated(config, {"out": str(tmp_path / "plain")}))
    given = {"prior_model": str(weak.model), "out": str(tmp_path / "model")}
    with_model = run(updated(config, given))
    assert 0.5 < with_model.read_metrics()[-1]["sigma_a"] < 1
    history = gemmi.read_mtz_file(str(with_model.merged)).history
    assert any("the prior of a model" in line for line in history)
    before, after = (r_factor(d.merged, weak.truth_mtz) for d in (plain, with_model))
    assert after < 0.8 * before
    assert with_model.read_provenance()["inputs"]["prior_model"]["sha256"]


def test_a_model_of_another_crystal_is_refused_before_the_work(weak, tmp_path):
    structure = gemmi.read_structure(str(weak.model))
    structure.cell = gemmi.UnitCell(60, 60, 90, 90, 90, 90)
    structure.write_pdb(str(tmp_path / "other.pdb"))
    config = RunConfig(
        expt=weak.expt, refl=weak.refl, prior_model=tmp_path / "other.pdb", out=tmp_path / "run"
    )
    with pytest.raises(UserError, match=r"other\.pdb"):
        run(config)
    assert not (tmp_path / "run").exists()
