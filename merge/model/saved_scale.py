"""A fitted scale and error model in a file, and its use on other data.

    light on the scale of dark:  braggflux merge light.mtz --freeze-scales dark/ ...
    new images, known encoder:   braggflux merge new.stream --freeze-scales first_run/ --stills ...

With the parameters go the settings that shape the model, and the units of metadata and intensity
(:class:`~braggflux.merge.data.feature_scaling.FeatureScaling`): without them reuse would be wrong
and not look it. Scales of a scan belong to its images, so that the same number of datasets and
images is asked for; stills have no parameters of single images and may be any number.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from torch import Tensor

from braggflux.integrator.errors import UserError, brief, reading
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.merge.config import MergeConfig
from braggflux.merge.data.feature_scaling import FeatureScaling
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.model.merger import Merger

logger = logging.getLogger(__name__)

FORMAT, VERSION = "braggflux scale model", 3
FILE_NAME = "scale_model.pt"
#: Modules that are saved.
PARTS = ("scale", "likelihood")
#: Of single images of stills: any other images have none.
OF_STILLS = "scale.network.deviation"
#: Settings that do not shape scales and error model: free to differ.
FREE = {
    *("anomalous", "d_min", "metadata", "overloads", "pairing", "photon_counts"),
    *("resolve_ambiguity", "ambiguity_tolerance", "reference_intensities"),
    *("prior", "correlation", "sigma", "n_correlation_shells", "n_reference_shells"),
    *("anisotropic", "held_out", "epochs", "batch_size"),
    *("stream_above", "stream_training", "learning_rate", "network_learning_rate"),
    *("half_set_repeats", "seed", "device", "free_r", "free_r_seed", "free_r_thin_shells"),
}


_Finite = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
_Spread = Annotated[float, msgspec.Meta(gt=0.0, le=1e30)]


@dataclass(frozen=True)
class SavedScale:
    """Scale model and error model of an earlier merge.

    Parameters
    ----------
    path : Path
    settings : dict
        Of :class:`MergeConfig`, without :data:`FREE`.
    feature_scaling : FeatureScaling
    images_of_dataset : tuple of int
    state : dict of str to Tensor
    """

    path: Path
    settings: dict[str, Any]
    feature_scaling: FeatureScaling
    images_of_dataset: tuple[int, ...]
    state: dict[str, Tensor]

    def configured(self, config: MergeConfig) -> MergeConfig:
        """Return ``config`` with the settings that shape the saved model.

        Raises
        ------
        UserError
            The saved model is for another kind of data.
        """
        for name in ("stills", "laue"):
            saved, given = self.settings[name], getattr(config, name)
            if saved != given:
                raise UserError(
                    f"{self.path} was fitted {'with' if saved else 'without'} --{name}; merge "
                    f"{'with' if saved else 'without'} it, or leave --freeze-scales out"
                )
        known = {f.name: f.default for f in fields(config)}
        saved = {k: v for k, v in self.settings.items() if k in known}
        for name, value in saved.items():
            given = getattr(config, name)
            if given not in (value, known[name]):
                logger.warning(
                    "without effect: %s=%s (%s was fitted with %s)", name, given, self.path, value
                )
        return replace(config, **saved)

    def check(self, table: ObservationTable) -> None:
        """Make sure that scales of scans meet the images they were fitted to.

        Raises
        ------
        UserError
        """
        images = table.images_of_dataset
        if self.settings["stills"] or images == self.images_of_dataset:
            return
        raise UserError(
            f"{self.path} was fitted to {_counts(self.images_of_dataset)} and these data have "
            f"{_counts(images)}; scales of a scan belong to its images: give as many datasets "
            "and images, or leave --freeze-scales out"
        )

    def load_into(self, merger: Merger) -> None:
        """Set scales and error model.

        Raises
        ------
        UserError
            The parameters do not fit the data.
        """
        try:
            for part in PARTS:
                start = f"{part}."
                state = {
                    k.removeprefix(start): v for k, v in self.state.items() if k.startswith(start)
                }
                module = getattr(merger, part)
                if self.settings["stills"]:
                    state = module.state_dict() | state
                module.load_state_dict(state)
        except Exception as error:  # of whatever a stranger's file holds in place of parameters
            raise UserError(
                f"{self.path} does not fit these data or this version ({brief(error)}); fit the "
                "scales again, without --freeze-scales"
            ) from error
        merger.scale.restore()


def save_scale(path: Path, merger: Merger, table: ObservationTable, config: MergeConfig) -> None:
    """Write the scales and the error model of a merger.

    Parameters
    ----------
    path : Path
    merger : Merger
    table : ObservationTable
        That the merger was made for.
    config : MergeConfig
    """
    state = {
        f"{part}.{k}": v.detach().cpu()
        for part in PARTS
        for k, v in getattr(merger, part).state_dict().items()
        if not (config.stills and f"{part}.{k}" == OF_STILLS)
    }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": {k: v for k, v in asdict(config).items() if k not in FREE},
        "feature_scaling": table.feature_scaling.mapping,
        "images_of_dataset": list(table.images_of_dataset),
        "state": state,
    }
    save_torch(path, content)


def scale_file(path: Path) -> Path:
    """Find the file in the folder of a merge, or take it as given."""
    return path / FILE_NAME if path.is_dir() else path


def load_scale(path: Path) -> SavedScale:
    """Read a scale model: a file, or the folder of a merge.

    Raises
    ------
    UserError
    """
    file = scale_file(path)
    remedy = f"give the folder of an earlier merge or its {FILE_NAME}"
    if not file.is_file():
        raise UserError(f"--freeze-scales: {file} does not exist; {remedy}")
    content = load_torch(file, f"{remedy}, or merge the data of that fit again")
    if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{file} is not a scale model of version {VERSION}; {remedy}")
    with reading(file, f"{remedy}, or merge the data of that fit again"):
        whole = msgspec.convert(content, _Content)
        known = {f.name for f in fields(MergeConfig)}
        settings = {name: value for name, value in whole.settings.items() if name in known}
        checked = msgspec.convert(settings, MergeConfig)  # types, and ranges by the class itself
        return SavedScale(
            file,
            {"stills": False, "laue": False} | {n: getattr(checked, n) for n in settings},
            FeatureScaling.of(msgspec.to_builtins(whole.feature_scaling)),
            tuple(whole.images_of_dataset),
            whole.state,
        )


class _Scaling(msgspec.Struct):
    """Schema of :class:`FeatureScaling`."""

    unit_intensity: Annotated[float, msgspec.Meta(gt=0.0, le=1e30)]
    columns: dict[str, tuple[_Finite, _Spread]]


class _Content(msgspec.Struct):
    """Schema of the file."""

    settings: dict[str, Any]
    feature_scaling: _Scaling
    images_of_dataset: list[Annotated[int, msgspec.Meta(ge=0, le=10**9)]]
    state: dict[str, Any]


def _counts(images: tuple[int, ...]) -> str:
    return f"{len(images)} dataset(s) of {', '.join(str(n) for n in images)} image(s)"
