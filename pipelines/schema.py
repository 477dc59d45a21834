"""Options as frozen dataclasses: one source for YAML files, command-line flags and their help.

A section derives from :class:`Section` and declares each field with :func:`option`. Values are
coerced and checked when the section is built, wherever they come from (code, YAML, a flag), so a
wrong value is reported once, by key, with what is allowed. Files are plain YAML (JSON is a subset
of it); no object tags.
"""

from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import yaml

from integrator.errors import UserError

_TRUE, _FALSE, _NONE = {"true", "yes", "on"}, {"false", "no", "off"}, {"none", "null", ""}


def option(
    default: Any,
    help: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """Declare one option of a :class:`Section`.

    Parameters
    ----------
    default : Any
    help : str
        One or two sentences: meaning and unit. Shown by ``--help`` and in the reference file.
    above, at_least, at_most : float, optional
        Allowed range of a number (``above`` excludes its bound); every entry of a tuple obeys it.
    """
    limits = {"above": above, "at_least": at_least, "at_most": at_most}
    metadata = {"help": help, "limits": {k: v for k, v in limits.items() if v is not None}}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """Base of all option groups; ``section`` is the prefix of its keys in messages."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Coerce and check every field; subclasses add checks of combinations."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            if is_dataclass(hints[f.name]):
                continue
            key = f"{self.section}.{f.name}".lstrip(".")
            value = coerce(getattr(self, f.name), hints[f.name], key)
            _check_limits(value, f.metadata.get("limits", {}), key)
            object.__setattr__(self, f.name, value)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> Self:
        """Build from nested plain values; keys that do not exist are an error."""
        if not isinstance(mapping, dict):
            raise UserError(
                f"section {cls.section or 'at the top of the file'} must be a mapping of "
                f"key: value, got {mapping!r}"
            )
        hints = get_type_hints(cls)
        names = [f.name for f in fields(cls)]
        if unknown := [str(k) for k in mapping if k not in names]:
            where = f" in section {cls.section}" if cls.section else ""
            raise UserError(
                f"unknown configuration key{where}: {', '.join(sorted(unknown))}; "
                f"valid keys are {', '.join(names)}"
            )
        values = {
            k: hints[k].from_mapping(v or {}) if is_dataclass(hints[k]) else v
            for k, v in mapping.items()
        }
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Nested plain values, ready for YAML or JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def difference(self, other: Section) -> dict[str, Any]:
        """Entries of this section that differ from ``other``, as dotted key -> plain value."""
        mine, theirs = flatten(self.to_mapping()), flatten(other.to_mapping())
        return {k: v for k, v in mine.items() if v != theirs[k]}

    def updated(self, overrides: dict[str, Any]) -> Self:
        """Copy with ``{"training.epochs": 3, ...}`` replaced, everything checked again."""
        mapping = self.to_mapping()
        valid = flatten(mapping)
        for key, value in overrides.items():
            if key not in valid:
                raise UserError(
                    f"unknown configuration key: {key}; valid keys are {', '.join(valid)}"
                )
            *parents, name = key.split(".")
            node = mapping
            for parent in parents:
                node = node[parent]
            node[name] = value
        return self.from_mapping(mapping)

    def annotated_yaml(self) -> str:
        """YAML text with each option's help, type and range as comments."""
        return "\n".join(_annotated_lines(self, 0)) + "\n"


def load_mapping(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file of options into nested plain values."""
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"configuration {path} is not plain YAML or JSON: {reason}") from error
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise UserError(f"configuration {path} must be a mapping of key: value")
    return mapping


def find_option(section: type[Section], key: str) -> tuple[Any, str]:
    """Type and help of a dotted key, e.g. ``training.epochs``."""
    owner = section
    *parents, name = key.split(".")
    for parent in parents:
        owner = get_type_hints(owner)[parent]
    found = next(f for f in fields(owner) if f.name == name)
    return get_type_hints(owner)[name], found.metadata["help"]


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
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_optional(value, hint, key)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise _wrong(key, value, hint)
    if origin is tuple:
        return _coerce_tuple(value, hint, key)
    scalar = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: _to_path}[hint]
    try:
        return scalar(value)
    except (TypeError, ValueError, OverflowError):
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
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, "a path")


def _coerce_optional(value: Any, hint: Any, key: str) -> Any:
    if value is None or (isinstance(value, str) and value.lower() in _NONE):
        return None
    inner = [a for a in get_args(hint) if a is not types.NoneType]
    try:
        return coerce(value, inner[0], key)
    except UserError:
        raise _wrong(key, value, hint) from None


def _coerce_tuple(value: Any, hint: Any, key: str) -> tuple:
    if isinstance(value, str):
        value = [part for part in value.replace(",", " ").split() if part]
    args = get_args(hint)
    if not isinstance(value, list | tuple):
        raise _wrong(key, value, hint)
    if args[-1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise _wrong(key, value, hint)
    try:
        return tuple(coerce(v, a, key) for v, a in zip(value, args, strict=True))
    except UserError:
        raise _wrong(key, value, hint) from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text not in _TRUE | _FALSE:
        raise ValueError
    return text in _TRUE


def _to_int(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    # YAML 1.1 reads 1e-3 (no dot) as text, so text that is a number counts as one.
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_str(value: Any) -> str:
    if isinstance(value, list | tuple | dict | bool) or value is None:
        raise TypeError
    return str(value)


def _to_path(value: Any) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise TypeError
    return Path(value).expanduser()


def _wrong(key: str, value: Any, hint: Any) -> UserError:
    return UserError(f"{key} must be {type_name(hint)}, got {value!r}")


def _check_limits(value: Any, limits: dict[str, float], key: str) -> None:
    values = value if isinstance(value, tuple) else (value,)
    passes = {
        "above": lambda v, bound: v > bound,
        "at_least": lambda v, bound: v >= bound,
        "at_most": lambda v, bound: v <= bound,
    }
    for name, bound in limits.items():
        if any(v is not None and not passes[name](v, bound) for v in values):
            raise UserError(f"{key} must be {name.replace('_', ' ')} {bound}, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.to_mapping()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _annotated_lines(section: Section, indent: int) -> list[str]:
    pad, hints, lines = "  " * indent, get_type_hints(type(section)), []
    for f in fields(section):
        value = getattr(section, f.name)
        if isinstance(value, Section):
            title = (type(value).__doc__ or "").strip().splitlines()[0]
            lines += ["", f"{pad}# {title}", f"{pad}{f.name}:" + ("" if fields(value) else " {}")]
            lines += _annotated_lines(value, indent + 1)
            continue
        limits = f.metadata["limits"].items()
        rule = "".join(f", {name.replace('_', ' ')} {bound}" for name, bound in limits)
        text = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000)
        text = text.removesuffix("...\n").strip()
        lines.append(f"{pad}# {f.metadata['help']} [{type_name(hints[f.name])}{rule}]")
        lines.append(f"{pad}{f.name}: {text}")
    return lines
