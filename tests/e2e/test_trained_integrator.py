"""A run that starts from the integrator of another crystal's run."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
import torch

from braggflux.fixtures.simulate import simulate
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.intensity_file import read_intensities
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.saved_integrator import SavedIntegrator
from braggflux.integrator.torch_file import load_torch
from braggflux.pipelines import cli
from braggflux.pipelines.integration.run import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """Frames of another crystal: other orientation, beam and noise."""
    return simulate(tmp_path_factory.mktemp("second"), preset="tiny", seed=1)


@pytest.fixture(scope="module")
def configure_second(configure, second, straight):
    def make(out, **options):
        files = {"expt": second.expt, "refl": second.refl, "model": second.model}
        files |= {"trained_integrator": straight.path}
        return configure(out, **{k: str(path) for k, path in files.items()} | options)

    return make


@pytest.fixture(scope="module")
def once(configure_second, tmp_path_factory):
    """One pass of the trained integrator, no training."""
    out = tmp_path_factory.mktemp("runs") / "once"
    return run(configure_second(out, training__epochs=0))


def test_no_epoch_is_one_pass_and_a_merge(once, straight, second):
    saved = SavedIntegrator.read(straight.integrator)
    parameters = load_torch(once.latest_checkpoint(), "")["model"]
    for name in ("profile.log_mean", "profile.basis", "encoder.linear.weight"):
        assert torch.equal(parameters[f"integrator.{name}"], saved.state[name]), name
    assert [row["epoch"] for row in once.read_metrics()] == [0]
    assert once.merged.read_bytes() == once.epoch_mtz(0).read_bytes()
    for path in (once.integrated_refl, once.unmerged, once.half_sets, once.integrator):
        assert path.stat().st_size > 0, path
    with ShoeboxStore.open(once.shoeboxes) as store:
        assert store.box == saved.box


def test_its_intensities_are_right(once, second):
    """Photons of strong spots against those of the simulation."""
    truth, table = np.load(second.truth), read_intensities(once.intensities)
    known = {
        (*hkl, round(frame)): photons
        for hkl, frame, photons in zip(
            truth["miller_index"].tolist(),
            truth["xyz_px"][:, 2].tolist(),
            truth["photons"],
            strict=True,
        )
    }
    rows = zip(
        table.metadata.miller_index.tolist(),
        table.metadata.xyz_px[:, 2].tolist(),
        table.intensity.tolist(),
        table.is_integrated.tolist(),
        strict=True,
    )
    pairs = [
        (value, known[key])
        for hkl, frame, value, is_used in rows
        if is_used and (key := (*hkl, round(frame))) in known and known[key] > 300
    ]
    found, true = np.array(pairs).T
    assert len(found) > 100
    # 2026-11-30: 1.005 and 0.025
    assert np.median(found / true) == pytest.approx(1.0, abs=0.02)
    assert np.median(np.abs(found / true - 1)) < 0.05


def test_where_it_came_from_is_written_down(once, straight):
    record = once.read_provenance()
    assert record["inputs"]["integrator"]["path"] == str(straight.integrator)
    assert len(record["inputs"]["integrator"]["sha256"]) == 64
    epochs = straight.read_config().training.epochs
    assert record["notes"]["integrator"].endswith(f"{straight.path}, {epochs} epochs")


def test_it_resumes(once, configure_second):
    before = once.merged.read_bytes(), once.metrics_file.read_bytes()
    again = run(configure_second(once.path, training__epochs=0), resume=True)
    columns = [np.array(gemmi.read_mtz_file(str(d.merged))) for d in (once, again)]
    np.testing.assert_array_equal(*columns)
    assert again.metrics_file.read_bytes() == before[1]


def test_further_epochs_train_it(configure_second, once, tmp_path):
    directory = run(configure_second(tmp_path / "run", training__epochs=1))
    assert [row["epoch"] for row in directory.read_metrics()] == [0, 1]
    states = [SavedIntegrator.read(d.integrator).state for d in (once, directory)]
    assert not torch.equal(*(state["encoder.linear.weight"] for state in states))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extraction__box": [3, 5, 5]}, "extraction.box is 3 x 5 x 5, but .* trained on boxes"),
        ({"integrator__encoder_width": 32}, "encoder_width is 32, but that of .* has 48; give"),
        ({"integrator__nodes_per_sigma": 2.0}, "nodes_per_sigma is 2, but that of .* has 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(options, message, configure_second, tmp_path):
    with pytest.raises(UserError, match=message):
        run(configure_second(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_other_pixels_and_modes_are_refused(straight):
    saved = SavedIntegrator.read(straight.integrator)
    fast, slow = saved.pixel_size_mm
    saved.require_pixels((fast * 1.0001, slow), straight.integrator)
    with pytest.raises(UserError, match=r"pixels are 0\.075 x 0\.075 mm, but .* trained on"):
        saved.require_pixels((0.075, 0.075), straight.integrator)
    other = SavedIntegrator(**{**vars(saved), "n_modes": 9})
    config = straight.read_config().integrator
    with pytest.raises(UserError, match="have 9 modes, those of this version 12"):
        other.require_settings(config, None, straight.integrator)


def test_mistakes_on_the_command_line_are_one_line(second, straight, tmp_path, capsys):
    files = [str(second.expt), str(second.refl), "--out", str(tmp_path / "run")]
    for given, message in (
        (["--epochs", "0"], "`epochs` must be at least 1 without a trained integrator"),
        (["--integrator", str(tmp_path)], "holds no integrator.pt; give the directory of a fin"),
    ):
        assert cli.main(["run", *files, *given]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert message in error[-1]
    damaged = tmp_path / "old"
    damaged.mkdir()
    content = bytearray(straight.integrator.read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "integrator.pt").write_bytes(content)
    assert cli.main(["run", *files, "--integrator", str(damaged)]) == 2
    assert "is damaged" in capsys.readouterr().err.strip().splitlines()[-1]
