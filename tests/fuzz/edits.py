"""Damage as plain data: lists of edits that are made up at random, kept as JSON, and applied.

An edit names what it changes and how: ``["set", ["beam", 0, "wavelength"], 0]``. A regression
file is a list of them, so that one reads what was wrong with a file. Edits of something that is
not there do nothing.
"""

from __future__ import annotations

import copy
import math
import re
import struct
from typing import Any

import numpy as np

Edit = list[Any]
NUMBERS = (
    *(
        math.nan,
        math.inf,
        -math.inf,
        0,
        -1,
        1,
        0.5,
        1e-6,
        1e6,
        -1e9,
        1e-300,
        1e300,
        2**31,
        -(2**31),
    ),
    *(2**63, -(2**63), 10**30, 10**400, 1e-12, 7, 255, 65535, 1000000),
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *("", "x", "nan", "1e9", "\0", "é" * 9, "../..", "/dev/zero", "P 1", "a" * 5000, "data_1"),
    *(None, True, False, [], {}, [[]], {"a": 1}, [0], [0, 0, 0], [[0, 0, 1]], [math.nan] * 3),
    *([1e300] * 9, ["x"], [None, None]),
)
FACTORS = (-1, 0, 2, 0.5, 1e-6, 1e6, 1e-15, 1e15, 1e200)
WORDS = (
    *("nan", "inf", "-inf", "0", "-1", "1", "0.5", "1e-300", "1e300", "99999999999999999999"),
    *("-2147483649", "*****", "x", "1e999", "-", "+.", "1,5", "0x10", "none", '"', "'", "\\"),
    *("1e-6", "1e6", "-1e9", "é", "\0", "#", ";", "!", "_", "loop_", "a" * 3000, "90", "180", "7"),
)


def pick(rng: np.random.Generator, choices: Any) -> Any:
    """One of a sequence, unchanged by NumPy."""
    return choices[int(rng.integers(len(choices)))]


# trees: JSON, MessagePack, YAML, contents of torch files


def tree_edits(rng: np.random.Generator, document: Any, n: int) -> list[Edit]:
    """Make up ``n`` edits of nested lists, mappings, numbers, text, bytes and arrays."""
    return [_tree_edit(rng, document) for _ in range(n)]


def _tree_edit(rng: np.random.Generator, document: Any) -> Edit:
    path: list[Any] = []
    node = document
    while isinstance(node, (dict, list, tuple)) and len(node):
        if path and rng.random() < 0.12:
            break
        key = pick(rng, list(node)) if isinstance(node, dict) else int(rng.integers(len(node)))
        path.append(key)
        node = node[key]
    if isinstance(node, bytes) and len(node) and rng.random() < 0.7:
        place = int(rng.integers(len(node)))
        word = struct.pack("<d", pick(rng, (math.nan, math.inf, 0.0, -1.0, 1e300, 1e-300, 1e9)))
        if rng.random() < 0.3:
            return ["resize", path, place]
        if rng.random() < 0.5:
            return ["bytes", path, place - place % 8, word.hex()]
        return ["bytes", path, place, bytes([int(rng.integers(256))]).hex()]
    if hasattr(node, "flatten") and rng.random() < 0.7:
        return ["element", path, int(rng.integers(1 << 30)), pick(rng, NUMBERS[:14])]
    kind = rng.random()
    if kind < 0.5:
        return ["set", path, pick(rng, VALUES)]
    if kind < 0.65:
        return ["delete", path]
    if kind < 0.8:
        return ["scale", path, pick(rng, FACTORS)]
    if kind < 0.87:
        return ["repeat", path, pick(rng, (1, 2, 30))]
    if kind < 0.94:
        return ["resize", path, pick(rng, (0, 1, 2, 5))]
    return ["rename", path, pick(rng, ("x", "", "__id__", "data"))]


def edited_tree(document: Any, edits: list[Edit]) -> Any:
    """Apply edits to a copy."""
    root = [copy.deepcopy(document)]
    for kind, path, *rest in edits:
        parent: Any = root
        try:
            for key in [0, *path][:-1]:
                parent = parent[key]
            _change(parent, [0, *path][-1], kind, rest)
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError):
            continue
    return root[0] if root else None


def _change(parent: Any, key: Any, kind: str, rest: list[Any]) -> None:
    node = parent[key]
    if kind == "set":
        parent[key] = copy.deepcopy(rest[0])  # later edits must not change the edit
    elif kind == "delete":
        del parent[key]
    elif kind == "scale":
        parent[key] = (
            node * rest[0] if isinstance(node, (int, float)) else [x * rest[0] for x in node]
        )
    elif kind == "repeat":
        parent[key:key] = [node] * rest[0]
    elif kind == "resize":
        parent[key] = node[: rest[0]]
    elif kind == "rename":
        parent[rest[0]] = parent.pop(key)
    elif kind == "bytes":
        parent[key] = overwritten(node, rest[0], bytes.fromhex(rest[1]))
    elif kind == "element":
        node.view(-1)[rest[0] % node.numel()] = rest[1]


# bytes


def byte_edits(rng: np.random.Generator, size: int, n: int) -> list[Edit]:
    """Make up ``n`` edits of a file of ``size`` bytes."""
    edits = []
    for _ in range(n):
        place, kind = int(rng.integers(max(size, 1))), rng.random()
        if kind < 0.6:
            edits.append(["bytes", place, bytes([int(rng.integers(256))]).hex()])
        elif kind < 0.75:
            edits.append(
                ["bytes", place, pick(rng, ("ff", "00", "7f")) * pick(rng, (2, 4, 8, 64))]
            )
        elif kind < 0.85:
            edits.append(["truncate", place])
        elif kind < 0.93:
            edits.append(["erase", place, pick(rng, (1, 4, 100))])
        else:
            edits.append(["insert", place, "00" * pick(rng, (1, 4, 80))])
    return edits


def edited_bytes(content: bytes, edits: list[Edit]) -> bytes:
    """Apply edits of :func:`byte_edits`."""
    for kind, place, *rest in edits:
        if kind == "bytes":
            content = overwritten(content, place, bytes.fromhex(rest[0]))
        elif kind == "truncate":
            content = content[:place]
        elif kind == "erase":
            content = content[:place] + content[place + rest[0] :]
        elif kind == "insert":
            content = content[:place] + bytes.fromhex(rest[0]) + content[place:]
    return content


def overwritten(content: bytes, place: int, new: bytes) -> bytes:
    """Bytes with others in their place, as long as before."""
    return (content[:place] + new + content[place + len(new) :])[: len(content)]


# text


def text_edits(rng: np.random.Generator, n: int) -> list[Edit]:
    """Make up ``n`` edits of words and lines; places count modulo the words that there are."""
    edits: list[Edit] = []
    for _ in range(n):
        place, kind = int(rng.integers(1 << 30)), rng.random()
        if kind < 0.7:
            edits.append(["word", place, pick(rng, WORDS)])
        else:
            edits.append([pick(rng, ("drop line", "double line", "swap lines", "cut")), place])
    return edits


def edited_text(text: str, edits: list[Edit]) -> str:
    """Apply edits of :func:`text_edits`."""
    for kind, place, *rest in edits:
        if kind == "word":
            words = list(re.finditer(r"[^\s=,:(){}\[\]]+", text))
            if words:
                old = words[place % len(words)]
                text = text[: old.start()] + rest[0] + text[old.end() :]
            continue
        lines = text.splitlines(keepends=True) or [""]
        i = place % len(lines)
        if kind == "drop line":
            del lines[i]
        elif kind == "double line":
            lines.insert(i, lines[i])
        elif kind == "swap lines":
            lines[i], lines[i - 1] = lines[i - 1], lines[i]
        elif kind == "cut":
            lines = lines[:i]
        text = "".join(lines)
    return text
