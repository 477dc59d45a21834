"""Compression of HDF5 files: importing this lets hdf5plugin encode and decode.

Where ``HDF5_PLUGIN_PATH`` is set, as DIALS needs it for bitshuffle, HDF5 has found the plugins
there by itself. Loaded in this way they can decode but not encode, and may be older ones
(bitshuffle without Zstandard); so those of hdf5plugin take their place.
"""

from __future__ import annotations

from typing import Literal

import hdf5plugin

hdf5plugin.register(("bshuf", "lz4", "zstd", "blosc", "bzip2"), force=True)


def bitshuffle(codec: Literal["lz4", "zstd"] = "lz4") -> dict[str, object]:
    """Return h5py keyword arguments for bitshuffle with LZ4 (``lz4``) or Zstandard (``zstd``)."""
    return dict(hdf5plugin.Bitshuffle(cname=codec))
