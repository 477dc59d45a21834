"""Integrated stills from CrystFEL streams, read piece by piece.

Layout of the text: CrystFEL's ``stream.h`` (formats 2.1 to 2.3). ``reciprocalspaceship`` has a
reader too; this one needs bounded memory, keeps the frame that a crystal came from, and takes the
columns from the stream's own header line.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gemmi
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.crystal.forms import typical_cell
from braggflux.integrator.errors import UserError
from braggflux.merge.io.dataset_split import check_images
from braggflux.merge.io.formats.text_files import open_binary, stem_of
from braggflux.merge.io.observations import UnmergedData, make_unmerged

Array = NDArray[np.float64]

log = logging.getLogger(__name__)

_MAGIC = b"CrystFEL stream format"
_CHUNK_BEGIN, _CHUNK_END = b"----- Begin chunk -----", b"----- End chunk -----"
_CRYSTAL_BEGIN, _CRYSTAL_END = b"--- Begin crystal", b"--- End crystal"
_LIST_BEGIN, _LIST_END = b"Reflections measured after indexing\n", b"End of reflections"
_PIECE = 1 << 23  # bytes read at a time
_NUMBER = rb"\s*([-+.\deE]+)"
_CELL = re.compile(rb"Cell parameters" + 3 * _NUMBER + rb" nm," + 3 * _NUMBER + rb" deg")
_STARS = [
    re.compile(rb"%sstar =" % axis + 3 * _NUMBER + rb" nm\^-1") for axis in (b"a", b"b", b"c")
]
_ENERGY = re.compile(rb"photon_energy_eV =\s*(\S+)")
_SERIAL = re.compile(rb"Image serial number:" + _NUMBER)
#: Column of the stream -> name here; others keep theirs.
_RENAMED = {"sigma(I)": "sigma", "fs/px": "fs", "ss/px": "ss"}
_REQUIRED = ("h", "k", "l", "I", "sigma")


@dataclass(frozen=True)
class StreamCrystal:
    """One crystal of a frame.

    Parameters
    ----------
    columns : dict of str to (n,)
        ``h k l I sigma peak background fs ss`` and whatever else the list has.
    panels : (n,) str or None
        Panel names.
    setting : (3, 3)
        Columns a*, b*, c* [1/A] in the laboratory frame, z along the beam.
    cell : (6,)
        [A, degrees]
    wavelength : float
        [A]
    serial : int
        Serial number of the frame; crystals of one frame share it.
    """

    columns: dict[str, Array]
    panels: NDArray[np.str_] | None
    setting: Array
    cell: Array
    wavelength: float
    serial: int

    def __len__(self) -> int:
        """Count the reflections."""
        return len(self.columns["I"])

    @property
    def ewald_offset(self) -> Array:
        """``|s0 + r| - 1 / wavelength`` [1/A], (n,): positive outside the Ewald sphere."""
        index = np.stack([self.columns[axis] for axis in "hkl"], axis=1)
        s1 = index @ self.setting.T + [0.0, 0.0, 1.0 / self.wavelength]
        return np.linalg.norm(s1, axis=1) - 1.0 / self.wavelength


def iterate_crystals(path: str | Path) -> Iterator[StreamCrystal]:
    """Go through the integrated crystals of a stream.

    Memory is that of a few frames. A frame that the file's end cuts short is left out, and so is
    one without photon energy (0, where a frame's own was not recorded).

    Raises
    ------
    UserError
        Not a stream, or an entry in it cannot be read.
    """
    path = Path(path)
    n_empty, n_unknown = 0, 0
    for text in _frames(path):
        crystals = text.split(_CRYSTAL_BEGIN)
        wavelength = _wavelength(crystals[0], path)
        for block in crystals[1:]:
            if _CRYSTAL_END not in block:
                log.warning("%s: a crystal without its end is left out", path)
            elif wavelength is None:
                n_unknown += 1
            elif (crystal := _parse_crystal(crystals[0], block, wavelength, path)) is None:
                n_empty += 1
            else:
                yield crystal
    if n_empty:
        log.info("%s: %d crystals have no integrated reflections", path, n_empty)
    if n_unknown:
        log.warning(
            "%s: %d crystals without photon energy (photon_energy_eV = 0) are left out; write it "
            "in the geometry and run indexamajig again to have them",
            *(path, n_unknown),
        )


def stream_chunks(
    path: str | Path, space_group: gemmi.SpaceGroup | None, n_crystals: int = 1000
) -> Iterator[UnmergedData]:
    """Read a stream ``n_crystals`` at a time; see :func:`read_stream`."""
    path = Path(path)
    if space_group is None:
        raise UserError(
            f"{path} does not say its space group (a stream names only the lattice); give it with "
            "--space-group, for example P43212"
        )
    panel_numbers: dict[str, int] = {}
    block: list[StreamCrystal] = []
    is_empty = True
    for crystal in iterate_crystals(path):
        is_empty = False
        block.append(crystal)
        if len(block) == n_crystals:
            yield _as_unmerged(block, panel_numbers, space_group, path)
            block = []
    if is_empty:
        raise UserError(
            f"{path} holds no integrated crystal of known photon energy; give a stream in which "
            "frames were indexed and integrated"
        )
    if block:
        yield _as_unmerged(block, panel_numbers, space_group, path)


def read_stream(path: str | Path, space_group: gemmi.SpaceGroup | None) -> UnmergedData:
    """Read a CrystFEL stream.

    Every crystal counts as an image of its own, also where several were found in one frame: each
    has its own orientation and scale. Metadata are ``peak background fs ss`` as in the stream,
    ``panel`` (numbered as they come), ``ewald_offset`` [1/A] and ``serial`` (of the frame).

    Parameters
    ----------
    path : str or Path
    space_group : gemmi.SpaceGroup
        The stream only knows the lattice.

    Raises
    ------
    UserError
        Not a stream, without crystals, or no space group given.
    """
    return next(stream_chunks(path, space_group, n_crystals=np.iinfo(np.int64).max))


def _frames(path: Path) -> Iterator[bytes]:
    """Text of each frame with crystals."""
    tail = b""
    with open_binary(path) as file:
        if not file.read(len(_MAGIC)) == _MAGIC:
            raise UserError(
                f"{path} is empty or not a CrystFEL stream (it must begin with "
                f"{_MAGIC.decode()!r}); give one as indexamajig writes it"
            )
        while piece := file.read(_PIECE):
            *whole, tail = (tail + piece.replace(b"\r", b"")).split(_CHUNK_END)
            yield from (_body(text) for text in whole if _CRYSTAL_BEGIN in text)
    if _CHUNK_BEGIN in tail:
        log.warning("%s ends within a frame, which is left out", path)


def _body(text: bytes) -> bytes:
    return text.partition(_CHUNK_BEGIN)[2]


def _wavelength(frame: bytes, path: Path) -> float | None:
    """Wavelength of a frame [A]; None where its photon energy is 0."""
    found = _ENERGY.search(frame)
    try:
        energy = float(found.group(1)) if found else None
    except ValueError:
        energy = None
    if energy is None:
        raise UserError(
            f"{path} has a frame without its photon energy (photon_energy_eV = ...); give a "
            "stream as indexamajig writes it"
        )
    return gemmi.hc / energy if energy > 0.0 else None


def _parse_crystal(
    frame: bytes, block: bytes, wavelength: float, path: Path
) -> StreamCrystal | None:
    """Read one crystal; None where it has no integrated reflections."""
    if _LIST_BEGIN not in block:
        return None  # indexamajig then writes "No integrated reflections."
    cell, stars = _CELL.search(block), [star.search(block) for star in _STARS]
    if cell is None or None in stars:
        raise UserError(
            f"{path} has a crystal without its cell or reciprocal axes; give a stream as "
            "indexamajig writes it"
        )
    names, columns, panels = _parse_list(block, path)
    if missing := [name for name in _REQUIRED if name not in names]:
        raise UserError(f"{path} lists reflections without {', '.join(missing)}; found {names}")
    if not len(columns["I"]):
        return None
    lengths_and_angles = np.array(cell.groups(), dtype=float)
    lengths_and_angles[:3] *= 10.0  # nm
    serial = _SERIAL.search(frame)
    return StreamCrystal(
        columns=columns,
        panels=panels,
        setting=np.array([star.groups() for star in stars], dtype=float).T / 10.0,
        cell=lengths_and_angles,
        wavelength=wavelength,
        serial=int(serial.group(1)) if serial else -1,
    )


def _parse_list(
    block: bytes, path: Path
) -> tuple[list[str], dict[str, Array], NDArray[np.str_] | None]:
    """Names, numbers and panel names of the list of reflections."""
    listing = block.partition(_LIST_BEGIN)[2].partition(_LIST_END)[0]
    header, _, rows = listing.partition(b"\n")
    names = [_RENAMED.get(name, name) for name in header.decode().split()]
    if not rows.strip():
        return names, {"I": np.empty(0)}, None
    kinds = np.dtype([(name, "U32" if name == "panel" else "f8") for name in names])
    try:
        table = np.loadtxt(io.BytesIO(rows), dtype=kinds, ndmin=1, encoding="ascii")
    except ValueError as error:
        raise UserError(
            f"{path} has a list of reflections that cannot be read ({error}); it is damaged: "
            "write the stream again"
        ) from error
    panels = table["panel"] if "panel" in names else None
    return names, {name: table[name] for name in names if name != "panel"}, panels


def _as_unmerged(
    crystals: list[StreamCrystal],
    panel_numbers: dict[str, int],
    space_group: gemmi.SpaceGroup,
    path: Path,
) -> UnmergedData:
    counts = [len(crystal) for crystal in crystals]
    cells = [crystal.cell for crystal in crystals]
    check_images(cells, str(path), "crystals")
    names = [n for n in crystals[0].columns if all(n in c.columns for c in crystals)]
    columns = {n: np.concatenate([c.columns[n] for c in crystals]) for n in names}
    metadata = {n: c for n, c in columns.items() if n not in _REQUIRED}
    metadata["ewald_offset"] = np.concatenate([c.ewald_offset for c in crystals])
    metadata["serial"] = np.repeat([c.serial for c in crystals], counts)
    if all(crystal.panels is not None for crystal in crystals):
        labels, number = np.unique(
            np.concatenate([c.panels for c in crystals]), return_inverse=True
        )
        codes = [panel_numbers.setdefault(label, len(panel_numbers)) for label in labels.tolist()]
        metadata["panel"] = np.array(codes)[number]
    return make_unmerged(
        source=str(path),
        miller_index=np.stack([columns[axis] for axis in "hkl"], axis=1),
        intensity=columns["I"],
        sigma=columns["sigma"],
        image_label=np.repeat(np.arange(len(crystals)), counts),
        metadata=metadata,
        wavelength=np.repeat([c.wavelength for c in crystals], counts),
        cell=typical_cell(cells, space_group, str(path)),
        space_group=space_group,
        name=stem_of(path),
        has_lp_applied=False,
    )
