"""Driving DIALS: what is run, what is not repeated, and what a failure says."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import hdf5plugin
import pytest

from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.run import DialsConfig
from braggflux.pipelines.dials.chain import DialsChain, StepError, last_message

OUTPUTS = {
    "import": "imported.expt",
    "find_spots": "strong.refl",
    "index": "indexed.expt indexed.refl",
    "refine": "refined.expt refined.refl",
    "integrate": "integrated.expt integrated.refl",
    "scale": "scaled.expt scaled.refl",
    "merge": "merged.mtz",
}


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """Programs named as DIALS', which note their arguments and write their output files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, outputs in OUTPUTS.items():
        write_program(folder / f"dials.{name}", f"touch {outputs}")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def write_program(path: Path, body: str) -> None:
    path.write_text(f'#!/bin/sh\necho "$(basename $0) $@" >> "$CALLS"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def config(tmp_path) -> DialsConfig:
    image = tmp_path / "x_master.h5"
    image.touch()
    return DialsConfig(images=(image,), nproc=2, space_group="P43212")


def calls(tmp_path: Path) -> list[str]:
    file = tmp_path / "calls"
    lines = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def test_steps_and_their_arguments(programs, config, tmp_path):
    config = replace(
        config,
        unit_cell=(5.428, 8.141, 12.038, 90, 90, 90),
        index_args=("detector.fix=all max_cell=20",),
        integrate_args=("min_spots.per_degree=5 min_spots.overall=10",),
    )
    chain = DialsChain(tmp_path / "dials", config, d_min=2.0)
    expt, refl = chain.geometry()
    assert (expt.name, refl.name) == ("refined.expt", "refined.refl")
    assert expt.is_file()
    reference = chain.reference()
    assert reference.merged == tmp_path / "dials" / "merged.mtz"
    assert reference.reason == ""
    assert calls(tmp_path) == [
        f"dials.import {config.images[0]}",
        "dials.find_spots imported.expt nproc=2",
        "dials.index imported.expt strong.refl indexing.nproc=2 space_group=P43212 "
        "unit_cell=5.428,8.141,12.038,90,90,90 detector.fix=all max_cell=20",
        "dials.refine indexed.expt indexed.refl",
        "dials.integrate refined.expt refined.refl nproc=2 prediction.d_min=2 "
        "min_spots.per_degree=5 min_spots.overall=10",
        "dials.scale integrated.expt integrated.refl anomalous=True d_min=2",
        "dials.merge scaled.expt scaled.refl anomalous=True",
    ]


def test_finished_steps_are_not_repeated(programs, config, tmp_path):
    DialsChain(tmp_path / "dials", config).geometry()
    calls(tmp_path)
    DialsChain(tmp_path / "dials", replace(config, nproc=1)).geometry()
    assert calls(tmp_path) == [], "the number of processes does not change the result"

    (tmp_path / "dials" / "refined.refl").unlink()
    DialsChain(tmp_path / "dials", config).geometry()
    assert [c.split()[0] for c in calls(tmp_path)] == ["dials.refine"]

    changed = replace(config, space_group="P41212")
    DialsChain(tmp_path / "dials", changed).geometry()
    assert [c.split()[0] for c in calls(tmp_path)] == ["dials.index", "dials.refine"]

    os.utime(config.images[0], ns=(1, 1))
    DialsChain(tmp_path / "dials", changed).geometry()
    assert len(calls(tmp_path)) == 4, "other images: everything again"


def test_an_interrupted_step_is_repeated(programs, config, tmp_path):
    write_program(programs / "dials.refine", "touch refined.expt refined.refl; exit 1")
    with pytest.raises(StepError):
        DialsChain(tmp_path / "dials", config).geometry()
    calls(tmp_path)
    write_program(programs / "dials.refine", "touch refined.expt refined.refl")
    DialsChain(tmp_path / "dials", config).geometry()
    assert [c.split()[0] for c in calls(tmp_path)] == ["dials.refine"]


def test_success_without_output_is_a_failure(programs, config, tmp_path):
    write_program(programs / "dials.import", "echo 'No images found'")
    with pytest.raises(UserError, match=r"dials.import failed: No images found; see .*log.import"):
        DialsChain(tmp_path / "dials", config).geometry()


def test_a_refused_reference_is_missing_with_its_reason(programs, config, tmp_path):
    body = "echo 'Sorry: no overlapping data'; exit 1"
    write_program(programs / "dials.scale", body)
    chain = DialsChain(tmp_path / "dials", config)
    chain.geometry()
    reference = chain.reference()
    assert reference.merged is None
    assert reference.integrated == tmp_path / "dials" / "integrated.refl"
    assert "dials.scale failed: Sorry: no overlapping data" in reference.reason


def test_programs_find_the_filters_of_hdf5(programs, config, tmp_path):
    write_program(programs / "dials.import", 'echo "$HDF5_PLUGIN_PATH" > imported.expt')
    chain = DialsChain(tmp_path / "dials", config)
    chain.geometry()
    assert (chain.folder / "imported.expt").read_text().strip() == hdf5plugin.PLUGINS_PATH


def test_without_dials(config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"DIALS is not installed .*apt install dials"):
        DialsChain(tmp_path / "dials", config)
    assert not (tmp_path / "dials").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nSorry: Unknown command line parameter definition: foo = 3\n", "Sorry: Unknown comm"),
        (
            'Traceback\n  File "x.py", line 1, in f\nRuntimeError: Please report this error to '
            "dials-support@lists.sourceforge.net: cctbx Error: Space group symbol not recognized",
            "cctbx Error: Space group symbol not recognized",
        ),
        ("DIALS 3.12\nUnable to handle the following arguments:\n  x.h5\n\nusage: y", "x.h5"),
        ("Using d_min_step 0.2\nNo suitable lattice could be found.\n\n", "No suitable lattice"),
        ("done\n+----+\n|    |\n", "done"),
        ("", "it said nothing"),
    ],
)
def test_last_message(tmp_path, text, expected):
    file = tmp_path / "log"
    file.write_text(text)
    message = last_message(file)
    assert expected in message
    assert "\n" not in message


@pytest.mark.dials
def test_real_dials_refuses_what_is_no_image(dials, tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("no image")
    chain = DialsChain(tmp_path / "dials", DialsConfig(images=(text,)))
    with pytest.raises(UserError, match=r"dials.import failed: Unable to handle .* .*text\.h5"):
        chain.geometry()


@pytest.mark.slow
@pytest.mark.dials
@pytest.mark.realdata
def test_real_dials_on_two_sweeps(dials, shared, tmp_path):
    """Both sweeps of L-cysteine are indexed together, with what the user adds."""
    images = sorted((shared / "data" / "l_cysteine").glob("*.cbf.gz"))
    config = DialsConfig(
        images=tuple(images),
        unit_cell=(5.428, 8.141, 12.038, 90, 90, 90),
        space_group="P212121",
        index_args=("detector.fix=all",),
    )
    expt, refl = DialsChain(tmp_path / "dials", config).geometry()
    from braggflux.integrator.io.dials import read_experiments, read_reflections

    experiments = read_experiments(expt)
    assert len(experiments) == 2
    assert all(e.crystal.space_group.number == 19 for e in experiments)
    assert set(read_reflections(refl)["id"].tolist()) >= {0, 1}
