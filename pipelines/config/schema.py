"""Frozen dataclasses as options: from YAML, JSON and flags, with checked types, and back.

Works on any dataclass of plain fields and nested dataclasses; the comment above a field is its
help. Types are checked by msgspec, ranges by the dataclass's own ``__post_init__`` (a
``ValueError`` there becomes a one-line :class:`UserError` that names the section). Files are plain
YAML, of which JSON is a subset; no object tags.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import operator
import types
from collections.abc import Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import msgspec
import yaml

from braggflux.integrator.errors import UserError
from braggflux.pipelines.config.renamed import refuse_renamed

#: Of numbers: more is nobody's setting.
LARGEST = 10**9
_NONE = {"none", "null", ""}
_YES_OR_NO = {"yes": True, "on": True, "no": False, "off": False}


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Options = TypeVar("Options", bound=Dataclass)


class CommandLine(str):
    """Type of an option that is part of a command line: its commas and blanks are not ours."""


def from_mapping(cls: type[Options], mapping: Any, section: str = "") -> Options:
    """Build ``cls`` from nested plain values.

    Raises
    ------
    UserError
        A key does not exist, a value has the wrong type, or the class refuses a value.
    """
    if not isinstance(mapping, dict):
        raise UserError(f"section {section} must be a mapping of key: value, got {mapping!r}")
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    if unknown := sorted(str(key) for key in mapping if key not in names):
        refuse_renamed(f"{section}.{unknown[0]}" if section else unknown[0])
        where = f" in section {section}" if section else ""
        valid = ", ".join(names) if names else "none"
        raise UserError(
            f"unknown configuration key{where}: {', '.join(unknown)}; valid keys are {valid}"
            f"{did_you_mean(unknown[0], names)}"
        )
    values = {}
    for name, value in mapping.items():
        key = f"{section}.{name}" if section else name
        if is_dataclass(hints[name]):
            values[name] = from_mapping(hints[name], {} if value is None else value, key)
        else:
            values[name] = coerce(value, hints[name], key)
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{section}: {error}" if section else str(error)) from error


def to_mapping(options: Any) -> dict[str, Any]:
    """Nested plain values, ready for YAML or JSON."""
    return {f.name: _plain(getattr(options, f.name)) for f in fields(options)}


def difference(options: Any, other: Any) -> dict[str, Any]:
    """Entries of ``options`` that ``other`` has not: {dotted key: plain value}."""
    mine, theirs = flatten(to_mapping(options)), flatten(to_mapping(other))
    return {k: v for k, v in mine.items() if v != theirs[k]}


def updated(options: Options, overrides: dict[str, Any]) -> Options:
    """Copy with ``{"training.epochs": 3, ...}`` replaced, everything checked again."""
    mapping = to_mapping(options)
    valid = flatten(mapping)
    for key, value in overrides.items():
        if key not in valid:
            refuse_renamed(key)
            raise UserError(
                f"unknown configuration key: {key}"
                + (did_you_mean(key, valid) or f"; valid keys are {', '.join(valid)}")
            )
        *parents, name = key.split(".")
        node = mapping
        for parent in parents:
            node = node[parent]
        node[name] = value
    return from_mapping(type(options), mapping)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Suggest names like ``word``, by the last part of dotted ones too: "; did you mean ...?"."""
    names = list(known)
    last = {name: name.rpartition(".")[2] for name in names}
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.85)
    if not near:
        ends = difflib.get_close_matches(word.rpartition(".")[2], set(last.values()), cutoff=0.75)
        near = [name for end in ends for name in names if last[name] == end][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def annotated_yaml(options: Any) -> str:
    """YAML text with each option's help and type as a comment."""
    return "\n".join(_annotated_lines(options, 0)) + "\n"


def find_option(cls: type, key: str) -> tuple[Any, str]:
    """Type and help of a dotted key, e.g. ``training.epochs``."""
    *parents, name = key.split(".")
    for parent in parents:
        cls = get_type_hints(cls)[parent]
    return get_type_hints(cls)[name], field_help(cls)[name]


@functools.cache
def field_help(cls: type) -> dict[str, str]:
    """Comment above each field of a dataclass on one line; a group of fields shares one.

    Fields of the classes it derives from have theirs.
    """
    texts: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if is_dataclass(c)]):
        texts |= _own_field_help(base)
    return texts


def _own_field_help(cls: type) -> dict[str, str]:
    lines = inspect.getsource(cls).splitlines()
    tree = ast.parse(inspect.cleandoc("\n".join(lines)))
    first = {
        node.target.id: node.lineno
        for declared in tree.body
        for node in getattr(declared, "body", ())
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    texts, text = {}, ""
    for name, line_number in first.items():
        comment: list[str] = []
        for line in reversed(lines[: line_number - 1]):
            if not line.strip().startswith("#"):
                break
            comment.insert(0, line.strip().lstrip("# "))
        texts[name] = text = " ".join(comment) or text
    return texts


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of options into nested plain values."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        repr(mapping)  # an error of Python where a number has more digits than can be printed
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration {path} is not plain YAML or JSON: {reason}") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError(f"configuration {path} must be a mapping of key: value")
    return mapping


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> {dotted key: value}."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} -> nested mapping."""
    mapping: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        node = mapping
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return mapping


def coerce(value: Any, hint: Any, key: str) -> Any:
    """Turn ``value`` (plain or text) into the declared type or raise :class:`UserError`."""
    kind = _bounded(hint)
    try:
        return msgspec.convert(_words(value, hint), kind, strict=False, dec_hook=_made)
    except msgspec.ValidationError:
        raise _wrong(key, value, hint) from None


def type_name(hint: Any) -> str:
    """Words for a declared type: 'a number', 'one of joint, staged'."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = " or ".join(type_name(a) for a in args if a is not types.NoneType)
        return f"{inner}, or null"
    if origin is Literal:
        return f"one of {', '.join(str(a) for a in args)}"
    if origin is tuple:
        if args[-1] is Ellipsis:
            return f"a list, each entry {type_name(args[0])}"
        return f"{len(args)} values, each {type_name(args[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return names.get(hint, "text")


@functools.cache
def _bounded(hint: Any) -> Any:
    """Return a declared type for msgspec, with numbers no larger than the largest."""
    args = tuple(a if a is Ellipsis else _bounded(a) for a in get_args(hint))
    if hint in (int, float):
        return Annotated[hint, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
    if get_origin(hint) in (Union, types.UnionType):
        return functools.reduce(operator.or_, args)
    if get_origin(hint) is tuple:
        return types.GenericAlias(tuple, args)
    return str if hint is CommandLine else hint


def _words(value: Any, hint: Any) -> Any:
    """Value with numbers as text, of which msgspec makes any type, and lists split at commas."""
    if get_origin(hint) in (Union, types.UnionType):
        if isinstance(value, str) and value.lower() in _NONE:
            return None
        hint = get_args(hint)[0]
    if get_origin(hint) is tuple:
        part = get_args(hint)[0]
        if isinstance(value, str) and part is CommandLine:
            value = [value] if value.strip() else []
        elif isinstance(value, str):
            value = value.replace(",", " ").split()
        return [_words(v, part) for v in value] if isinstance(value, list | tuple) else value
    if hint is bool and isinstance(value, str):
        return _YES_OR_NO.get(value.lower(), value.lower())
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _made(kind: type, value: Any) -> Path:
    """Make the one type that msgspec does not know."""
    if kind is not Path or not isinstance(value, str | Path) or not str(value):
        raise TypeError
    return Path(value).expanduser()


def _wrong(key: str, value: Any, hint: Any) -> UserError:
    return UserError(f"{key} must be {type_name(hint)}, got {value!r}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_mapping(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _annotated_lines(options: Dataclass, indent: int) -> list[str]:
    pad, lines = "  " * indent, []
    hints, texts = get_type_hints(type(options)), field_help(type(options))
    for f in fields(options):
        value = getattr(options, f.name)
        if is_dataclass(value) and not isinstance(value, type):
            title = (inspect.getdoc(type(value)) or "").partition("\n")[0]
            lines += ["", f"{pad}# {title}", f"{pad}{f.name}:" + ("" if fields(value) else " {}")]
            lines += _annotated_lines(value, indent + 1)
            continue
        text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
        text = text.removesuffix("...\n").strip()
        lines.append(f"{pad}# {texts[f.name]} [{type_name(hints[f.name])}]")
        lines.append(f"{pad}{f.name}: {text}")
    return lines
