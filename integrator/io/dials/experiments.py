"""DIALS experiment lists (.expt), read and written without DIALS.

An .expt file is JSON: a list of experiments, each naming by number one block in each of the lists
``beam``, ``detector``, ``goniometer``, ``scan``, ``crystal``, ``imageset``, ``profile`` and
``scaling_model``. Experiments may share blocks.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
from msgspec import structs

from braggflux.integrator.atomic import replacing
from braggflux.integrator.crystal.geometry import Experiment, ExternalLookup, ImageFiles, Scan
from braggflux.integrator.errors import UserError, reading
from braggflux.integrator.io.dials import models
from braggflux.integrator.io.dials.blocks import EntryBlock, ImagesBlock, ListDocument
from braggflux.integrator.io.file_kinds import EXPERIMENTS, file_kind
from braggflux.integrator.io.schema import converted

Block = dict[str, Any]

log = logging.getLogger(__name__)

# name of the list in the file -> (field of Experiment, decoder, encoder)
_MODELS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "beam": ("beam", models.decode_beam, models.encode_beam),
    "detector": ("panels", models.decode_detector, models.encode_detector),
    "goniometer": ("goniometer", models.decode_goniometer, models.encode_goniometer),
    "scan": ("scan", models.decode_scan, models.encode_scan),
    "crystal": ("crystal", models.decode_crystal, models.encode_crystal),
}
_PASSED_THROUGH = ("profile", "scaling_model")  # not ours to understand
_LOOKUP = tuple(field.name for field in fields(ExternalLookup))
_MULTI_IMAGE_SUFFIXES = (".h5", ".nxs", ".hdf5", ".nexus")


def read_experiments(path: str | Path) -> list[Experiment]:
    """Read a DIALS .expt file.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    list of Experiment
        In file order. Image paths are absolute (relative ones are relative to the file).

    Raises
    ------
    UserError
        When the file is missing, is not an experiment list, or holds a model that we cannot use.
    """
    with reading(path, "give an .expt file as written by DIALS"), np.errstate(all="ignore"):
        return _decode(_load(Path(path)), Path(path))


def write_experiments(
    path: str | Path,
    experiments: Sequence[Experiment],
    *,
    source: str | Path | None = None,
) -> None:
    """Write a DIALS .expt file.

    Parameters
    ----------
    path : str or Path
    experiments : sequence of Experiment
    source : str or Path, optional
        The .expt that the experiments were read from. Blocks whose content did not change are
        copied from it as they are, so that nothing DIALS knows is lost (hierarchy of panels,
        goniometer axes, exposure times, profile and scaling models, covariances); only image
        paths become absolute. Experiments are found in it by identifier, else by equality, else
        by position.

    Raises
    ------
    UserError
        When the file cannot be written or ``source`` lacks one of the experiments.
    """
    originals: list[tuple[Block, Experiment]] = []
    if source is not None:
        read = read_experiments(source)
        originals = list(zip(_blocks(_load(Path(source)), Path(source)), read, strict=True))
    lists: dict[str, list[Block]] = {name: [] for name in (*_MODELS, "imageset", *_PASSED_THROUGH)}
    entries = []
    seen: dict[tuple[str, str | int], int] = {}
    for number, experiment in enumerate(experiments):
        original = _find_original(originals, experiment, number) if originals else None
        entry: Block = {"__id__": "Experiment", "identifier": experiment.identifier}
        copied, made = _encode(experiment, original)
        for name, block in (copied | made).items():
            # copied blocks stay as many as they were, new ones are shared when equal
            key = (name, id(block) if name in copied else json.dumps(block))
            if key not in seen:
                seen[key] = len(lists[name])
                lists[name].append(block)
            entry[name] = seen[key]
        entries.append(entry)
    document = {"__id__": "ExperimentList", "experiment": entries, **lists}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1))


def _load(path: Path) -> Block:
    """Parse the JSON and check that it is an experiment list."""
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give an existing .expt file"
        ) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        if (kind := file_kind(path)) not in (None, EXPERIMENTS):
            raise UserError(f"{path} is {kind}; {EXPERIMENTS} is needed here") from error
        raise UserError(
            f"{path} is not JSON ({error}); give an .expt file as written by DIALS"
        ) from error
    if not isinstance(document, dict) or document.get("__id__") != "ExperimentList":
        raise UserError(
            f"{path} is not a DIALS experiment list; give an .expt file as written by DIALS"
        )
    return document


def _blocks(document: Block, path: Path) -> list[Block]:
    """Blocks of each experiment by list name, as they are but with absolute image paths."""
    lists = {name: document.get(name, []) for name in (*_MODELS, *_PASSED_THROUGH)}
    lists["imageset"] = [
        _with_absolute_paths(block, path.parent) for block in document.get("imageset", [])
    ]
    return [
        {name: lists[name][entry[name]] for name in lists if entry.get(name) is not None}
        for entry in document["experiment"]
    ]


def _decode(document: Block, path: Path) -> list[Experiment]:
    whole = converted(document, ListDocument)
    decoded: dict[tuple[str, int], Any] = {}  # one object per block, however many share it

    def model(entry: EntryBlock, name: str, decode: Callable[..., Any]) -> Any:
        """Model of an experiment; None where it has none."""
        number, blocks = getattr(entry, name), getattr(whole, name)
        if number is None:
            return None
        if number >= len(blocks):
            raise ValueError(f"an experiment has {name} {number}, and there are {len(blocks)}")
        if (name, number) not in decoded:
            block = blocks[number]
            try:
                decoded[name, number] = None if block is None else decode(block)
            except ValueError as error:
                raise ValueError(f"{name}[{number}]: {error}") from error
        return decoded[name, number]

    experiments = []
    for entry in whole.experiment:
        values: Block = {"identifier": entry.identifier}
        for name, (attribute, decode, _) in _MODELS.items():
            if (found := model(entry, name, decode)) is not None:
                values[attribute] = found
        for name in _PASSED_THROUGH:
            model(entry, name, dict)  # only that it is there
        for name in ("beam", "panels"):
            if name not in values:
                raise ValueError(
                    f"an experiment has no {'detector' if name == 'panels' else name}"
                )
        values["valid_images"] = _valid_images(whole, entry, values.get("scan"))
        if entry.imageset is not None:
            block = model(entry, "imageset", lambda b: _with_absolute_paths_of(b, path.parent))
            images = _decode_images(block, values.get("scan"))
            values["images"] = images and replace(
                images, lookup=_decode_lookup(block), params=block.params or {}
            )
        experiments.append(_checked_scan_points(Experiment(**values)))
    names = Counter(experiment.identifier for experiment in experiments)
    for name, n in names.most_common(2):
        if name and n > 1:
            raise ValueError(f"the identifier {name} stands for {n} experiments")
    return experiments


def _valid_images(
    whole: ListDocument, entry: EntryBlock, scan: Scan | None
) -> tuple[tuple[int, int], ...]:
    """Ranges of images that DIALS has left to an experiment, within its scan."""
    block = None if entry.scan is None else whole.scan[entry.scan]
    if block is None or scan is None:
        return ()
    start, end = scan.image_range
    kept = []
    for first, last in (block.valid_image_ranges or {}).get(entry.identifier, ()):
        if first > last:
            raise ValueError(f"valid_image_ranges has {first} to {last}, which is no range")
        kept.append((max(first, start), min(last, end)))
    return tuple(both for both in kept if both[0] <= both[1])


def _checked_scan_points(experiment: Experiment) -> Experiment:
    """Refuse a crystal that does not fit the scan; drop what beam and goniometer have too much.

    ``dials.slice_sequence`` cuts the crystal to the images and leaves the others as they were.
    """
    scan = experiment.scan
    images = "no scan" if scan is None else f"{scan.n_images} images"
    for name, points in (
        ("crystal", "A_at_scan_points"),
        ("beam", "s0_at_scan_points"),
        ("goniometer", "setting_rotation_at_scan_points"),
    ):
        model = getattr(experiment, name)
        values = getattr(model, points, None)
        if values is None or (scan is not None and len(values) == scan.n_images + 1):
            continue
        message = f"the {name} has {len(values)} scan points for {images}"
        if name == "crystal":
            raise ValueError(message)
        log.warning("%s; its static values are used, as DIALS does", message)
        experiment = replace(experiment, **{name: replace(model, **{points: None})})
    return experiment


def _decode_images(block: ImagesBlock, scan: Scan | None) -> ImageFiles | None:
    """Files and frame numbers of an experiment's images.

    Of an image sequence in one file, image n is frame n - 1 (counted from 0): dxtbx takes the
    numbers of the scan and does not look at ``single_file_indices``.
    """
    file_indices = block.single_file_indices
    if block.template is None:
        if block.images is None:
            return None  # MemImageSet
        paths = tuple(block.images)
        if file_indices is not None and len(set(paths)) == 1:
            return ImageFiles(paths[:1], tuple(file_indices))
        return ImageFiles(paths, tuple(range(len(paths))))
    template = block.template
    if scan is None:
        return ImageFiles((template,), tuple(file_indices or ()))
    numbers = range(scan.image_range[0], scan.image_range[1] + 1)
    if "#" in template:
        return ImageFiles(
            tuple(_expand(template, n) for n in numbers), tuple(range(scan.n_images))
        )
    if numbers.start < 1:
        raise ValueError(f"image {numbers.start} of {template}, whose images count from 1")
    frames = range(*scan.array_range)
    if file_indices and not set(frames) <= set(file_indices):
        log.warning(
            "%s: images %d to %d are read from frames %d to %d of the file (counted from 0), as "
            "DIALS does; single_file_indices, which say %d to %d, are not used",
            *(template, numbers.start, numbers[-1], frames.start, frames[-1]),
            *(file_indices[0], file_indices[-1]),
        )
    return ImageFiles((template,), tuple(frames))


def _decode_lookup(block: ImagesBlock) -> ExternalLookup:
    """Files of masks and maps; empty names are none."""
    return ExternalLookup(**{key: getattr(block, key) or None for key in _LOOKUP})


def _expand(template: str, number: int) -> str:
    """Put an image number in place of the ``#`` of a template."""
    return re.sub(r"#+", lambda run: str(number).zfill(len(run.group())), template, count=1)


def _with_absolute_paths(block: Block, folder: Path) -> Block:
    """Resolve every path of an image set as dxtbx does."""
    result = dict(block)
    for key in ("template", *_LOOKUP):
        if key in result:
            result[key] = _absolute(result[key], folder)
    if "images" in result:
        result["images"] = [_absolute(path, folder) for path in result["images"]]
    return result


def _with_absolute_paths_of(block: ImagesBlock, folder: Path) -> ImagesBlock:
    """Return :func:`_with_absolute_paths` of a block of the schema."""
    found = structs.asdict(block)
    return ImagesBlock(**_with_absolute_paths({k: v for k, v in found.items() if v}, folder))


def _absolute(path: str | None, folder: Path) -> str | None:
    if not path or "://" in path:
        return path
    expanded = os.path.expanduser(os.path.expandvars(path))
    return os.path.abspath(os.path.join(folder, expanded))


def _find_original(
    originals: list[tuple[Block, Experiment]], experiment: Experiment, number: int
) -> tuple[Block, Experiment]:
    if experiment.identifier:
        for original in originals:
            if original[1].identifier == experiment.identifier:
                return original
    for original in originals:  # of a list that lost members, the position says nothing
        if same(original[1], experiment):
            return original
    if number < len(originals):
        return originals[number]
    raise UserError(
        f"the source .expt has {len(originals)} experiments, none of them number {number} "
        f"(identifier {experiment.identifier!r}); give the file the experiments came from"
    )


def _encode(
    experiment: Experiment, original: tuple[Block, Experiment] | None
) -> tuple[Block, Block]:
    """Blocks of one experiment: those copied from the original, and those made anew."""
    source_blocks, source = original or ({}, None)
    encoders = {attribute: (name, encode) for name, (attribute, _, encode) in _MODELS.items()}
    encoders["images"] = ("imageset", lambda images: _encode_images(images, experiment.scan))
    copied = {name: source_blocks[name] for name in _PASSED_THROUGH if name in source_blocks}
    made: Block = {}
    for attribute, (name, encode) in encoders.items():
        value = getattr(experiment, attribute)
        if value is None:
            continue
        if source is not None and same(value, getattr(source, attribute)):
            copied[name] = source_blocks[name]
        else:
            made[name] = encode(value)
    return copied, made


def _encode_images(images: ImageFiles, scan: Scan | None) -> Block:
    paths = [os.path.abspath(path) for path in images.paths]
    block: Block = asdict(images.lookup)
    block["params"] = images.params
    multi_image = len(paths) == 1 and paths[0].endswith(_MULTI_IMAGE_SUFFIXES)
    if scan is None:
        n = len(images.indices) if multi_image else 1
        block |= {"__id__": "ImageSet", "images": paths * n}
    else:
        template = paths[0] if multi_image else _template(paths, scan)
        block |= {"__id__": "ImageSequence", "template": template}
    if multi_image:
        block["single_file_indices"] = list(images.indices)
    return block


def _template(paths: list[str], scan: Scan) -> str:
    """Find the digits of the file names that are the image number."""
    folder, name = os.path.split(paths[0])
    numbers = range(scan.image_range[0], scan.image_range[1] + 1)
    for run in reversed(list(re.finditer(r"\d+", name))):
        pattern = name[: run.start()] + "#" * len(run.group()) + name[run.end() :]
        template = os.path.join(folder, pattern)
        if [_expand(template, n) for n in numbers] == paths:
            return template
    raise UserError(
        f"the {len(paths)} image files {paths[0]} ... do not count the images {numbers.start} to "
        f"{numbers.stop - 1} in their names; rename them so that one template covers the scan"
    )


def same(first: Any, second: Any) -> bool:
    """Whether two geometry records hold equal values (arrays bit for bit)."""
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    if isinstance(first, gemmi.SpaceGroup):
        return first.xhm() == second.xhm()
    if is_dataclass(first):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
