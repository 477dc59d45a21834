"""Records of a run directory that are damaged: each command says so in one line."""

from __future__ import annotations

import json
import logging

import pytest
from simulated_run import write_run

from braggflux.integrator.errors import UserError
from braggflux.pipelines import cli
from braggflux.pipelines.api.results import Merge
from braggflux.pipelines.workspace.file_sums import KEY, sums_of, tell_changed
from braggflux.pipelines.workspace.records.readers import (
    MergeRecord,
    read_json,
    read_rows,
    read_table,
)
from braggflux.pipelines.workspace.rundir import RunDirectory

DAMAGE = {
    "no JSON": ("provenance.json", "{"),
    "no list": ("provenance.json", '{"sessions": 3, "inputs": {}, "notes": {}}'),
    "no session": ("provenance.json", '{"sessions": [], "inputs": {}, "notes": {}}'),
    "no mapping": ("provenance.json", "[]"),
    "no time": (
        "provenance.json",
        '{"sessions": [{"started": "soon"}], "inputs": {}, "notes": {}}',
    ),
    "no setting": ("config.yaml", "training: 3"),
    "no YAML": ("config.yaml", "a: [b"),
}


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path, 20)


def refused(capsys, *command: object) -> str:
    assert cli.main([*map(str, command)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", ["view", "report", "compare"])
def test_commands_name_the_file(run, capsys, command, damage):
    name, content = DAMAGE[damage]
    (run.path / name).write_text(content)
    assert name in refused(capsys, command, run.path)


@pytest.mark.parametrize("command", ["view", "report", "compare"])
def test_commands_refuse_a_folder_with_a_changed_file(run, capsys, command):
    run.merged.write_bytes(b"MTZ 1")
    run.finish()
    run.merged.write_bytes(b"MTZ 2")
    assert "merged.mtz has changed since" in refused(capsys, command, run.path)


def test_a_changed_file_given_by_its_name_is_a_warning(run, caplog):
    """It may have been edited; one beside which nothing is recorded is passed by."""
    epoch = run.epoch_mtz(1)
    epoch.parent.mkdir()
    for path in (run.merged, epoch):
        path.write_bytes(b"MTZ 1")
    run.finish()
    other = run.path / "other.mtz"
    other.write_bytes(b"MTZ 1")
    with caplog.at_level(logging.WARNING):
        tell_changed([run.merged, epoch, other, None, run.path / "none.mtz"])
        assert not caplog.messages
        for path in (run.merged, epoch):
            path.write_bytes(b"MTZ 2")
        tell_changed([run.merged, epoch, other])
        assert [message.partition(" is not as")[0] for message in caplog.messages] == [
            str(run.merged),
            str(epoch),
        ]
        assert "it was edited, or is damaged" in caplog.messages[0]
        run.provenance_file.write_text("of another program")
        tell_changed([run.merged])
        assert len(caplog.messages) == 2


def test_a_merge_with_a_changed_file_is_refused(tmp_path):
    (tmp_path / "merged.mtz").write_bytes(b"MTZ 1")
    session = {"started": "2026-11-30T01:00:00", "ended": "2026-11-30T02:00:00", "inputs": {}}
    record = tmp_path / "provenance.json"
    record.write_text(json.dumps(session | {KEY: sums_of(tmp_path)}))
    assert len(Merge(tmp_path)) == 1
    (tmp_path / "merged.mtz").write_bytes(b"MTZ 2")
    with pytest.raises(UserError, match=r"merged.mtz has changed since"):
        Merge(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"epoch": 0}\n{"epo'),
        ("metrics.jsonl", '{"epoch": "first"}\n'),
        ("metrics.jsonl", '{"epoch": 1, "r_pim": [1]}\n'),
        ("compare.csv", "comparison,bin\na,b\n"),
        ("compare.csv", "comparison,bin,metric,subject,value\na,b,c,d,nan\n"),
        ("compare.csv", "comparison,bin,metric,subject,value\na,b,c,d,1,2,3\n"),
    ],
)
def test_the_report_names_the_table(run, capsys, name, content):
    (run.path / name).write_text(content)
    assert name in refused(capsys, "report", run.path)


def test_a_checkpoint_that_is_no_text(run):
    run.latest_file.write_bytes(b"\xd5\n")
    with pytest.raises(UserError, match="latest is damaged"):
        run.latest_checkpoint()


def test_what_the_program_writes_is_read(run):
    run.append_metrics({"epoch": 1, "lr": None, "r_pim": float("nan"), "is_last": True})
    (row,) = RunDirectory.open(run.path).read_metrics()
    assert row["reasons"] == {"r_pim": "not finite: nan"}
    run.note("peaks", "no model")
    assert run.read_provenance()["notes"] == {"peaks": "no model"}
    run.write_stage_times([{"epoch": 0, "stage": "extraction", "wall_s": 1.5, "cpu_s": 1.0}])
    assert run.read_stage_times()[0]["wall_s"] == 1.5


def test_record_of_a_merge_and_rows_without_a_file(run):
    made = run.path / "provenance.json"
    session = json.loads(made.read_text())["sessions"][0]
    made.write_text(json.dumps(session | {"inputs": {"mtz": {"path": "a.mtz", "size": 3}}}))
    assert read_json(made, MergeRecord)["inputs"]["mtz"]["size"] == 3
    made.write_text(json.dumps(session | {"inputs": {"mtz": {"path": "a.mtz", "size": -3}}}))
    with pytest.raises(UserError, match="size"):
        read_json(made, MergeRecord)
    assert read_rows(run.path / "none.csv") == read_table(run.path / "none.csv") == []
