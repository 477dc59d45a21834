"""Simulated data, to try everything on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from braggflux.pipelines.api.amplitudes import PathLike

if TYPE_CHECKING:
    from braggflux.fixtures.simulate import SimulatedFiles
    from braggflux.pipelines.simulate.stills_store import StillsFiles


def simulate(out: PathLike, preset: str = "tiny", *, seed: int = 0) -> SimulatedFiles:
    """Simulate frames of lysozyme with iodides, with their geometry and the truth.

    As ``braggflux simulate``.

    Parameters
    ----------
    out : str or Path
        Folder to write; files of an earlier simulation of the preset are replaced.
    preset : str
        ``tiny``, ``crowded`` or ``multipanel`` (seconds), or ``hewl-iodide`` (the demo).
    seed : int
        Same seed, same frames.

    Returns
    -------
    SimulatedFiles
        Paths: ``master``, ``expt``, ``refl``, ``model``, ``truth_mtz`` ...

    Examples
    --------
    >>> import braggflux as bf
    >>> files = bf.simulate("frames", "tiny")
    >>> files.expt.name, files.model.name
    ('tiny.expt', 'model.pdb')
    """
    from braggflux.fixtures.simulate import simulate as simulate_frames

    return simulate_frames(out, preset, seed)


def simulate_stills(out: PathLike, n_images: int = 1646, *, seed: int = 0) -> StillsFiles:
    """Simulate the unmerged observations of a serial experiment, without frames.

    Parameters
    ----------
    out : str or Path
        Folder to write.
    n_images : int
    seed : int
        Same seed, same observations.

    Returns
    -------
    StillsFiles
        Paths: ``observations``, ``truth_mtz``, ``truth_images``.
    """
    from pathlib import Path

    from braggflux.fixtures.stills import StillsExperiment, StillsSettings
    from braggflux.pipelines.simulate.stills_store import write_stills

    settings = StillsSettings(n_images=n_images, seed=seed)
    return write_stills(Path(out), StillsExperiment(settings), lambda done, total: None)
