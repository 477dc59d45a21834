"""DIALS reflection tables (.refl), read and written without DIALS.

The file is one MessagePack array ``[magic, version, {identifiers, nrows, data}]``,
where ``data`` maps a column name to ``[type, [rows, bytes]]``, the bytes being the packed
little-endian values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.geometry import Experiment
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.file_kinds import REFLECTIONS, file_kind

log = logging.getLogger(__name__)

_MAGIC, _VERSION = "dials::af::reflection_table", 1
# Shoeboxes are remade from the frames. Of strings DIALS 3 writes the memory of the C++ objects,
# pointers included, which nobody can read back.
_SKIPPED_TYPES = frozenset({"Shoebox<>", "std::string"})
# type name in the file -> (dtype of an element, shape of a row)
_TYPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "bool": ("?", ()),
    "int": ("<i4", ()),
    "std::size_t": ("<u8", ()),
    "double": ("<f8", ()),
    "vec2<double>": ("<f8", (2,)),
    "vec3<double>": ("<f8", (3,)),
    "mat3<double>": ("<f8", (3, 3)),
    "int6": ("<i4", (6,)),
    "cctbx::miller::index<>": ("<i4", (3,)),
}
#: Types of the columns that are read here, whatever else a table has.
_TYPE_OF_COLUMN = {
    "miller_index": ("cctbx::miller::index<>",),
    "bbox": ("int6",),
    **dict.fromkeys(("id", "panel", "flags", "partial_id"), ("int", "std::size_t")),
    **dict.fromkeys(
        (
            *("s1", "xyzcal.px", "xyzcal.mm", "xyzobs.px.value", "xyzobs.px.variance"),
            *("xyzobs.mm.value", "xyzobs.mm.variance"),
        ),
        ("vec3<double>",),
    ),
    **dict.fromkeys(
        (
            *("d", "lp", "qe", "partiality", "zeta", "inverse_scale_factor"),
            *("background.mean", "profile.correlation"),
            *(
                f"intensity.{k}.{v}"
                for k in ("sum", "prf", "scale")
                for v in ("value", "variance")
            ),
        ),
        ("double",),
    ),
}
# columns whose type DIALS insists on, whatever integer type they have here
_SIZE_T_COLUMNS = frozenset({"flags", "panel", "partial_id"})


class DialsFlag:
    """Bits of the column ``flags``."""

    PREDICTED = 1 << 0
    OBSERVED = 1 << 1
    INDEXED = 1 << 2
    USED_IN_REFINEMENT = 1 << 3
    STRONG = 1 << 5
    REFERENCE_SPOT = 1 << 6
    DONT_INTEGRATE = 1 << 7
    INTEGRATED_SUM = 1 << 8
    INTEGRATED_PRF = 1 << 9
    INTEGRATED = INTEGRATED_SUM | INTEGRATED_PRF
    OVERLOADED = 1 << 10
    OVERLAPPED_BG = 1 << 11
    OVERLAPPED_FG = 1 << 12
    IN_POWDER_RING = 1 << 13
    FOREGROUND_INCLUDES_BAD_PIXELS = 1 << 14
    BACKGROUND_INCLUDES_BAD_PIXELS = 1 << 15
    USED_IN_MODELLING = 1 << 16
    CENTROID_OUTLIER = 1 << 17
    FAILED_DURING_BACKGROUND_MODELLING = 1 << 18
    FAILED_DURING_SUMMATION = 1 << 19
    FAILED_DURING_PROFILE_FITTING = 1 << 20
    BAD_REFERENCE = 1 << 21
    USER_EXCLUDED_IN_SCALING = 1 << 22
    OUTLIER_IN_SCALING = 1 << 23
    EXCLUDED_FOR_SCALING = 1 << 24
    BAD_FOR_SCALING = USER_EXCLUDED_IN_SCALING | OUTLIER_IN_SCALING | EXCLUDED_FOR_SCALING
    EXCLUDED_FOR_REFINEMENT = 1 << 25
    SCALED = 1 << 26


@dataclass
class ReflectionTable:
    """Columns of equal length.

    Parameters
    ----------
    columns : dict of str to ndarray
        DIALS names. ``miller_index`` (N, 3) int32, ``bbox`` (N, 6) int32 (x0, x1, y0, y1, z0, z1),
        vec3 columns (N, 3) float64, ``flags`` and ``panel`` uint64, ``id`` int32 and so on.
    identifiers : dict of int to str
        Experiment identifier of each value of the column ``id``.
    source : str
        File that the table was read from, for messages.
    """

    columns: dict[str, NDArray[Any]]
    identifiers: dict[int, str] = field(default_factory=dict)
    source: str = "the reflection table"

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")

    def __len__(self) -> int:
        """Count the rows, N."""
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a column; :class:`UserError` when the table lacks it."""
        self.require([name], "needed here")
        return self.columns[name]

    def require(self, names: Iterable[str], why: str) -> None:
        """Make sure that columns are there.

        Parameters
        ----------
        names : iterable of str
        why : str
            What they are needed for, in a few words.

        Raises
        ------
        UserError
            Naming the missing columns.
        """
        missing = [name for name in names if name not in self.columns]
        if missing:
            raise UserError(
                f"{self.source} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)} "
                f"({why}); it has {', '.join(sorted(self.columns)) or 'none'}; give a table from "
                "a later DIALS step"
            )

    def select(self, rows: ArrayLike) -> ReflectionTable:
        """Return the table of the given rows (boolean mask or indices)."""
        index = np.asarray(rows)
        chosen = {name: column[index] for name, column in self.columns.items()}
        return ReflectionTable(chosen, dict(self.identifiers), self.source)

    def has_flag(self, bits: int) -> NDArray[np.bool_]:
        """Whether any of the bits of ``flags`` is set, (N,)."""
        return (self["flags"].astype(np.uint64) & np.uint64(bits)) != 0


def read_reflections(path: str | Path) -> ReflectionTable:
    """Read a DIALS .refl file (MessagePack, the format since DIALS 2.0).

    Columns of shoeboxes and of strings are skipped, with a note in the log.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    ReflectionTable

    Raises
    ------
    UserError
        When the file is missing, truncated or not a reflection table.
    """
    with reading(path, "write it again with DIALS"):
        content = _unpack(Path(path))
        columns = {}
        for name, (kind, packed) in content.data.items():
            if kind in _SKIPPED_TYPES:
                log.info("%s: column %s (%s) is skipped", path, name, kind)
                continue
            columns[name] = _decode_column(name, kind, packed, content.nrows)
        return ReflectionTable(columns, content.identifiers, str(path))


def write_reflections(path: str | Path, table: ReflectionTable) -> None:
    """Write a DIALS .refl file.

    Column types follow from the arrays: bool, floating point (N,), (N, 2), (N, 3) and (N, 3, 3),
    integer (N,), (N, 3) as Miller indices and (N, 6) as boxes. Unsigned integers and the columns
    ``flags``, ``panel`` and ``partial_id`` become ``std::size_t``, other integers ``int``.

    Parameters
    ----------
    path : str or Path
    table : ReflectionTable

    Raises
    ------
    UserError
        When the file cannot be written.
    ValueError
        When a column has a type or a value that DIALS has no place for.
    """
    data = {name: _encode_column(name, column) for name, column in table.columns.items()}
    content = {"identifiers": table.identifiers, "nrows": len(table), "data": data}
    packed = msgspec.msgpack.encode([_MAGIC, _VERSION, content])
    with replacing(path) as temporary:
        temporary.write_bytes(packed)


def match_experiments(
    table: ReflectionTable, experiments: Sequence[Experiment]
) -> NDArray[np.int64]:
    """Position of each reflection's experiment in the list.

    ``id`` is translated by identifier where both files have one, and else is the position.

    Parameters
    ----------
    table : ReflectionTable
        With the column ``id``; -1 there means not indexed.
    experiments : sequence of Experiment

    Returns
    -------
    ndarray, (N,) int64
        -1 for reflections that belong to no experiment yet.

    Raises
    ------
    UserError
        When a reflection belongs to an experiment that is not in the list.
    """
    table.require(["id"], "says which experiment a reflection belongs to")
    positions = {e.identifier: i for i, e in enumerate(experiments) if e.identifier}
    number = table.columns["id"].astype(np.int64)
    values, which = np.unique(number, return_inverse=True)
    position_of = np.full(len(values), -1, dtype=np.int64)
    for row, value in enumerate(values.tolist()):
        if value < 0:
            continue
        identifier = table.identifiers.get(value, "")
        if identifier and positions:
            position = positions.get(identifier)
        else:
            position = value if value < len(experiments) else None
        if position is None:
            raise UserError(
                f"{table.source} has reflections of experiment {value} "
                f"({identifier or 'no identifier'}), which is not among the {len(experiments)} "
                "of the .expt; give the .expt and .refl of the same DIALS step"
            )
        position_of[row] = position
    return position_of[which]


class _Content(msgspec.Struct):
    """What a file holds; columns of types that nobody needs stay packed."""

    nrows: Annotated[int, msgspec.Meta(ge=0)]
    data: dict[str, tuple[str, msgspec.Raw]]
    identifiers: dict[int, str] = msgspec.field(default_factory=dict)


def _unpack(path: Path) -> _Content:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give an existing .refl file"
        ) from error
    kind = file_kind(path)
    if kind not in (None, REFLECTIONS):
        raise UserError(f"{path} is {kind}; {REFLECTIONS} is needed here")
    try:
        magic, version, content = msgspec.msgpack.decode(raw, type=tuple[str, int, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        started = _MAGIC.encode() in raw[:64]
        what = "is truncated or damaged" if started else "is not a DIALS reflection table"
        raise UserError(
            f"{path} {what}; give a .refl file as written by DIALS 2.0 or later"
        ) from error
    if magic != _MAGIC:
        raise UserError(
            f"{path} is not a DIALS reflection table; give a .refl file as written by DIALS 2.0 "
            "or later"
        )
    if version != _VERSION:
        raise UserError(
            f"{path} is a reflection table of version {version}; only version {_VERSION} is "
            "known: write it with DIALS 3"
        )
    return msgspec.msgpack.decode(content, type=_Content)


def _decode_column(name: str, kind: str, packed: msgspec.Raw, rows: int) -> NDArray[Any]:
    if kind not in _TYPES:
        raise ValueError(f"column {name} has the unknown type {kind!r}")
    if kind not in (allowed := _TYPE_OF_COLUMN.get(name, (kind,))):
        raise ValueError(f"column {name} has the type {kind}, it must be {' or '.join(allowed)}")
    try:
        count, content = msgspec.msgpack.decode(packed, type=tuple[int, bytes])
    except msgspec.DecodeError as error:
        raise ValueError(f"column {name}: {error}") from error
    if count != rows:
        raise ValueError(f"column {name} has {count} rows instead of {rows}")
    dtype, shape = _TYPES[kind]
    flat = np.frombuffer(content, dtype=dtype)  # raises when the bytes are not whole items
    return flat.reshape(rows, *shape).copy()


def _encode_column(name: str, column: NDArray[Any]) -> tuple[str, tuple[int, Any]]:
    array = np.asarray(column)
    kind = _column_type(name, array)
    dtype = _TYPES[kind][0]
    if array.dtype.kind in "iu" and len(array):
        limits = np.iinfo(dtype)
        if int(array.min()) < limits.min or int(array.max()) > limits.max:
            raise ValueError(f"column {name} has values outside the type {kind}")
    return kind, (len(array), np.ascontiguousarray(array, dtype=dtype).tobytes())


def _column_type(name: str, array: NDArray[Any]) -> str:
    """Name of the DIALS type that holds an array."""
    row = array.shape[1:]
    if array.dtype.kind == "b" and row == ():
        return "bool"
    if array.dtype.kind == "f":
        kinds = {(): "double", (2,): "vec2<double>", (3,): "vec3<double>", (3, 3): "mat3<double>"}
    elif array.dtype.kind in "iu":
        is_size = name in _SIZE_T_COLUMNS or array.dtype.kind == "u"
        scalar = "std::size_t" if is_size else "int"
        kinds = {(): scalar, (3,): "cctbx::miller::index<>", (6,): "int6"}
    else:
        kinds = {}
    if row not in kinds:
        raise ValueError(f"column {name}: no DIALS type for {array.dtype} rows of shape {row}")
    return kinds[row]
