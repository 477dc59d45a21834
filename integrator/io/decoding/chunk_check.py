"""Whether a packed chunk can be decoded, before a decoder is given it.

The decoders of bitshuffle and LZ4 trust the lengths that stand among the packed bytes, and read
and write outside of their memory where these are damaged, which ends the process. Here the lengths
are followed without unpacking anything, at a few per cent of the cost of the latter. What is
packed in other ways goes to :mod:`braggflux.integrator.io.decoding.apart`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import h5py
import numpy as np

_BITSHUFFLE, _LZ4, _FLETCHER = 32008, 32004, h5py.h5z.FILTER_FLETCHER32
_OF_LZ4, _OF_ZSTD = 2, 3
_NO_CODEC = 0


class _Packing(NamedTuple):
    """How chunks of a data set are packed.

    Parameters
    ----------
    n_bytes : int
        Of a chunk, unpacked.
    element : int
        Bytes of a number for bitshuffle, 0 for LZ4 alone.
    codec : int
        What packs the blocks.
    """

    n_bytes: int
    element: int
    codec: int


def is_guarded(dataset: h5py.Dataset) -> bool:
    """Whether decoding cannot crash, once :func:`require_decodable` has passed.

    So it is where nothing is packed, where a checksum is looked at before the decoders see a
    chunk, and where the lengths are followed here; not for other decoders (Blosc, ...), several of
    them in a row, and tiles of a virtual data set.
    """
    if dataset.is_virtual:
        return False
    properties = dataset.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    return not filters or filters[-1] == _FLETCHER or filters in ([_LZ4], [_BITSHUFFLE])


def require_decodable(dataset: h5py.Dataset, frames: range | None = None) -> None:
    """Follow the lengths within the chunks of some frames.

    Parameters
    ----------
    dataset : h5py.Dataset
        (frames, ...), or of any other shape where ``frames`` is not given.
    frames : range, optional
        Along the first axis; the whole data set without.

    Raises
    ------
    OSError
        A chunk is damaged.
    """
    packing = _packing(dataset)
    if packing is None:
        return
    # Numba takes longer to import than all else that reads a frame
    from braggflux.integrator.io.decoding.lengths import GOOD, wrong_length

    for offset in _offsets(dataset, frames):
        try:
            skipped, content = dataset.id.read_direct_chunk(offset)
        except (RuntimeError, ValueError):
            continue  # never written
        if skipped or wrong_length(np.frombuffer(content, np.uint8), *packing) != GOOD:
            raise OSError(f"the chunk at {offset} is damaged")


def _packing(dataset: h5py.Dataset) -> _Packing | None:
    """How chunks are packed; None where their decoder looks after itself, or a checksum does."""
    if not dataset.chunks:
        return None
    properties = dataset.id.get_create_plist()
    if properties.get_nfilters() != 1:
        return None
    number, _, values, _ = properties.get_filter(0)
    n_bytes = int(np.prod(dataset.chunks)) * dataset.dtype.itemsize
    if number == _LZ4:
        return _Packing(n_bytes, 0, _OF_LZ4)
    if number != _BITSHUFFLE:
        return None
    codec = values[4] if len(values) > 4 else _NO_CODEC
    if len(values) < 3 or values[2] != dataset.dtype.itemsize:
        raise OSError(f"its packing is of numbers of {values[2:3]} bytes")
    return _Packing(n_bytes, dataset.dtype.itemsize, codec)


def _offsets(dataset: h5py.Dataset, frames: range | None) -> Iterator[tuple[int, ...]]:
    """Where the chunks begin that hold the frames."""
    shape, chunks = dataset.shape, dataset.chunks
    first = 0 if frames is None else frames.start - frames.start % chunks[0]
    end = shape[0] if frames is None else frames.stop
    steps: Sequence[range] = [range(first, end, chunks[0])]
    steps = [*steps, *(range(0, n, step) for n, step in zip(shape[1:], chunks[1:], strict=True))]
    yield from product(*steps)
