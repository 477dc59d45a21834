"""What a run or a merge has left in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from braggflux.integrator.errors import UserError
from braggflux.pipelines.api import figures, tables
from braggflux.pipelines.api.amplitudes import Amplitudes, PathLike, facts_html
from braggflux.pipelines.workspace.file_sums import check_sums
from braggflux.pipelines.workspace.outputs import PROVENANCE, holds_merge
from braggflux.pipelines.workspace.records.readers import MergeRecord, read_json
from braggflux.pipelines.workspace.rundir import PEAK_COLUMNS, RunDirectory

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class Run:
    """A finished run, by its folder.

    Parameters
    ----------
    path : str or Path
        Run directory of ``braggflux run`` or ``process``.
    dataset : str
        Data set whose amplitudes are meant, of a run of several; the first without it.

    Raises
    ------
    UserError
        It is no run directory, or has no such data set.

    Examples
    --------
    >>> import braggflux as bf
    >>> run = bf.Run("run")
    >>> run.amplitudes
    <Amplitudes run/merged.mtz: ... reflections, F(+) and F(-), P 43 21 2, to ... A>
    >>> run.peaks.columns[:5].tolist()
    ['epoch', 'chain', 'seqid', 'residue', 'atom']
    >>> (run.observations()["sigma_J"].dropna() > 0).all().item()
    True
    >>> run.plot_peaks().savefig("peaks.png")
    """

    def __init__(self, path: PathLike, dataset: str = "") -> None:
        self.directory = RunDirectory.open(Path(path))
        found = {own.dataset: own for own in self.directory.data_sets()}
        if dataset and dataset not in found:
            raise UserError(
                f"{path} has no data set {dataset!r}; there is {', '.join(filter(None, found))}"
                if any(found)
                else f"{path} is a run of one data set, which has no name; got {dataset!r}"
            )
        self._own = found[dataset] if dataset else next(iter(found.values()))

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @property
    def data_sets(self) -> list[str]:
        """Names of the data sets; one empty name where there is one."""
        return [own.dataset for own in self.directory.data_sets()]

    @property
    def amplitudes(self) -> Amplitudes:
        """Merged amplitudes."""
        return Amplitudes(self._own.merged)

    @property
    def peaks(self) -> pandas.DataFrame:
        """Heights at the sites after every epoch, the reference with epoch ``DIALS``."""
        rows = self._own.read_peaks()
        if not rows:
            reason = self.directory.read_provenance()["notes"].get("peaks", "no epoch yet")
            raise UserError(f"{self.path} has no peaks: {reason}")
        return tables.table(rows)[list(PEAK_COLUMNS)]

    @property
    def statistics(self) -> pandas.DataFrame:
        """Statistics by resolution shell, the last row overall (``docs/files.md``)."""
        return tables.csv_table(self._own.statistics_file)

    @property
    def metrics(self) -> pandas.DataFrame:
        """Parts of the objective and more, one row per epoch."""
        return tables.metrics_table(self.directory.metrics_file)

    @property
    def report(self) -> Path:
        """The report, a page for a browser."""
        return self.directory.report

    def observations(self) -> pandas.DataFrame:
        """All observations: J and its sigma [photons], NaN if not integrated, and their places."""
        return tables.observation_table(self.directory.intensities)

    def plot_peaks(self) -> Figure:
        """Draw the heights of the strongest sites per epoch, the reference's dashed."""
        return figures.peaks_by_epoch(self.peaks)

    def plot_statistics(self) -> Figure:
        """Draw CC1/2, CCanom and I/sigma against resolution."""
        return figures.statistics_by_shell(self.statistics)

    def __fspath__(self) -> str:
        """Return the run directory."""
        return str(self.path)

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self._state()}>"

    def _state(self) -> str:
        metrics = self.directory.read_metrics()
        epochs = f"epoch {metrics[-1]['epoch']}" if metrics else "no epoch yet"
        is_done = self.directory.read_provenance()["sessions"][-1].get("ended")
        return f"{epochs}, {'finished' if is_done else 'not finished'}"

    def _repr_html_(self) -> str:
        facts: dict[str, Any] = {"folder": str(self.path), "state": self._state()}
        if self._own.merged.is_file():
            facts |= self.amplitudes.facts()
        peaks = self._own.read_peaks()
        if peaks:
            last = peaks[-1]["epoch"]
            highest = max((p for p in peaks if p["epoch"] == last), key=_height)
            name = f"{highest['chain']}/{highest['residue']}{highest['seqid']}:{highest['atom']}"
            facts["highest anomalous peak"] = f"{name}, {_height(highest):.2f} sigma"
        return facts_html("Run", facts)


class Merge:
    """A finished merge, by its folder: the amplitudes of each data set in their order.

    Parameters
    ----------
    path : str or Path
        Folder of ``braggflux merge``.

    Raises
    ------
    UserError
        It holds no merge.

    Examples
    --------
    >>> import braggflux as bf
    >>> merged = bf.merge("run/intensities.h5", "merged", epochs=2, progress=False)
    >>> merged
    <Merge merged: 1 data set, ... reflections>
    >>> merged.statistics["shell"].iloc[-1]
    'overall'
    >>> [amplitudes] = bf.Merge("merged")
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if not holds_merge(self.path):
            raise UserError(f"{path} holds no finished result of braggflux merge")
        check_sums(self.path, read_json(self.path / PROVENANCE, MergeRecord))
        names = sorted(self.path.glob("*merged.mtz"))
        self._files = [p for p in names if p.name == "merged.mtz" or p.stem.endswith("_merged")]

    @classmethod
    def of(cls, files: list[Path]) -> Merge:
        """Take the files that a merge has written, in the order of its data sets."""
        made = cls(files[0].parent)
        made._files = list(files)
        return made

    def __iter__(self) -> Iterator[Amplitudes]:
        return iter(Amplitudes(path) for path in self._files)

    def __len__(self) -> int:
        """Return the number of data sets."""
        return len(self._files)

    def __getitem__(self, number: int) -> Amplitudes:
        """Return the amplitudes of a data set."""
        return Amplitudes(self._files[number])

    @property
    def amplitudes(self) -> Amplitudes:
        """Those of the first data set."""
        return self[0]

    @property
    def statistics(self) -> pandas.DataFrame:
        """Statistics by resolution shell of the first data set, the last row overall."""
        stem = self._files[0].name.removesuffix("merged.mtz")
        return tables.csv_table(self.path / f"{stem}statistics.csv")

    def plot_statistics(self) -> Figure:
        """Draw CC1/2, CCanom and I/sigma against resolution."""
        return figures.statistics_by_shell(self.statistics)

    def __fspath__(self) -> str:
        """Return the folder."""
        return str(self.path)

    def __repr__(self) -> str:
        n = len(self)
        counts = ", ".join(str(len(amplitudes)) for amplitudes in self)
        return f"<Merge {self.path}: {n} data set{'s' if n > 1 else ''}, {counts} reflections>"

    def _repr_html_(self) -> str:
        return "".join(amplitudes._repr_html_() for amplitudes in self)


def _height(peak: dict[str, Any]) -> float:
    return peak["peak_sigma"] or 0.0
