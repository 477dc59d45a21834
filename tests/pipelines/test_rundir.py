"""The run directory: layout, refusals, resuming and records."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import yaml

from braggflux.integrator.errors import UserError
from braggflux.integrator.torch_file import save_torch
from braggflux.pipelines.config.run import RunConfig, schema
from braggflux.pipelines.integration.run import restore
from braggflux.pipelines.maps.anomalous_peaks import COUPLED, SitePeak
from braggflux.pipelines.workspace import log, rundir
from braggflux.pipelines.workspace.rundir import RunDirectory, write_text


@pytest.fixture(autouse=True)
def _closed_logs():
    yield
    log.detach_files()


@pytest.fixture
def config(tmp_path) -> RunConfig:
    (tmp_path / "m.pdb").write_text("model")
    return RunConfig(model=tmp_path / "m.pdb", out=tmp_path / "run")


def peak(seqid: str, height: float | None) -> SitePeak:
    return SitePeak("A", seqid, "IOD", "I", height)


def test_layout_is_the_contract(config):
    run = RunDirectory.create(config)
    names = {p.name for p in run.path.iterdir()}
    assert {"config.yaml", "config.diff.yaml", "provenance.json", "run.log"} <= names
    assert run.checkpoint(7) == run.path / "checkpoints" / "epoch_0007.pt"
    assert run.epoch_mtz(7) == run.path / "mtz" / "epoch_0007.mtz"
    for attribute, name in {
        "merged": "merged.mtz",
        "unmerged": "unmerged.mtz",
        "integrated_refl": "integrated.refl",
        "metrics_file": "metrics.jsonl",
        "peaks_file": "peaks.csv",
        "statistics_file": "statistics.csv",
        "report": "report.html",
        "latest_file": "latest",
    }.items():
        assert getattr(run, attribute) == run.path / name


def test_config_is_saved_in_full_and_as_a_difference(config):
    config = schema.updated(config, {"training.epochs": 3})
    run = RunDirectory.create(config)
    assert run.read_config() == config.resolved()
    difference = yaml.safe_load(run.config_difference.read_text())
    assert difference == {
        "model": str(config.model),
        "out": str(config.out),
        "training": {"epochs": 3},
    }


def test_provenance(config):
    run = RunDirectory.create(config)
    run.note("reference", "refused")
    run.finish()
    record = json.loads(run.provenance_file.read_text())
    assert record["inputs"]["model"]["sha256"] == hashlib.sha256(b"model").hexdigest()
    assert record["notes"] == {"reference": "refused"}
    session = record["sessions"][0]
    assert session["started"] <= session["ended"]
    assert session["packages"]["numpy"]
    assert session["argv"]


def trained(config: RunConfig) -> RunDirectory:
    run = RunDirectory.create(config)
    run.checkpoint(1).touch()
    run.mark_latest(1)
    return run


def test_a_run_is_not_overwritten_but_resumed(config):
    trained(config)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        RunDirectory.create(config)
    again = RunDirectory.create(config, resume=True)
    assert len(again.read_provenance()["sessions"]) == 2


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_before_its_first_checkpoint_starts_again(config, resume):
    """The user corrects the input and gives the same command again."""
    run = RunDirectory.create(config)
    run.shoeboxes.touch()
    RunDirectory.create(config, resume=resume)
    assert run.shoeboxes.exists(), "same input: the boxes are still right"
    config.model.write_text("the right model")
    RunDirectory.create(config, resume=resume)
    assert not run.shoeboxes.exists(), "boxes of other input"


def test_nothing_is_left_of_a_run_whose_settings_or_first_checkpoint_find_no_room(
    config, monkeypatch
):
    def full(path, text):
        if path.name == "config.diff.yaml":
            raise UserError("no room")
        write_text(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "write_text", full)
        with pytest.raises(UserError, match="no room"):
            RunDirectory.create(config)
    assert list(config.out.iterdir()) == []
    run = RunDirectory.create(config, resume=True)
    for path in (run.half_sets, run.peaks_by_epoch, run.epoch_mtz(0), run.peaks_file):
        path.write_text("of epoch 0")
    run.abandon()
    assert list(config.out.iterdir()) == []


def test_resume_without_a_run_starts_one(config):
    assert RunDirectory.create(config, resume=True).latest_checkpoint() is None


def test_foreign_folders_are_left_alone(config):
    config.out.mkdir()
    (config.out / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(UserError, match=r"is not empty .* \(it has thesis.tex\)"):
            RunDirectory.create(config, resume=resume)
    assert [p.name for p in config.out.iterdir()] == ["thesis.tex"]


def test_files_of_dials_may_be_there_before(config):
    (config.out / "dials").mkdir(parents=True)
    RunDirectory.create(config)


def test_out_that_is_a_file_or_missing(config, tmp_path):
    with pytest.raises(UserError, match="is a file; --out must name a folder"):
        RunDirectory.create(schema.updated(config, {"out": str(tmp_path / "m.pdb")}))
    with pytest.raises(UserError, match="out is not given"):
        RunDirectory.create(schema.updated(config, {"out": None}))


def test_resume_refuses_another_configuration(config):
    trained(config)
    changed = schema.updated(config, {"training.seed": 1, "extraction.d_min": 2})
    with pytest.raises(UserError, match=r"\(extraction.d_min, training.seed\)"):
        RunDirectory.create(changed, resume=True)
    elsewhere = schema.updated(config, {"training.device": "cuda"})
    assert RunDirectory.create(elsewhere, resume=True).read_config().training.device == "cuda"


def test_resume_refuses_another_input(config):
    trained(config)
    config.model.write_text("another model")
    with pytest.raises(UserError, match=r"model .* has changed since the run began"):
        RunDirectory.create(config, resume=True)


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        RunDirectory.open(tmp_path)


def test_metrics_not_finite_are_missing_with_a_reason(config):
    run = RunDirectory.create(config)
    run.append_metrics({"epoch": 1, "elbo": -3.0, "cc_anom": float("nan")})
    run.append_metrics({"epoch": 2, "elbo": None, "reasons": {"elbo": "no data"}})
    first, second = run.read_metrics()
    assert first == {
        "epoch": 1,
        "elbo": -3.0,
        "cc_anom": None,
        "reasons": {"cc_anom": "not finite: nan"},
    }
    assert second["reasons"] == {"elbo": "no data"}
    for line in run.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_peaks_keep_the_reference_on_top_and_replace_an_epoch(config):
    run = RunDirectory.create(config)
    run.write_peaks(2, [peak("204", 5.0)])
    run.write_peaks(1, [peak("204", 4.0), peak("205", None)])
    run.write_peaks("DIALS", [peak("204", 9.0)])
    run.write_peaks(2, [peak("204", 6.0)])
    rows = [(p["epoch"], p["seqid"], p["peak_sigma"]) for p in run.read_peaks()]
    assert rows == [("DIALS", "204", 9.0), (1, "204", 4.0), (1, "205", None), (2, "204", 6.0)]
    head = run.peaks_file.read_text().splitlines()[0]
    assert head == "epoch,chain,seqid,residue,atom,peak_sigma,difference,peak_sigma_own"


def test_coupled_and_own_heights_come_back_and_old_files_have_own_ones(config):
    run = RunDirectory.create(config)
    coupled = SitePeak("A", "204", "IOD", "I", 17.0, "", COUPLED, 16.0)
    nothing = SitePeak("A", "205", "IOD", "I", None, "too few pairs", COUPLED, None)
    run.write_peaks("DIALS", [peak("204", 9.0)])
    run.write_peaks(1, [coupled, nothing])
    found = [(p["peak_sigma"], p["difference"], p["peak_sigma_own"]) for p in run.read_peaks()]
    assert found == [(9.0, "own", 9.0), (17.0, "coupled", 16.0), (None, "coupled", None)]
    old = "epoch,chain,seqid,residue,atom,peak_sigma\nDIALS,A,204,IOD,I,9.0\n1,A,204,IOD,I,\n"
    run.peaks_file.write_text(old)
    found = [(p["peak_sigma"], p["difference"], p["peak_sigma_own"]) for p in run.read_peaks()]
    assert found == [(9.0, "own", 9.0), (None, "own", None)]


def test_rewind_forgets_later_epochs(config):
    run = RunDirectory.create(config)
    run.write_peaks("DIALS", [peak("204", 9.0)])
    for epoch in (1, 2, 3):
        run.append_metrics({"epoch": epoch})
        run.write_peaks(epoch, [peak("204", 1.0 * epoch)])
        run.epoch_mtz(epoch).touch()
        run.checkpoint(epoch).touch()
    run.rewind(2)
    assert [r["epoch"] for r in run.read_metrics()] == [1, 2]
    assert [p["epoch"] for p in run.read_peaks()] == ["DIALS", 1, 2]
    assert sorted(p.name for p in run.mtz_folder.iterdir()) == ["epoch_0001.mtz", "epoch_0002.mtz"]
    assert not run.checkpoint(3).exists()


def test_latest_names_the_checkpoint(config):
    run = RunDirectory.create(config)
    run.checkpoint(3).touch()
    run.mark_latest(3)
    assert run.latest_file.read_text() == "epoch_0003.pt\n"
    assert run.latest_checkpoint() == run.checkpoint(3)
    run.checkpoint(3).unlink()
    with pytest.raises(UserError, match=r"names epoch_0003.pt, which is not in"):
        run.latest_checkpoint()


def test_nothing_half_written_stays(config):
    run = RunDirectory.create(config)
    run.append_metrics({"epoch": 1})
    before = run.metrics_file.read_text()
    with pytest.raises(TypeError):
        run.append_metrics({"epoch": 2, "bad": object()})
    assert run.metrics_file.read_text() == before
    assert not [p for p in run.path.iterdir() if p.name.startswith(".")]


def test_a_checkpoint_of_another_model_is_one_line(tmp_path):
    class Trainer:
        def load_state_dict(self, state):
            torch.nn.Linear(2, 1).load_state_dict(state)

    save_torch(tmp_path / "epoch_0001.pt", torch.nn.Linear(3, 1).state_dict())
    with pytest.raises(UserError, match=r"epoch_0001.pt does not fit.*size mismatch") as refused:
        restore(Trainer(), tmp_path / "epoch_0001.pt")
    assert "\n" not in str(refused.value)
