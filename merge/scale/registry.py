"""The terms of the scale, and the model that data and settings ask for."""

from __future__ import annotations

from braggflux.merge.config import MergeConfig
from braggflux.merge.data.table import ObservationTable
from braggflux.merge.scale.metadata_network import MetadataNetwork
from braggflux.merge.scale.model import ScaleModel
from braggflux.merge.scale.term import ScaleTerm
from braggflux.merge.scale.terms.absorption import Absorption
from braggflux.merge.scale.terms.b_factor import BFactor
from braggflux.merge.scale.terms.detector import DetectorResponse
from braggflux.merge.scale.terms.ewald import Partiality
from braggflux.merge.scale.terms.falloff import Falloff
from braggflux.merge.scale.terms.frames import FrameScale
from braggflux.merge.scale.terms.images import ImageBFactor, ImageScale
from braggflux.merge.scale.terms.known import KnownScale
from braggflux.merge.scale.terms.spectrum import Spectrum

#: In the order of their sum. Names are those of the parameters in a saved scale model.
TERMS: dict[str, type[ScaleTerm]] = {
    "frames": FrameScale,
    "b_factor": BFactor,
    "absorption": Absorption,
    "detector": DetectorResponse,
    "known": KnownScale,
    "images": ImageScale,
    "image_b_factors": ImageBFactor,
    "spectrum": Spectrum,
    "falloff": Falloff,
    "partiality": Partiality,
}


def build_scale(table: ObservationTable, config: MergeConfig) -> ScaleModel:
    """Make the scale model.

    Parameters
    ----------
    table : ObservationTable
    config : MergeConfig
    """
    made = {name: kind.of(table, config) for name, kind in TERMS.items()}
    terms = {name: term for name, term in made.items() if term is not None}
    return ScaleModel(terms, MetadataNetwork.of(table, config))
