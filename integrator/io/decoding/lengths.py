"""The lengths within a packed chunk, followed without unpacking anything.

Layouts: the HDF5 filters 32008 (bitshuffle) and 32004 (LZ4), and the LZ4 block format.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

GOOD = -1


@compiled
def wrong_length(content: NDArray[np.uint8], n_bytes: int, element: int, codec: int) -> int:
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
