"""What a file is, by its content, for messages: people swap arguments and confuse suffixes."""

from __future__ import annotations

from pathlib import Path

from braggflux.integrator.io.decoding.apart import asked_apart
from braggflux.integrator.io.hdf5.checked import read_attributes

EXPERIMENTS = "a DIALS experiment list (.expt)"
REFLECTIONS = "a DIALS reflection table (.refl)"
MASTER = "an HDF5 master file of images"
DATA_FILE = "an HDF5 file of images without a description of the experiment"
MTZ = "an MTZ file"
MODEL = "a model (PDB)"
SHOEBOXES = "a store of shoeboxes (braggflux extract)"
PHOTON_COUNTS = "a table of photon counts of a run (intensities.h5)"
UNMERGED = "a store of unmerged reflections (braggflux convert)"
_STORES = {
    "braggflux-shoeboxes": SHOEBOXES,
    "braggflux-intensities": PHOTON_COUNTS,
    "braggflux unmerged": UNMERGED,
}
_BEGINNINGS = (
    (b"MTZ ", MTZ),
    (b"CrystFEL stream", "a CrystFEL stream"),
    (b"!FORMAT=XDS_ASCII", "an XDS file"),
    (b"###CBF", "an image (CBF)"),
    (b"HEADER", MODEL),
    (b"CRYST1", MODEL),
    (b"REMARK", MODEL),
    (b"TITLE ", MODEL),
    (b"data_", "an mmCIF file"),
)


def file_kind(path: str | Path) -> str | None:
    """Name the kind of a file in words; None for one that cannot be read or is not known.

    Raises
    ------
    UserError
        It is a damaged HDF5 file that crashes the library.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError:
        return None
    if b"dials::af::reflection_table" in head[:64]:
        return REFLECTIONS
    if head.lstrip()[:1] == b"{" and b"ExperimentList" in head:
        return EXPERIMENTS
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        # so begin files of ours, and all whose structure has checksums: no damage is followed
        kind = hdf5_kind(path, of_store=True) if head[48:52] == b"OHDR" else None
        return kind or asked_apart({"kind": str(path)}, path)["kind"] or "an HDF5 file"
    return next((kind for begin, kind in _BEGINNINGS if head.startswith(begin)), None)


def hdf5_kind(path: str | Path, *, of_store: bool = False) -> str | None:
    """Name the kind of an HDF5 file where a crash is harmless, or only that of a store of ours."""
    import h5py  # only here: 10 MiB that a merge of other files does without

    try:
        with h5py.File(path, "r") as file:
            kind = _STORES.get(str(read_attributes(file).get("format")))
            if kind is not None or of_store:
                return kind
            entry = file.get("entry")
            if isinstance(entry, h5py.Group) and "data" in entry:
                return MASTER if {"instrument", "definition"} & set(entry) else DATA_FILE
    except Exception:  # noqa: BLE001 - whoever reads it will say what is wrong
        pass
    return None
