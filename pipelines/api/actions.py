"""The commands as functions.

Options are those of the command line with ``_`` for ``-`` (``d_min=2.0`` for ``--d-min 2.0``);
``settings`` takes any other by its key in a configuration file.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.pipelines.api.amplitudes import PathLike
from braggflux.pipelines.api.results import Merge, Run
from braggflux.pipelines.commands.process import FLAGS as PROCESS_FLAGS
from braggflux.pipelines.config import schema
from braggflux.pipelines.config.flags import MERGE_FLAGS, RUN_FLAGS
from braggflux.pipelines.config.run import RunConfig
from braggflux.pipelines.inputs.inputs import MergeInputs

Config = TypeVar("Config", RunConfig, MergeConfig)

logger = logging.getLogger("braggflux")


def run(
    expt: PathLike | RunConfig,
    refl: PathLike | None = None,
    *,
    out: PathLike | None = None,
    resume: bool = False,
    progress: bool = True,
    settings: Mapping[str, object] | None = None,
    **options: object,
) -> Run:
    """Integrate and merge in one model, from the refined geometry of a DIALS project.

    As ``braggflux run``: the folder ``out`` then has merged amplitudes, report and all else.

    Parameters
    ----------
    expt, refl : str or Path
        DIALS files; or, alone, a :class:`RunConfig` with everything.
    out : str or Path
        Run directory.
    resume : bool
        Go on with the run in ``out`` from its checkpoint.
    progress : bool
        Say on stderr what is done.
    settings : mapping, optional
        Options by their dotted keys, like ``{"merge.prior": "wilson"}``.
    **options
        Those of the command line: ``model``, ``d_min``, ``epochs``, ``seed``, ``device``,
        ``reference``, ``coupling`` ...

    Returns
    -------
    Run

    Raises
    ------
    UserError
        One line: what was wrong, and what to do.

    Examples
    --------
    >>> import braggflux as bf
    >>> bf.run("frames/tiny.expt", "frames/tiny.refl", out="run", modell="frames/model.pdb")
    Traceback (most recent call last):
    braggflux.integrator.errors.UserError: run has no option modell; did you mean model? ...
    """
    from braggflux.pipelines.dials.process import finish
    from braggflux.pipelines.integration.run import run as run_pipeline

    if isinstance(expt, RunConfig):
        config = expt
    else:
        given = {"expt": expt, "refl": refl, "out": out}
        config = _configured(RunConfig(), "run", RUN_FLAGS, given, settings, options)
    config.require("expt", "refl", "out")
    with _told(progress):
        directory = finish(run_pipeline(config, resume=resume))
    return Run(directory.path)


def process(
    images: PathLike | Sequence[PathLike],
    *,
    out: PathLike,
    resume: bool = False,
    progress: bool = True,
    settings: Mapping[str, object] | None = None,
    **options: object,
) -> Run:
    """Take raw images to merged amplitudes, with an installed DIALS for the geometry.

    As ``braggflux process``.

    Parameters
    ----------
    images : str, Path or sequence of them
        HDF5 master file, or all frames of a sweep.
    out, resume, progress, settings, **options
        As :func:`run`; also ``space_group``, ``unit_cell``, ``nproc`` ...

    Returns
    -------
    Run
    """
    from braggflux.pipelines.dials.process import process as process_pipeline

    names = [images] if isinstance(images, str | Path) else list(images)
    given = {"dials.images": [str(name) for name in names], "out": out}
    config = _configured(RunConfig(), "process", PROCESS_FLAGS, given, settings, options)
    with _told(progress):
        directory = process_pipeline(config, resume=resume)
    return Run(directory.path)


def merge(
    paths: PathLike | Sequence[PathLike] | MergeInputs,
    out: PathLike | MergeConfig | None = None,
    *,
    progress: bool = True,
    settings: Mapping[str, object] | None = None,
    parents: Sequence[int | None] | None = None,
    space_group: str | None = None,
    unit_cell: str | None = None,
    prior_model: PathLike | None = None,
    freeze_scales: PathLike | None = None,
    **options: object,
) -> Merge:
    """Merge unmerged reflections of any program: rotation, Laue, stills.

    As ``braggflux merge``.

    Parameters
    ----------
    paths : str, Path or sequence of them
        Unmerged MTZ, ``.refl``, XDS, ``.stream``, ``intensities.h5`` ...; each a data set. Or
        :class:`MergeInputs`, with a :class:`MergeConfig` after it.
    out : str or Path
        Folder to write.
    progress, settings
        As :func:`run`.
    parents : sequence of int or None, optional
        Data set that each resembles.
    space_group, unit_cell, prior_model, freeze_scales
        As on the command line.
    **options
        ``anomalous``, ``d_min``, ``stills``, ``laue``, ``prior``, ``epochs``, ``seed`` ...

    Returns
    -------
    Merge
        Iterating over it gives the amplitudes of each data set.
    """
    from braggflux.pipelines.merging.merge import merge as merge_pipeline
    from braggflux.pipelines.report.html import write_merge_report

    if isinstance(paths, MergeInputs):
        inputs = paths
        config = out if isinstance(out, MergeConfig) else MergeConfig()
    else:
        if out is None or isinstance(out, MergeConfig):
            raise UserError("out is not given; name the folder to write: merge(paths, out)")
        names = [paths] if isinstance(paths, str | Path) else list(paths)
        inputs = MergeInputs(
            tuple(map(Path, names)),
            Path(out),
            None if parents is None else tuple(parents),
            space_group=space_group,
            unit_cell=unit_cell,
            prior_model=None if prior_model is None else Path(prior_model),
            freeze_scales=None if freeze_scales is None else Path(freeze_scales),
        )
        config = _configured(MergeConfig(), "merge", MERGE_FLAGS, {}, settings, options)
    with _told(progress):
        written = merge_pipeline(inputs, config)
        write_merge_report(inputs.out)
    return Merge.of(written)


def _configured(
    config: Config,
    command: str,
    flags: Mapping[str, str],
    given: Mapping[str, object],
    settings: Mapping[str, object] | None,
    options: Mapping[str, object],
) -> Config:
    """Set what is given in a configuration, options under the names of their flags."""
    known = {flag.removeprefix("--").replace("-", "_"): key for flag, key in flags.items()}
    wanted = dict(given) | dict(settings or {})
    for name, value in options.items():
        if name not in known:
            guess = schema.did_you_mean(name, known)
            raise UserError(
                f"{command} has no option {name}{guess or ';'} there are "
                f"{', '.join(sorted(known))}; others by their key: settings={{...}}"
            )
        wanted[known[name]] = value
    plain = {key: _plain(value) for key, value in wanted.items() if value is not None}
    return schema.updated(config, plain)


def _plain(value: Any) -> Any:
    """Paths as text, as they stand in a file of options."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return value.__fspath__() if hasattr(value, "__fspath__") else value


@contextmanager
def _told(progress: bool) -> Iterator[None]:
    """Show what our packages say, where nobody does so yet, or nothing; leave all as it was."""
    from braggflux.pipelines.workspace import log

    handler, before = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    if progress and not logging.getLogger().handlers and not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # the log of a run has it in any case
    tables = nullcontext() if progress else redirect_stdout(io.StringIO())
    try:
        with tables:
            yield
    finally:
        log.detach_files()
        logger.setLevel(before)
        logger.removeHandler(handler)
