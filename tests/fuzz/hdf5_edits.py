"""Edits of HDF5 files: what they hold by name, with sound checksums, and the bytes of chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from edits import NUMBERS, VALUES, Edit, byte_edits, edited_bytes, edited_tree, pick, tree_edits

_SHAPES = ((), (0,), (1,), (3,), (2, 2), (1, 1, 1), (5, 1, 2, 3))
_TYPES = ("S4", "i1", "u1", "i2", "u4", "f4", "f8", "i8", "?", "c8")


def objects_of(path: Path) -> dict[str, dict[str, Any]]:
    """What an HDF5 file holds: of each object its size, chunks, attributes and JSON text."""
    found: dict[str, dict[str, Any]] = {}

    def note(name: str, item: h5py.HLObject) -> None:
        entry: dict[str, Any] = {"attributes": list(item.attrs), "size": None, "chunks": 0}
        if isinstance(item, h5py.Dataset):
            entry["size"] = int(item.size or 0)
            if item.chunks:
                sizes = [item.id.get_chunk_info(k).size for k in range(item.id.get_num_chunks())]
                entry["chunks"] = sizes
            if name.endswith("experiments") and item.dtype == np.uint8:
                entry["json"] = json.loads(bytes(item[()]))
        found[name] = entry

    with h5py.File(path, "r") as file:
        found["/"] = {"attributes": list(file.attrs), "size": None, "chunks": 0}
        file.visititems(note)
        for group in [file, *(file[n] for n in found if isinstance(file[n], h5py.Group))]:
            for name in group:
                if group.get(name, getlink=True).__class__ is not h5py.HardLink:
                    full = f"{group.name.strip('/')}/{name}".strip("/")
                    found.setdefault(full, {"attributes": [], "size": None, "chunks": 0})
    return found


def hdf5_edits(
    rng: np.random.Generator, objects: dict[str, dict[str, Any]], size: int, n: int
) -> list[Edit]:
    """Make up ``n`` edits of a file of ``size`` bytes with these objects."""
    return [_edit(rng, objects, size) for _ in range(n)]


def _edit(rng: np.random.Generator, objects: dict[str, dict[str, Any]], size: int) -> Edit:
    kind = rng.random()
    if kind < 0.25:
        return ["raw", byte_edits(rng, size, pick(rng, (1, 1, 3)))]
    chunked = [name for name, entry in objects.items() if entry["chunks"]]
    if kind < 0.4 and chunked:
        name = pick(rng, chunked)
        number = int(rng.integers(len(objects[name]["chunks"])))
        content = byte_edits(rng, objects[name]["chunks"][number], pick(rng, (1, 2)))
        return ["chunk", name, number, content]
    texts = [name for name, entry in objects.items() if "json" in entry]
    if kind < 0.5 and texts:
        name = pick(rng, texts)
        return ["json", name, tree_edits(rng, objects[name]["json"], pick(rng, (1, 1, 2)))]
    name = pick(rng, list(objects))
    entry = objects[name]
    if entry["attributes"] and rng.random() < 0.4:
        key = pick(rng, entry["attributes"])
        return ["attribute", name, key, pick(rng, (*VALUES, "delete"))]
    if entry["size"] and rng.random() < 0.6:
        return ["element", name, int(rng.integers(entry["size"])), pick(rng, NUMBERS)]
    action = pick(rng, ("remove", "group", "loop", "astray", "shape", "type", "fill", "shorter"))
    extra = {"shape": _SHAPES, "type": _TYPES, "fill": NUMBERS}.get(action, (0,))
    return [action, name, pick(rng, extra)]


def edit_hdf5(path: Path, edits: list[Edit]) -> None:
    """Apply edits to a file in place."""
    last = ("chunk", "raw")  # damage that no other edit may have to read
    for kind, *rest in sorted(edits, key=lambda e: last.index(e[0]) + 1 if e[0] in last else 0):
        if kind == "raw":
            path.write_bytes(edited_bytes(path.read_bytes(), rest[0]))
            continue
        try:
            with h5py.File(path, "r+") as file:
                _apply(file, kind, *rest)
        except (
            LookupError,
            OSError,
            TypeError,
            ValueError,
            RuntimeError,
            ArithmeticError,
            AttributeError,
        ):
            continue


def _apply(file: h5py.File, kind: str, name: str, value: Any, *rest: Any) -> None:
    if kind == "attribute":
        _set_attribute(file[name], value, rest[0])
        return
    if kind in ("remove", "group", "loop", "astray"):
        del file[name]
        if kind == "group":
            file.create_group(name)
        elif kind == "loop":
            file[name] = h5py.SoftLink(f"/{name}")
        elif kind == "astray":
            file[name] = h5py.ExternalLink("nowhere.h5", "/x")
        return
    dataset = file[name]
    if kind == "chunk":
        info = dataset.id.get_chunk_info(value)
        mask, content = dataset.id.read_direct_chunk(info.chunk_offset)
        dataset.id.write_direct_chunk(info.chunk_offset, edited_bytes(content, rest[0]), mask)
        return
    if kind == "element":
        flat = dataset[()].reshape(-1) if dataset.ndim else None
        if flat is None:
            dataset[()] = rest[0]
            return
        place = np.unravel_index(value % len(flat), dataset.shape)
        dataset[place] = rest[0]
        return
    array = np.asarray(dataset[()])
    if kind == "json":
        text = json.dumps(edited_tree(json.loads(bytes(array)), value))
        array = np.frombuffer(text.encode(), np.uint8)
    elif kind == "shape":
        array = np.resize(array, value)
    elif kind == "type":
        array = np.asarray(array).astype(value)
    elif kind == "fill":
        array = np.full_like(array, value)
    elif kind == "shorter":
        array = array[: max(len(array) - 1, 0)]
    attributes = dict(dataset.attrs)
    del file[name]
    file.create_dataset(name, data=array, fletcher32=array.ndim > 0 or None)
    file[name].attrs.update(attributes)


def _set_attribute(target: h5py.HLObject, name: str, value: Any) -> None:
    if value == "delete":
        del target.attrs[name]
    elif isinstance(value, str):
        target.attrs[name] = np.bytes_(value.encode())
    else:
        target.attrs[name] = value
