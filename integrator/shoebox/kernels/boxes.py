"""Loops over the voxels of spots and boxes on one frame."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from braggflux.integrator.compiled import compiled

Floats = NDArray[np.float32]
Index = NDArray[np.int64]
Integers = NDArray[np.signedinteger[Any]]


@compiled
def draw_spots(
    nearest: Floats,
    first: Index,
    stride: Index,
    slow_terms: Floats,
    fast_terms: Floats,
    along: Floats,
    limit: np.float32,
) -> Index:
    """Lower ``nearest`` to the squared distance of each spot, up to ``limit``.

    Parameters
    ----------
    nearest : ndarray, (size,)
        Infinite where no spot has been drawn.
    first, stride : ndarray, (K,)
        First pixel of each spot's window in the flat array, and length of the rows there.
    slow_terms, fast_terms, along : ndarray, (K, H), (K, W), (K,)
        Squared distances along each axis.

    Returns
    -------
    ndarray, (M,) int64
        Pixels drawn upon, each once.
    """
    touched = np.empty(slow_terms.size * fast_terms.shape[1], dtype=np.int64)
    n = 0
    for k in range(len(first)):
        for y in range(slow_terms.shape[1]):
            row = first[k] + y * stride[k]
            for x in range(fast_terms.shape[1]):
                squared = (slow_terms[k, y] + fast_terms[k, x]) + along[k]
                if squared <= limit:
                    i = row + x
                    if nearest[i] == np.inf:
                        touched[n] = i
                        n += 1
                    nearest[i] = min(nearest[i], squared)
    return touched[:n].copy()


@compiled
def fill_boxes(
    counts: Integers,
    nearest: Floats,
    windows: tuple[Index, Index],
    places: tuple[Index, Index, NDArray[np.bool_], NDArray[np.bool_]],
    terms: tuple[Floats, Floats, Floats],
    weights: tuple[Floats, Floats, Floats],
    limits: tuple[np.float32, np.float32, np.float32, np.float32],
    bits: tuple[int, int, int, int],
    spike: int,
    box_counts: NDArray[np.int32],
    box_mask: NDArray[np.uint8],
) -> tuple[NDArray[np.float64], NDArray[np.bool_], int]:
    """Add a frame to the open boxes.

    Valid and background is a layer whose frames all are, foreground and overlapped one with a
    frame that is.

    Parameters
    ----------
    counts, nearest : ndarray, (size,)
        The frame, and squared distance to the nearest spot.
    windows : (first, stride), ndarray, (K,) each
        First pixel of each box in the flat array, and length of the rows there.
    places : (slot, layer, is_first, is_recorded), ndarray, (K,) each
        Where the frame goes in ``box_counts``, and whether it is the layer's first there; no
        voxel of a row that is not recorded is valid.
    terms : (fast, slow, along), ndarray, (K, W), (K, H), (K,)
        Squared distance from the box's own spot along each axis.
    weights : (fast, slow, along)
        ``exp(-terms / 2)``.
    limits : (foreground, overlap, core, shared)
        Squared.
    bits : (valid, background, foreground, overlapped)
    spike : int
        In place of counts that were taken out.
    box_counts, box_mask : ndarray, (n_slots, D, H, W)

    Returns
    -------
    recorded : ndarray, (K,)
        Sum of the weights of valid voxels.
    is_found : ndarray, (K, 3) bool
        Whether there is a spike in the foreground, an invalid voxel in the core, any overlap.
    n_spikes : int
        Voxels.
    """
    fast, slow, along = terms
    fast_weight, slow_weight, along_weight = weights
    foreground, overlap, core, shared = limits
    valid_bit, background_bit, foreground_bit, overlapped_bit = bits
    all_bits, any_bits = valid_bit | background_bit, foreground_bit | overlapped_bit
    # the map holds this spot too, computed in another order: a rounding error is no neighbour
    shrink, slack = np.float32(1 - 1e-4), np.float32(1e-6)
    first, stride = windows
    slot, layer, is_first, is_recorded = places
    recorded = np.zeros(len(first))
    is_found = np.zeros((len(first), 3), dtype=np.bool_)
    n_spikes = 0
    for k in range(len(first)):
        sum_of_row = 0.0
        for y in range(slow.shape[1]):
            sum_of_line = 0.0
            for x in range(fast.shape[1]):
                i = first[k] + y * stride[k] + x
                own = (slow[k, y] + fast[k, x]) + along[k]
                is_valid = is_recorded[k] and counts[i] >= 0
                mask = 0
                if is_valid:
                    mask |= valid_bit
                    sum_of_line += fast_weight[k, x]
                    if nearest[i] > foreground:
                        mask |= background_bit
                    box_counts[slot[k], layer[k], y, x] += counts[i]
                elif own <= core:
                    is_found[k, 1] = True
                if own <= foreground:
                    mask |= foreground_bit
                if nearest[i] <= overlap and nearest[i] < own * shrink - slack:
                    is_found[k, 2] = True
                    if own > shared:
                        mask |= overlapped_bit
                if counts[i] == spike:
                    n_spikes += 1
                    is_found[k, 0] |= own <= foreground
                old = box_mask[slot[k], layer[k], y, x]
                every = mask if is_first[k] else old & mask
                box_mask[slot[k], layer[k], y, x] = (every & all_bits) | ((old | mask) & any_bits)
            sum_of_row += slow_weight[k, y] * sum_of_line
        recorded[k] = along_weight[k] * sum_of_row
    return recorded, is_found, n_spikes
