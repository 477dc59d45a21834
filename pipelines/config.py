"""Every option of a run, with its default, meaning and range.

The fields below are the only place where an option is declared: YAML files, command-line flags,
their help and ``configs/reference_full.yaml`` follow from them (``make reference-config`` rewrites
that file after a change here).

Relative paths in a file or flag are relative to the current directory; a run directory's
``config.yaml`` holds absolute ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from integrator.errors import UserError
from pipelines.schema import Section, load_mapping, option

REFERENCE_CONFIG = Path(__file__).parent / "configs" / "reference_full.yaml"


@dataclass(frozen=True)
class DialsConfig(Section):
    """Geometry and reference by an installed DIALS (`braggflux process` only)."""

    section: ClassVar[str] = "dials"

    images: tuple[Path, ...] = option(
        (), "Raw images: an HDF5 master, or all frames of one or more sweeps."
    )
    space_group: str | None = option(None, "Space group of the crystal, e.g. P43212.")
    unit_cell: tuple[float, float, float, float, float, float] | None = option(
        None, "a, b, c [A], alpha, beta, gamma [deg]; found by indexing when null.", above=0
    )
    nproc: int | None = option(None, "Processes for DIALS; null takes every core.", at_least=1)
    import_args: tuple[str, ...] = option((), "More PHIL parameters for dials.import.")
    find_spots_args: tuple[str, ...] = option((), "More PHIL parameters for dials.find_spots.")
    index_args: tuple[str, ...] = option((), "More PHIL parameters for dials.index.")
    refine_args: tuple[str, ...] = option((), "More PHIL parameters for dials.refine.")
    integrate_args: tuple[str, ...] = option((), "More PHIL parameters for dials.integrate.")
    scale_args: tuple[str, ...] = option((), "More PHIL parameters for dials.scale.")
    merge_args: tuple[str, ...] = option((), "More PHIL parameters for dials.merge.")
    has_reference: bool = option(
        True, "Integrate, scale and merge with DIALS too, to set its results beside ours."
    )


@dataclass(frozen=True)
class ExtractionConfig(Section):
    """Which reflections are cut out of the frames, and how large their boxes are."""

    section: ClassVar[str] = "extraction"

    d_min: float | None = option(
        None, "High-resolution limit [A]; the detector's edge when null.", above=0
    )
    box: tuple[int, int, int] | None = option(
        None,
        "Box in frames, slow and fast pixels, odd numbers; measured from strong spots when null.",
        at_least=1,
    )
    n_sigma: float = option(
        3.0, "Half-width of a measured box in standard deviations of the spot.", above=0
    )

    def __post_init__(self) -> None:
        """Boxes are centred on a voxel."""
        super().__post_init__()
        if self.box and any(side % 2 == 0 for side in self.box):
            raise UserError(f"extraction.box must be odd numbers, got {self.box}")


@dataclass(frozen=True)
class IntegratorConfig(Section):
    """Network that turns a shoebox into the likelihood of its photon count."""

    section: ClassVar[str] = "integrator"


@dataclass(frozen=True)
class MergeConfig(Section):
    """Scales, structure factors and their priors."""

    section: ClassVar[str] = "merge"


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Optimisation of the one objective."""

    section: ClassVar[str] = "training"

    coupling: Literal["joint", "staged"] = option(
        "joint",
        "joint: the merge's gradients reach the shoebox encoder; staged: integrate, then merge.",
    )
    epochs: int = option(12, "Passes over all observations.", at_least=1)
    batch_size: int = option(2048, "Observations in a step.", at_least=1)
    seed: int = option(0, "Same seed, same result on the CPU.", at_least=0)
    device: str = option("auto", "auto (cuda where present, else cpu), cpu, cuda or cuda:N.")
    checkpoint_every: int = option(
        1, "Epochs between checkpoints; the last epoch always has one.", at_least=1
    )

    def __post_init__(self) -> None:
        """Name the devices that exist as words; whether one is present is known at run time."""
        super().__post_init__()
        kind, _, index = self.device.partition(":")
        if kind not in {"auto", "cpu", "cuda"} or (index and not index.isdigit()):
            raise UserError(
                f"training.device must be auto, cpu, cuda or cuda:N, got {self.device!r}"
            )


@dataclass(frozen=True)
class RunConfig(Section):
    """A whole run: what goes in, where it goes, and how."""

    expt: Path | None = option(None, "DIALS experiments (.expt) with a refined crystal.")
    refl: Path | None = option(
        None, "DIALS reflections (.refl): refined, predicted or integrated."
    )
    model: Path | None = option(
        None, "Model (PDB or mmCIF) for phases and sites of the anomalous map."
    )
    reference: Path | None = option(
        None, "Merged MTZ of a conventional program, shown beside every epoch."
    )
    out: Path | None = option(None, "Run directory; made by the run.")
    dials: DialsConfig = field(default_factory=DialsConfig)
    extraction: ExtractionConfig = field(default_factory=ExtractionConfig)
    integrator: IntegratorConfig = field(default_factory=IntegratorConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a YAML or JSON file; keys left out keep their defaults."""
        return cls.from_mapping(load_mapping(path))

    def resolved(self) -> Self:
        """Copy with absolute paths, so that it means the same from any directory."""
        paths = {
            f.name: value.absolute()
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Path)
        }
        images = tuple(path.absolute() for path in self.dials.images)
        return replace(self, dials=replace(self.dials, images=images), **paths)

    def input_files(self) -> dict[str, Path]:
        """Files that the run reads, by what they are, those given only."""
        named = {k: getattr(self, k) for k in ("expt", "refl", "model", "reference")}
        images = {f"image {i + 1}": path for i, path in enumerate(self.dials.images)}
        return {k: v for k, v in (named | images).items() if v is not None}

    def require(self, *names: str) -> None:
        """Raise :class:`UserError` unless the named paths are given and their files exist."""
        for name in names:
            if getattr(self, name) is None:
                raise UserError(
                    f"{name} is not given; put it on the command line or as `{name}:` in --config"
                )
        for what, path in self.input_files().items():
            if not path.is_file():
                problem = "is a folder, not a file" if path.is_dir() else "does not exist"
                raise UserError(f"{what}: {path} {problem}")
