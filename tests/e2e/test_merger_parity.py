"""`run` and `merge` on the same photon counts give the same amplitudes, by independent scorers.

A crystal of 120 images to 3.5 A, four times as bright as the demo's, so that what is left between
the two mergers is no noise: single heights move by a sigma with the photons, and here both see
the same ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from braggflux.fixtures.simulate import SimulatedFiles, simulate
from braggflux.pipelines import cli

pytestmark = [pytest.mark.slow, pytest.mark.realdata]

BRIGHT = {"scan.n_images": 120, "intensity.photons_per_f2": 4e-3}
RUN_OPTIONS = (
    *("--d-min", "3.5", "--epochs", "2", "--device", "cpu"),
    *("--set", "integrator.n_profile_spots=500", "--set", "integrator.encoder_width=16"),
)


@dataclass(frozen=True)
class Allowed:
    """How far `merge` may be from `run`."""

    heights: float  # relative, of the sum of the iodides' heights
    correlation: float  # of Bijvoet differences with the truth, in every shell
    r: float  # relative, by which R of the mean amplitude may be above that of `run`


#: What one merging model for both must reach; two mergers had 1.9 %, .006 and 19 % here.
ALLOWED = Allowed(heights=0.01, correlation=0.003, r=0.05)

#: By shell, 60-5 and 5-3.5 A: the lower one of `run` and `merge` at commit 6325007, 2026-11-29,
#: when these differed (.866 .732 and .863 .738). Floors, less ROUNDING.
GOLDEN_CORRELATION = (0.863, 0.732)
#: Another processor or torch.
ROUNDING = 0.003


@dataclass(frozen=True)
class Scores:
    """Of one merged file, with the pairs that both files have."""

    heights: float
    correlation: list[float]
    r: list[float]


def score(tools: Path, files: SimulatedFiles, merged: list[Path]) -> list[Scores]:
    """Scores of all files, by the scorers of ../shared/tools."""

    def call(name: str, *arguments: object) -> dict:
        command = [sys.executable, "-W", "ignore", str(tools / name), *map(str, arguments)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return json.loads(output)

    shells = call("bijvoet_truth.py", files.truth_mtz, *merged, "--json")
    result = []
    for path in merged:
        peaks = call("anomalous_peaks.py", path, files.model, "--sites", "IOD", "--json")["peaks"]
        assert len(peaks) == 3
        rows = shells[str(path)]
        assert [row["shell"] for row in rows] == ["60-5", "5-3.5"]
        correlation = [row["cc_bijvoet"] for row in rows]
        result.append(Scores(sum(peaks.values()), correlation, [row["r_mean"] for row in rows]))
    return result


@pytest.fixture(scope="module")
def bright(tmp_path_factory) -> SimulatedFiles:
    return simulate(tmp_path_factory.mktemp("bright"), preset="tiny", seed=0, overrides=BRIGHT)


@pytest.mark.parametrize("coupling", ["staged", "joint"])
def test_merge_of_the_photon_counts_gives_what_the_run_gave(coupling, bright, shared, tmp_path):
    run, again = tmp_path / "run", tmp_path / "again"
    geometry = (str(bright.expt), str(bright.refl))
    options = (*RUN_OPTIONS, "--coupling", coupling, "--out", str(run))
    assert cli.main(["run", *geometry, *options]) == 0
    counts = str(run / "intensities.h5")
    assert cli.main(["merge", counts, "--anomalous", "--out", str(again)]) == 0

    merged = [folder / "merged.mtz" for folder in (run, again)]
    ours, theirs = score(shared / "tools", bright, merged)
    # Seen 2026-11-29: 41.6 and 42.4
    assert theirs.heights == pytest.approx(ours.heights, rel=ALLOWED.heights)
    assert theirs.correlation == pytest.approx(ours.correlation, abs=ALLOWED.correlation)
    for r, r_of_run in zip(theirs.r, ours.r, strict=True):
        assert r < r_of_run * (1 + ALLOWED.r)
    for found, golden in zip(theirs.correlation, GOLDEN_CORRELATION, strict=True):
        assert found > golden - ROUNDING
