"""Parameters in files of torch, in which a damaged byte is noticed when they are read.

Such a file is a ZIP archive. torch does not look at its checksums when it loads, and they leave
out the directory; so the SHA-256 of the archive stands in its comment, the last bytes of the file.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from braggflux.integrator.atomic import replacing
from braggflux.integrator.errors import UserError

_LABEL = b"sha256:"
_COMMENT_BYTES = len(_LABEL) + 2 * hashlib.sha256().digest_size
#: The last two bytes of a ZIP archive are the length of its comment.
_LENGTH_BYTES = 2


def save_torch(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values; the file appears only when complete.

    Raises
    ------
    UserError
        The folder is missing or not writable, or the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    archive = buffer.getbuffer()
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(archive[:-_LENGTH_BYTES])
        stream.write(_COMMENT_BYTES.to_bytes(_LENGTH_BYTES, "little"))
        stream.write(_LABEL + hashlib.sha256(archive).hexdigest().encode())


def load_torch(path: str | Path, remedy: str) -> dict[str, Any]:
    """Read what :func:`save_torch` wrote, on the CPU.

    Parameters
    ----------
    path : str or Path
    remedy : str
        What to do where the file is damaged.

    Raises
    ------
    UserError
        The file cannot be read, is damaged, or has a parameter that is not finite.
    """
    try:
        archive = _checked(Path(path).read_bytes())
        content = torch.load(io.BytesIO(archive), weights_only=True, map_location="cpu")
    except Exception as error:  # a decoder of strangers' bytes raises of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{path} is damaged or of an earlier version ({reason}); {remedy}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no parameters; {remedy}")
    for name, value in _tensors(content, ""):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{path} has values that are not finite ({name}); {remedy}")
    return content


def _checked(content: bytes) -> bytes:
    """Archive as torch wrote it; ValueError where its checksum is missing or wrong."""
    comment = content[-_COMMENT_BYTES:]
    archive = content[: -_COMMENT_BYTES - _LENGTH_BYTES] + bytes(_LENGTH_BYTES)
    length = content[len(archive) - _LENGTH_BYTES : len(archive)]
    if not comment.startswith(_LABEL) or int.from_bytes(length, "little") != _COMMENT_BYTES:
        raise ValueError("it has no checksum")
    if comment[len(_LABEL) :].decode("latin-1") != hashlib.sha256(archive).hexdigest():
        raise ValueError("its checksum is wrong")
    return archive


def _tensors(content: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{name}.{key}".strip("."))
    elif isinstance(content, (list, tuple)):
        for i, value in enumerate(content):
            yield from _tensors(value, f"{name}[{i}]")
