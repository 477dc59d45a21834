"""Whether a packed chunk can be decoded, before a decoder is given it.

The decoders of bitshuffle and LZ4 trust the lengths that stand among the packed bytes, and read
and write outside of their memory where these are damaged, which ends the process. Here the lengths
are followed without unpacking anything, at a few per cent of the cost of the latter.

Layouts: the HDF5 filters 32008 (bitshuffle) and 32004 (LZ4), and the LZ4 block format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

_BITSHUFFLE, _LZ4 = 32008, 32004
_OF_LZ4, _OF_ZSTD = 2, 3
_NO_CODEC = 0
_GOOD = -1


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
    for offset in _offsets(dataset, frames):
        try:
            skipped, content = dataset.id.read_direct_chunk(offset)
        except (RuntimeError, ValueError):
            continue  # never written
        if skipped or _wrong_at(np.frombuffer(content, np.uint8), *packing) != _GOOD:
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


@compiled
def _wrong_at(content: NDArray[np.uint8], n_bytes: int, element: int, codec: int) -> int:
    """Place of the first wrong length in a packed chunk, -1 where there is none."""
    if codec == 0:
        return -1 if len(content) == n_bytes else 0
    if len(content) < 12:
        return 0
    total = 0
    for i in range(8):
        total = total * 256 + int(content[i])
    block = 0
    for i in range(8, 12):
        block = block * 256 + int(content[i])
    if total != n_bytes or block <= 0:
        return 8
    if element:
        if block % (8 * element):
            return 8
        rest = (n_bytes // element) % 8 * element  # numbers that no eight of are copied
    else:
        rest = 0
    place, done = 12, 0
    while done < n_bytes - rest:
        size = min(block, n_bytes - rest - done)
        if place + 4 > len(content):
            return place
        packed = 0
        for i in range(place, place + 4):
            packed = packed * 256 + int(content[i])
        place += 4
        if packed < 1 or place + packed > len(content):
            return place
        is_plain = element == 0 and packed == size
        if codec == 2 and not is_plain and not _is_block(content, place, place + packed, size):
            return place
        place += packed
        done += size
    return -1 if place + rest <= len(content) else place


@compiled
def _is_block(content: NDArray[np.uint8], place: int, end: int, size: int) -> bool:
    """Whether a block of LZ4 unpacks to ``size`` bytes and reads what it has."""
    done = 0
    while place < end:
        token = int(content[place])
        place += 1
        literals = token >> 4
        if literals == 15:
            more = 255
            while more == 255:
                if place >= end:
                    return False
                more = int(content[place])
                literals += more
                place += 1
        done += literals
        place += literals
        if place > end or done > size:
            return False
        if done == size:
            return place == end
        if place + 2 > end:
            return False
        back = int(content[place]) + 256 * int(content[place + 1])
        place += 2
        if back < 1 or back > done:
            return False
        copied = token & 15
        if copied == 15:
            more = 255
            while more == 255:
                if place >= end:
                    return False
                more = int(content[place])
                copied += more
                place += 1
        done += copied + 4
        if done > size - 5:  # the last five bytes are always literal
            return False
    return False
