"""Inputs that the command line of a merge names, read and checked."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import gemmi

from braggflux.integrator.crystal.forms import CELL_TOLERANCE, cell_text
from braggflux.integrator.crystal.lattice import check_lattice
from braggflux.integrator.errors import UserError
from braggflux.integrator.io.file_kinds import DATA_FILE, MASTER, MODEL, SHOEBOXES, file_kind
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.grouping import GroupStore, combine_group
from braggflux.merge.io.observations import UnmergedData, combine_friedel
from braggflux.merge.io.read import read_table
from braggflux.merge.io.reindexing import reindex
from braggflux.merge.io.screening import screened
from braggflux.merge.io.stores.chosen_group import StoreInGroup, in_group
from braggflux.merge.io.stores.friedel_store import FriedelStore
from braggflux.merge.io.stores.observation_store import ObservationStore
from braggflux.merge.io.stores.reindexed_store import reindex_store
from braggflux.merge.io.stores.unmerged_store import UnmergedStore
from braggflux.merge.model.saved_scale import scale_file
from braggflux.pipelines.config import schema
from braggflux.pipelines.inputs.grouping import apply_groups
from braggflux.pipelines.inputs.reindexing import Dataset, apply_reindex, parse_reindex
from braggflux.pipelines.inputs.shared_photons import check_paths, check_shared_photons
from braggflux.pipelines.workspace import log, provenance
from braggflux.pipelines.workspace.file_sums import KEY, sums_of, tell_changed
from braggflux.pipelines.workspace.outputs import PROVENANCE, UNFINISHED, move_results
from braggflux.pipelines.workspace.rundir import write_text


@dataclass(frozen=True)
class MergeInputs:
    """Files, and how they are to be read.

    Parameters
    ----------
    paths : tuple of Path
    out : Path
        Folder to write.
    parents : tuple of int or None, optional
        Dataset that each dataset resembles; None for no relation at all.
    is_friedel : bool
        The two files are the Friedel halves of one dataset.
    space_group : str, optional
        Instead of that of the files, which some (streams) do not hold.
    unit_cell : str, optional
        For files that hold none (SCALEPACK).
    reindex : tuple of str
        Operators (:func:`braggflux.pipelines.inputs.reindexing.parse_reindex`).
    groups : tuple of (tuple of int, or None)
        Datasets that are one (:func:`braggflux.pipelines.inputs.grouping.parse_groups`), None for
        all.
    prior_model : Path, optional
        Model or merged MTZ whose amplitudes the data resemble.
    freeze_scales : Path, optional
        Earlier merge whose scales are used.
    """

    paths: tuple[Path, ...]
    out: Path
    parents: tuple[int | None, ...] | None = None
    is_friedel: bool = False
    space_group: str | None = None
    unit_cell: str | None = None
    reindex: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...] | None, ...] = ()
    prior_model: Path | None = None
    freeze_scales: Path | None = None

    def read(self, *, is_laue: bool = False) -> list[UnmergedData]:
        """Read all observations, screened, reindexed, Friedel halves joined.

        Raises
        ------
        UserError
        """
        check_paths(self.paths)
        group, cell = parse_space_group(self.space_group), parse_unit_cell(self.unit_cell)
        data = read_table(self.paths, space_group=group, cell=cell)
        if group is not None:
            data = [in_group(d, group) for d in data]
        data = self._reindexed([screened(d, is_laue=is_laue) for d in data], reindex)
        check_shared_photons(data, self.groups, self.parents)
        return self._joined(
            data,
            lambda members, step: screened(combine_group(members, step)),
            lambda plus, minus: screened(combine_friedel(plus, minus)),
        )

    @contextmanager
    def open(self) -> Iterator[list[ObservationStore]]:
        """Open stores, reindexed, Friedel halves joined as they are read.

        Raises
        ------
        UserError
        """
        check_paths(self.paths)
        with ExitStack() as opened:
            stores = [opened.enter_context(UnmergedStore(path)) for path in self.paths]
            group = parse_space_group(self.space_group)
            if group is not None:
                stores = [StoreInGroup(store, group) for store in stores]
            stores = self._reindexed(stores, reindex_store)
            yield self._joined(stores, GroupStore, FriedelStore)

    def _reindexed(
        self, data: Sequence[Dataset], reindex: Callable[[Dataset, str], Dataset]
    ) -> list[Dataset]:
        """Check the forms, and apply the operators: the first step, which counts the inputs."""
        given = parse_unit_cell(self.unit_cell)
        for dataset in data:
            check_lattice(dataset.cell, dataset.space_group, dataset.name)
            if given is not None:
                check_given_cell(dataset, given)
        return apply_reindex(data, parse_reindex(self.reindex), reindex)

    def _joined(
        self,
        data: Sequence[Dataset],
        combine_group: Callable[[Sequence[Dataset], int], Dataset],
        combine_friedel: Callable[[Dataset, Dataset], Dataset],
    ) -> list[Dataset]:
        """Join groups, then Friedel halves, which count the groups."""
        data = apply_groups(data, self.groups, combine_group)
        if not self.is_friedel:
            return data
        if len(data) != 2:
            raise UserError(
                f"--friedel takes the two Friedel halves of one crystal form, got {len(data)} "
                "dataset(s): give PLUS.mtz MINUS.mtz"
            )
        return [combine_friedel(*data)]

    def require_files(self, config: MergeConfig) -> None:
        """Raise :class:`UserError` unless the files that are named exist, the inputs by kind."""
        check_unmerged(self.paths)
        named = {"--prior-model": self.prior_model}
        named |= {"--reference-intensities": config.reference_intensities}
        named |= {"--free-r": config.free_r}
        for what, path in named.items():
            if path is not None and not path.is_file():
                raise UserError(f"{what}: {path} does not exist; correct the path")
        tell_changed([*self.paths, *named.values()])

    def open_folder(self, config: MergeConfig) -> None:
        """Begin to write: the settings, the versions and inputs, and the log.

        All but the log goes to :attr:`unfinished` until the merge has ended: what a killed merge
        has written is never taken for a result.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.unfinished.mkdir()
        write_text(self.unfinished / "config.yaml", schema.annotated_yaml(config))
        files = {f"input {i + 1}": path for i, path in enumerate(self.paths)}
        more = {
            "prior_model": self.prior_model,
            "reference_intensities": config.reference_intensities,
            "free_r": config.free_r,
            "freeze_scales": None
            if self.freeze_scales is None
            else scale_file(self.freeze_scales),
        }
        files |= {name: path for name, path in more.items() if path is not None}
        record = provenance.session_record() | {"inputs": provenance.input_records(files)}
        write_text(self.unfinished / PROVENANCE, json.dumps(record, indent=2) + "\n")
        log.attach_file(self.out / "run.log")

    def close_folder(self, written: Iterable[Path]) -> list[Path]:
        """Note when the merge has ended, and move its files to their places.

        Parameters
        ----------
        written : iterable of Path
            Files in :attr:`unfinished`.

        Returns
        -------
        list of Path
            Where these are now.
        """
        path = self.unfinished / PROVENANCE
        record = json.loads(path.read_text(encoding="utf-8")) | {"ended": provenance.now()}
        record[KEY] = sums_of(self.unfinished)
        write_text(path, json.dumps(record, indent=2) + "\n")
        move_results(self.unfinished, self.out)
        return [self.out / file.name for file in written]

    @property
    def unfinished(self) -> Path:
        """Folder of the files of a merge that has not ended."""
        return self.out / UNFINISHED


def check_unmerged(paths: Sequence[Path]) -> None:
    """Check that inputs of `merge` and `convert` are no images, boxes or models.

    Raises
    ------
    UserError
    """
    for path in paths:
        kind = file_kind(path)
        if kind in (MASTER, DATA_FILE, SHOEBOXES, MODEL):
            raise UserError(
                f"{path} is {kind}; unmerged reflections are needed here: integrate first, with "
                "`braggflux process` or `braggflux run`"
            )


def parse_space_group(name: str | None) -> gemmi.SpaceGroup | None:
    """Look a space group up by its name.

    Raises
    ------
    UserError
    """
    if name is None:
        return None
    group = gemmi.find_spacegroup_by_name(name)
    if group is None:
        raise UserError(
            f"--space-group {name}: no such space group; give a Hermann-Mauguin symbol, "
            "e.g. P43212 or 'P 63'"
        )
    return group


def parse_unit_cell(text: str | None) -> gemmi.UnitCell | None:
    """Read ``79.4,79.4,37.8,90,90,90`` [A, degrees].

    Raises
    ------
    UserError
    """
    if text is None:
        return None
    try:
        values = [float(word) for word in text.split(",")]
    except ValueError:
        values = []
    if len(values) != 6 or min(values) <= 0.0 or max(values[3:]) >= 180.0:
        raise UserError(
            f"--unit-cell {text}: six positive numbers are needed, lengths in A and angles below "
            "180 degrees, for example 79.4,79.4,37.8,90,90,90"
        )
    return gemmi.UnitCell(*values)


def check_given_cell(data: Dataset, given: gemmi.UnitCell) -> None:
    """Refuse a cell of the command line that is not that of a file which says its own.

    Raises
    ------
    UserError
    """
    if not data.cell.is_similar(given, CELL_TOLERANCE, math.degrees(CELL_TOLERANCE)):
        raise UserError(
            f"{data.name} has the cell {cell_text(data.cell)}, --unit-cell says "
            f"{cell_text(given)}; it is for files that hold none: leave it out"
        )
