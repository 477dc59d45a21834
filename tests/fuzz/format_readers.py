"""Readers of formats that the program does not write, and of models and maps."""

from __future__ import annotations

import numpy as np
import possible
from format_seeds import SHAPE
from readers import BytesReader, Mtz, Paths, TextReader

from braggflux.integrator.crystal.geometry import ExternalLookup
from braggflux.integrator.io.dials.lookup import read_lookup
from braggflux.merge.io.mtz import read_merged_mtz
from braggflux.pipelines.maps.atomic_model import read_model


class Integrate(TextReader):
    """INTEGRATE.HKL of XDS."""

    name, seed = "integrate-hkl", "integrate.HKL"


class Scalepack(TextReader):
    """SCALEPACK, no merge original index."""

    name, seed = "scalepack", "a.sca"


class ReflectionCif(TextReader):
    """Unmerged mmCIF."""

    name, seed = "mmcif", "a.cif"


class Model(TextReader):
    """PDB model."""

    name, seed = "pdb", "small.pdb"

    def read(self, paths: Paths) -> list[str]:
        structure = read_model(paths[0])
        wrong = possible.cell(structure.cell.parameters)
        for atom in structure[0].all():
            place = np.array([*atom.atom.pos.tolist(), atom.atom.b_iso, atom.atom.occ])
            if not np.isfinite(place).all():
                wrong.append(f"atom {atom} at {place}")
        return wrong


class ModelCif(Model):
    """mmCIF model."""

    name, seed = "model-cif", "small.cif"


class Mask(BytesReader):
    """Pickled mask of an image set."""

    name, seed, kind = "mask", "mask.pickle", "mask"

    def read(self, paths: Paths) -> list[str]:
        maps = read_lookup(ExternalLookup(**{self.kind: str(paths[0])}), [SHAPE])
        (found,) = getattr(maps, self.kind)
        return [] if found.shape == SHAPE else [f"a map of {found.shape}"]


class GainMap(Mask):
    """Pickled map of gains."""

    name, seed, kind = "gain-map", "gain.pickle", "gain"


class MergedAmplitudes(Mtz):
    """Merged MTZ, given as reference, as prior or for its test set."""

    name, seed = "merged-mtz", "merged.mtz"

    def read(self, paths: Paths) -> list[str]:
        merged = read_merged_mtz(paths[0])
        wrong = possible.cell(merged.cell.parameters)
        if np.abs(merged.table.miller_index).max(initial=0) > 32767:
            wrong.append("index beyond 32767")
        for name, column in vars(merged.table).items():
            if np.abs(np.nan_to_num(column, posinf=1e300)).max(initial=0) > 1e30:
                wrong.append(f"{name} beyond 1e30")
        return wrong
