"""Every option of a run, with its default and meaning.

The dataclasses below, of ``braggflux.integrator.config`` and of ``braggflux.merge.config``
are the only place where an option is declared: YAML files, command-line flags, their help and
``reference_full.yaml`` follow from them (``make reference-config`` rewrites that file after a
change).

Relative paths in a file or flag are relative to the current directory; a run directory's
``config.yaml`` holds absolute ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from braggflux.integrator.atomic import replacing
from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.errors import UserError
from braggflux.merge.config import MergeConfig
from braggflux.pipelines.config import schema

#: Options that name a file to read.
INPUTS = ("expt", "refl", "model", "reference", "prior_model")
#: File of a run directory that `trained_integrator` names by its directory.
INTEGRATOR_FILE = "integrator.pt"
REFERENCE_CONFIG = Path(__file__).parent / "reference_full.yaml"


@dataclass(frozen=True)
class DialsConfig:
    """Geometry and reference by an installed DIALS (`braggflux process` only)."""

    # Raw images: an HDF5 master, or all frames of one or more sweeps.
    images: tuple[Path, ...] = ()
    # Space group of the crystal, e.g. P43212; found by indexing when null.
    space_group: str | None = None
    # a, b, c [A], alpha, beta, gamma [deg]; found by indexing when null.
    unit_cell: tuple[float, float, float, float, float, float] | None = None
    # Processes; every core when null.
    nproc: int | None = None
    # Integrate, scale and merge with DIALS too, to set its results beside ours.
    has_reference: bool = True
    # More PHIL parameters for dials.import.
    import_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.find_spots.
    find_spots_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.index.
    index_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.refine.
    refine_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.integrate.
    integrate_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.scale.
    scale_args: tuple[schema.CommandLine, ...] = ()
    # More PHIL parameters for dials.merge.
    merge_args: tuple[schema.CommandLine, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.unit_cell and min(self.unit_cell) <= 0:
            raise ValueError(f"`unit_cell` must be six positive numbers, got {self.unit_cell}")
        _at_least(self, 1, "nproc")


@dataclass(frozen=True)
class ExtractionConfig:
    """Resolution limit of the reflections, size of their boxes, search for defects."""

    # High-resolution limit [A]; the detector's edge when null.
    d_min: float | None = None
    # Box in frames, slow and fast pixels, odd numbers; measured from strong spots when null.
    box: tuple[int, int, int] | None = None
    # Half-width of a measured box in standard deviations of the spot.
    n_sigma: float = 4.0
    # Leave out zingers, hot pixels and shadows that the frames' own mask does not know.
    find_defects: bool = True
    # Solve a spot together with the spots that overlap with it; false masks their pixels.
    model_neighbours: bool = True
    # Processes that cut the boxes, a range of the frames each; each takes the memory of one.
    processes: int = 1

    def __post_init__(self) -> None:
        """Check ranges."""
        _positive(self, "d_min", "n_sigma")
        _at_least(self, 1, "processes")
        if self.box and any(side < 1 or side % 2 == 0 for side in self.box):
            raise ValueError(f"`box` must be three odd positive numbers, got {self.box}")


@dataclass(frozen=True)
class TrainingConfig:
    """Optimisation of the one objective."""

    # joint: the merge's gradients reach the shoebox encoder; staged: integrate, then merge.
    coupling: Literal["joint", "staged"] = "joint"
    # Passes over all observations; 0, with a trained integrator, integrates once and merges.
    epochs: int = 6
    # Observations in a step.
    batch_size: int = 512
    # Full-batch steps of the merge in each epoch.
    merge_steps: int = 60
    # Same seed, same result on the CPU.
    seed: int = 0
    # auto (cuda where present, else cpu), cpu, cuda or cuda:N.
    device: str = "auto"
    # Epochs between checkpoints; the last epoch always has one.
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        """Check ranges; whether a device is present is known at run time only."""
        _at_least(self, 1, "batch_size", "merge_steps", "checkpoint_every")
        _at_least(self, 0, "seed", "epochs")
        kind, _, index = self.device.partition(":")
        if kind not in {"auto", "cpu", "cuda"} or (index and not index.isdigit()):
            raise ValueError(f"`device` must be auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True)
class RunMergeConfig(MergeConfig):
    """Scale, error model and priors of the merge within a run."""

    # Bijvoet mates have amplitudes of their own; false merges them into one.
    anomalous: bool = True


class DataSetFiles(NamedTuple):
    """DIALS files of one data set, and the name that its files get."""

    name: str
    expt: Path
    refl: Path


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what goes in, where it goes, and how."""

    # DIALS experiments (.expt) with a refined crystal.
    expt: Path | None = None
    # DIALS reflections (.refl): refined, predicted or integrated.
    refl: Path | None = None
    # Further data sets (light, derivative, time points): EXPT and REFL of each in turn. Each data
    # set has amplitudes of its own; all share the integrator and one scale.
    more_data: tuple[Path, ...] = ()
    # Data set that each data set resembles, by its number from 0, or none: e.g. none,0. Sets the
    # double-Wilson prior.
    parents: str | None = None
    # Model (PDB or mmCIF) for phases and sites of the anomalous map; no peaks without.
    model: Path | None = None
    # Merged MTZ of a conventional program, shown beside every epoch.
    reference: Path | None = None
    # Structure (PDB, mmCIF) or merged amplitudes (MTZ) that the data resemble: its |F_calc| is
    # the prior as far as the data say that it fits.
    prior_model: Path | None = None
    # Directory of a finished run on a crystal of the same kind of experiment, whose trained
    # integrator this run starts from; may then have 0 epochs.
    trained_integrator: Path | None = None
    # Run directory; made by the run.
    out: Path | None = None
    dials: DialsConfig = field(default_factory=DialsConfig)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    integrator: IntegratorConfig = field(default_factory=IntegratorConfig)
    merge: RunMergeConfig = field(default_factory=RunMergeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        """Check that something trains the integrator."""
        if self.training.epochs < 1 and self.trained_integrator is None:
            raise ValueError(
                "training: `epochs` must be at least 1 without a trained integrator "
                f"(--integrator RUN_DIR), got {self.training.epochs}"
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML or JSON file; keys left out keep their defaults."""
        mapping = schema.load_mapping(path)
        try:
            return schema.from_mapping(cls, mapping)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def resolved(self) -> Self:
        """Copy with absolute paths, so that it means the same from any directory."""
        paths = {
            f.name: value.absolute()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Path)
        }
        images = tuple(path.absolute() for path in self.dials.images)
        changed: dict[str, Any] = paths | {"dials": replace(self.dials, images=images)}
        changed["more_data"] = tuple(path.absolute() for path in self.more_data)
        if self.merge.free_r is not None:
            changed["merge"] = replace(self.merge, free_r=self.merge.free_r.absolute())
        return replace(self, **changed)

    def input_files(self) -> dict[str, Path]:
        """Files that the run reads, by what they are, those given only."""
        named = {k: getattr(self, k) for k in INPUTS} | {"free_r": self.merge.free_r}
        images = {f"image {i + 1}": path for i, path in enumerate(self.dials.images)}
        if self.trained_integrator is not None:
            images["integrator"] = self.trained_integrator / INTEGRATOR_FILE
        more = {f"more_data {i + 1}": path for i, path in enumerate(self.more_data)}
        return {k: v for k, v in (named | images | more).items() if v is not None}

    @property
    def data_sets(self) -> tuple[DataSetFiles, ...]:
        """Files of each data set; its name is that of its EXPT, empty where there is one.

        Raises
        ------
        UserError
            An EXPT lacks its REFL.
        """
        if self.expt is None or self.refl is None:
            return ()
        paths = (self.expt, self.refl, *self.more_data)
        if len(paths) % 2:
            raise UserError(
                f"{len(paths)} files are given; a run takes EXPT and REFL of each data set in "
                "turn, like dark.expt dark.refl light.expt light.refl"
            )
        pairs = list(zip(paths[::2], paths[1::2], strict=True))
        stems = [expt.stem for expt, _ in pairs]
        names = [s if stems.count(s) == 1 else f"{s}_{k}" for k, s in enumerate(stems)]
        if len(pairs) == 1:
            names = [""]
        return tuple(DataSetFiles(name, *pair) for name, pair in zip(names, pairs, strict=True))

    def require(self, *names: str) -> tuple[Path, ...]:
        """Paths of these names; :class:`UserError` unless they are given and every file exists."""
        given = {name: getattr(self, name) for name in names}
        for name, path in given.items():
            if path is None:
                raise UserError(
                    f"{name} is not given; put it on the command line or as `{name}:` in --config"
                )
        for what, path in self.input_files().items():
            if what == "integrator" and not path.is_file():
                raise UserError(
                    f"--integrator: {path.parent} holds no {path.name}; give the directory of a "
                    "finished run of `braggflux run` or `process`"
                )
            if not path.is_file():
                problem = "is a folder, not a file" if path.is_dir() else "does not exist"
                raise UserError(f"{what}: {path} {problem}")
        return tuple(given.values())


def reference_text() -> str:
    """Every option with its default and meaning, as YAML."""
    head = "# Every option of braggflux, with its default. Written by `make reference-config`.\n\n"
    return head + schema.annotated_yaml(RunConfig())


def write_reference_config() -> None:
    """Rewrite ``reference_full.yaml`` from the defaults."""
    with replacing(REFERENCE_CONFIG) as temporary:
        temporary.write_text(reference_text(), encoding="utf-8")


def _at_least(options: object, bound: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value < bound:
            raise ValueError(f"`{name}` must be at least {bound}, got {value}")


def _positive(options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"`{name}` must be positive, got {value}")
