"""What people see while they wait and at the end: time, the field's words, tables that fit."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path

import pytest
import yaml

from braggflux.pipelines import cli
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.deposition.files import show_table_one
from braggflux.pipelines.integration.epoch_outputs import summary_line
from braggflux.pipelines.integration.trainer import EpochResult
from braggflux.pipelines.maps.anomalous_peaks import SitePeak
from braggflux.pipelines.report.terminal import MAX_WIDTH, write_table
from braggflux.pipelines.workspace import log

WIDE = [f"rms error of column {k}" for k in range(6)]


def test_the_name_alone_prints_the_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr()
    assert all(command in printed.out for command in cli.COMMANDS)
    assert printed.err == ""


@pytest.mark.parametrize("command", ["run", "process", "merge"])
def test_help_of_a_command_speaks_of_flags_and_not_of_files(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for word in ("null", "a path", "a whole number"):
        assert word not in text
    for heading in ("files:", "crystal and data:", "computing:", "all other options:"):
        assert heading in text or (command == "merge" and heading == "files:")


@pytest.mark.parametrize("command", ["run", "process", "merge"])
def test_every_option_is_printed_and_read_back(command, capsys):
    assert cli.main(["config", command]) == 0
    text = capsys.readouterr().out
    mapping = yaml.safe_load(text)
    if command == "merge":
        assert mapping["likelihood"] == "studentt"
        return
    assert schema.from_mapping(RunConfig, mapping) == RunConfig()
    assert re.search(r"# Passes over all observations.*\n  epochs: 6\n", text)


def test_a_wide_table_goes_on_below_with_its_first_columns(capsys):
    rows = [[f"{k}-{k + 1}", "100", *("0.123" for _ in WIDE)] for k in range(3)]
    write_table("by shell", ["d", "n", *WIDE], rows, notes=["a reason " * 20], n_fixed=2)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= MAX_WIDTH
    heads = [line for line in lines if line.startswith("d ")]
    assert len(heads) > 1
    assert all(head.split()[:2] == ["d", "n"] for head in heads)
    assert [c for head in heads for c in WIDE if c in head] == WIDE, "each once, in order"


def test_the_line_of_an_epoch_is_in_the_words_of_the_field():
    metrics = {"merge_elbo": -4.6, "pixel_nll": -1800.0, "wall_s": 30.0}
    overall = {"r_pim": 0.0213, "cc_half": 0.99891, "cc_anom": 0.512}
    peak = SitePeak("A", "204", "IOD", "I", 16.9)
    line = summary_line(EpochResult(2, metrics), overall, [peak], 6, "")
    assert line == (
        "epoch 2/6  R_pim 0.021  CC1/2 0.9989  CCanom 0.512  peaks IOD204 16.90  30.0 s  "
        "about 2 min left"
    )
    last = summary_line(EpochResult(6, metrics), {}, [], 6, "light")
    assert last == "epoch 6/6  light  30.0 s"


def test_table_one_is_shown_without_its_definitions(tmp_path, capsys):
    path = tmp_path / "light_table1.txt"
    path.write_text("Table 1.\n\nR_meas  0.035\n\nDefinitions\nR_meas: as in 1997\n")
    show_table_one([tmp_path / "table1.csv", path])
    assert capsys.readouterr().out == "Table 1.\n\nR_meas  0.035\n\n"


def test_another_program_at_work_is_not_silent(monkeypatch, caplog):
    monkeypatch.setattr(log, "PLAIN_INTERVAL_S", 0.01)
    monkeypatch.setattr(log, "HINT_AFTER_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with (
        caplog.at_level(logging.INFO, "braggflux"),
        log.running("dials.index", Path("log.index"), "the space group may be wrong"),
    ):
        deadline = time.monotonic() + 5.0
        while len(caplog.messages) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert any("dials.index: running for" in m and "log.index" in m for m in caplog.messages)
    assert sum("the space group may be wrong" in m for m in caplog.messages) == 1, "said once"
