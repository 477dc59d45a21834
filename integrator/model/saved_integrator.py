"""A trained integrator in a file, and the start of another crystal's integrator from it.

What training has found is kept: mean profile, its directions, encoder, priors. What belongs to
the crystal and its frames is measured anew: background, rocking width, and where its spots are
shifted or wider (``local_shape``), by Fisher scoring from its strong spots.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from braggflux.integrator.config import IntegratorConfig
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.schema import converted
from braggflux.integrator.io.shoebox_store import ShoeboxStore
from braggflux.integrator.model.integrator import Integrator
from braggflux.integrator.model.profile import ProfileModel
from braggflux.integrator.torch_file import load_torch, save_torch
from braggflux.integrator.version import software

FORMAT, VERSION = "braggflux-integrator", 1
REMEDY = "give the directory of another finished run"
#: Parameters and buffers that another crystal can use, by the start of their names.
_SHARED = (
    *("profile.log_mean", "profile.basis", "background.log_prior_sd"),
    *("profile_prior.", "encoder.", "features."),
)
#: Relative difference of pixel sizes that files of one detector may have.
_PIXEL_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SavedIntegrator:
    """What a trained integrator needs to be used on another crystal.

    Parameters
    ----------
    box : (int, int, int)
        Of the shoeboxes it was trained on (frames, slow, fast).
    sigma : (float, float, float)
        Extent of the spots that its profile grid is made for, along fast and slow [px] and e3
        [deg].
    pixel_size_mm : (float, float)
        Along fast and slow.
    nodes_per_sigma, rotation_n_sigma : float
    encoder_width, n_modes : int
        Settings of :class:`~braggflux.integrator.config.IntegratorConfig`, and directions in
        which a profile can differ from the mean.
    epochs : int
        Passes of training.
    state : dict of str to Tensor
        Parameters and buffers by name.
    """

    box: tuple[int, int, int]
    sigma: tuple[float, float, float]
    pixel_size_mm: tuple[float, float]
    nodes_per_sigma: float
    rotation_n_sigma: float
    encoder_width: int
    n_modes: int
    epochs: int
    state: dict[str, Tensor]

    @classmethod
    def of(cls, integrator: Integrator, store: ShoeboxStore, epochs: int) -> Self:
        """Take what is to be saved of an integrator that was trained on ``store``."""
        shape, config = integrator.profile.grid.shape, integrator.config
        state = {
            name: value.detach().cpu()
            for name, value in integrator.state_dict().items()
            if name.startswith(_SHARED)
        }
        return cls(
            box=shape.box,
            sigma=(shape.sigma_x_px, shape.sigma_y_px, shape.sigma_m_deg),
            pixel_size_mm=pixel_size(store),
            nodes_per_sigma=config.nodes_per_sigma,
            rotation_n_sigma=config.rotation_n_sigma,
            encoder_width=config.encoder_width,
            n_modes=integrator.profile.n_latent,
            epochs=epochs,
            state=state,
        )

    def write(self, path: Path) -> None:
        """Write a file, whole or not at all."""
        head = {"format": FORMAT, "version": VERSION, "software": software()}
        save_torch(path, head | asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file.

        Raises
        ------
        UserError
            It is missing, damaged or of another kind or version.
        """
        content = load_torch(path, REMEDY)
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            raise UserError(
                f"{path} is no integrator of version {VERSION} of its format; {REMEDY}"
            )
        with reading(path, REMEDY):
            saved = converted({f.name: content[f.name] for f in fields(cls)}, cls)
            sizes: list[float] = [*saved.box, *saved.sigma, *saved.pixel_size_mm]
            sizes += [saved.nodes_per_sigma, saved.rotation_n_sigma, saved.encoder_width]
            if not all(0.0 < size < 1e6 for size in sizes):
                raise ValueError(f"its box, spot, pixels and settings are {sizes}")
            return saved

    def require_settings(
        self, config: IntegratorConfig, box: tuple[int, int, int] | None, source: Path
    ) -> None:
        """Check that the settings of a run are those of this integrator.

        Parameters
        ----------
        config : IntegratorConfig
        box : (int, int, int), optional
            The boxes asked for.
        source : Path
            Of this integrator.

        Raises
        ------
        UserError
        """
        for name in ("nodes_per_sigma", "rotation_n_sigma", "encoder_width"):
            mine, asked = getattr(self, name), getattr(config, name)
            if mine != asked:
                raise UserError(
                    f"integrator.{name} is {asked:g}, but that of {source} has {mine:g}; give "
                    f"--set integrator.{name}={mine:g}, or train anew without --integrator"
                )
        if box is not None and tuple(box) != self.box:
            raise UserError(
                f"extraction.box is {_product(box)}, but {source} was trained on boxes of "
                f"{_product(self.box)} (frames, slow, fast); leave the box out, or train anew "
                "without --integrator"
            )
        if self.n_modes != ProfileModel.n_latent:
            raise UserError(
                f"the profiles of {source} have {self.n_modes} modes, those of this version "
                f"{ProfileModel.n_latent}; {REMEDY}"
            )

    def require_pixels(self, pixel_size_mm: tuple[float, float], source: Path) -> None:
        """Check that a detector has the pixels that this integrator was trained on.

        Raises
        ------
        UserError
        """
        pairs = zip(pixel_size_mm, self.pixel_size_mm, strict=True)
        if not all(math.isclose(a, b, rel_tol=_PIXEL_TOLERANCE) for a, b in pairs):
            raise UserError(
                f"the detector's pixels are {_product(pixel_size_mm)} mm, but {source} was "
                f"trained on pixels of {_product(self.pixel_size_mm)} mm, in which its profile "
                "is; train anew without --integrator"
            )

    def give_to(self, integrator: Integrator) -> None:
        """Set the parameters of the integrator of another crystal.

        Its features of the detector are scaled as in training; those of the scan by its own.
        """
        scan = integrator.features.centre[2].clone(), integrator.features.half_range[2].clone()
        with reading("the integrator that was given", REMEDY):
            missing, unknown = integrator.load_state_dict(self.state, strict=False)
        if unknown or any(name.startswith(_SHARED) for name in missing):
            names = ", ".join(unknown or missing)
            raise UserError(f"the integrator has other parameters ({names}); {REMEDY}")
        integrator.features.centre[2], integrator.features.half_range[2] = scan


def pixel_size(store: ShoeboxStore) -> tuple[float, float]:
    """Pixel size of the first panel of a store, fast and slow [mm]."""
    fast, slow = torch.tensor(store.experiments[0]["pixel_size_mm"]).double()[0].tolist()
    return fast, slow


def _product(sides: tuple[float, ...]) -> str:
    return " x ".join(f"{side:g}" for side in sides)
