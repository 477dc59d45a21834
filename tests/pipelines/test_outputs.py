"""Results are not written over: every command that writes, and what may be written over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli
from braggflux.pipelines.workspace import outputs
from braggflux.pipelines.workspace.rundir import RunDirectory


def content(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("names", "command"),
    [
        (["store.h5"], ["extract", "a.expt", "a.refl", "--out", "{out}/store.h5"]),
        (["store.h5"], ["convert", "a.mtz", "--out", "{out}/store.h5"]),
        (["merged.mtz"], ["merge", "a.mtz", "--out", "{out}"]),
        (["other_merged.mtz"], ["merge", "a.mtz", "b.mtz", "--out", "{out}"]),
        (["config.yaml"], ["merge", "a.mtz", "--out", "{out}"]),
        (["tiny_master.h5"], ["simulate", "--preset", "tiny", "--out", "{out}"]),
        (["truth.npz"], ["simulate", "--preset", "multipanel", "--out", "{out}"]),
        (["stills.h5"], ["simulate", "--preset", "stills", "--out", "{out}"]),
        (["config.yaml", "latest"], ["run", "a.expt", "a.refl", "--out", "{out}"]),
        (["config.yaml", "latest"], ["process", "a.h5", "--out", "{out}"]),
    ],
)
def test_an_earlier_result_stays(tmp_path, monkeypatch, capsys, names, command):
    monkeypatch.chdir(tmp_path)
    for name in ("a.expt", "a.refl", "a.mtz", "b.mtz", "a.h5"):
        Path(name).write_text("")
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("of an earlier day")
    before = content(out)
    if command[0] in ("run", "process"):
        with pytest.raises(UserError, match="already holds a run; add --resume"):
            RunDirectory(out).check_free(resume=False)
        return
    assert cli.main([word.format(out=out) for word in command]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error" in x]
    assert "choose another --out" in line
    assert names[0] in line
    assert content(out) == before


def test_other_files_are_no_result(tmp_path):
    for name in ("integrated.mtz", "scaled.mtz", "refined.expt", "notes.txt"):
        (tmp_path / name).write_text("")
    outputs.require_free_folder(tmp_path, outputs.MERGE_RESULTS)
    outputs.require_free_folder(tmp_path / "new", outputs.MERGE_RESULTS)
    outputs.require_free_folder(tmp_path, outputs.SIMULATE_RESULTS)
    outputs.require_free_file(tmp_path / "store.h5")


def test_a_folder_that_is_missing_is_said_before_the_work(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        outputs.require_free_file(tmp_path / "none" / "store.h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; --out must name a folder"):
        outputs.require_free_folder(tmp_path / "file", ())


@pytest.mark.parametrize("ended", [None, "2026-11-29T12:00:00"])  # an earlier version's has none
def test_a_merge_is_never_written_over(tmp_path, ended):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "provenance.json").write_text(json.dumps({"started": "x", "ended": ended}))
    with pytest.raises(UserError, match=r"holds an earlier result \(config.yaml\)"):
        outputs.require_free_folder(tmp_path, outputs.MERGE_RESULTS)
    with pytest.raises(UserError, match="holds a result of merge"):
        RunDirectory(tmp_path).check_free(resume=True)


def test_a_merge_into_a_run_leaves_it(tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps({"sessions": [{"ended": None}]}))
    with pytest.raises(UserError, match=r"holds an earlier result \(provenance.json\)"):
        outputs.require_free_folder(tmp_path, outputs.MERGE_RESULTS)
