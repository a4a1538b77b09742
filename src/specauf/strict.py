"""Dataclasses from plain mappings and YAML, strictly, and the errors that a user can fix.

A key that does not exist is an error that names its nearest neighbour; a value of the wrong type is refused, never cast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

T = TypeVar("T")


class UserError(Exception):
    """An error that the user can fix. The CLI prints the message alone and exits with 2."""


class ConfigError(UserError):
    """A configuration that cannot be run as written."""


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?`, or a full stop when nothing is near."""
    match = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.4)
    return f"; did you mean {match[0]!r}?" if match else "."


def choose(name: str, choices: typing.Sequence[str], what: str) -> None:
    """Raise `ConfigError` with the valid ones and the nearest unless `name` is one of `choices`."""
    if name not in choices:
        raise ConfigError(f"unknown {what} {name!r}{nearest(name, choices)} Valid: {', '.join(choices)}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def at_least(config: Any, section: str, **least: int) -> None:
    """Raise `ConfigError` when a field of `config` that is given is below its least value."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value is None or value >= low, f"{section}.{name} must be >= {low}, got {value}")


def counted(number: int, things: str) -> str:
    """`2 rounds`, `1 round`."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` from YAML as `kind`, or a `ConfigError` that names `where`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return from_dict(typing.cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{where}: {value!r} is not one of {', '.join(map(repr, args))}{nearest(str(value), args)}"
            )
        return value
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(v, (int, float, str)) for v in value.values()):
            raise ConfigError(f"{where}: expected a mapping of names to numbers or words, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            instead = f": write [{value}]" if isinstance(value, (int, float, str)) else ""
            raise ConfigError(f"{where}: expected a list, got {value!r}{instead}")
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):  # YAML 1.1 reads 6e-4 as a string
            if math.isfinite(number := float(value)):
                return number
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise ConfigError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def read_yaml(path: Path, missing: str, instead: str) -> Any:
    """The content of a YAML file. Raises `ConfigError` when it is missing, is not YAML or gives a key twice."""
    if not path.is_file():
        raise ConfigError(f"{missing}: {path}. {instead}")
    try:
        return parse_yaml(path.read_text(encoding="utf-8"), f"{path} is not YAML")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None


def parse_yaml(text: str, refusal: str) -> Any:
    """The content of a YAML text. Raises `ConfigError`, which begins with `refusal`, when it cannot be read."""
    try:
        return yaml.load(text, Loader=UniqueKeys)
    except RecursionError:
        raise ConfigError(f"{refusal}: nested too deeply") from None
    # Not errors of yaml's own: 2026-02-30, which it takes for a date, and 0x_, for a number.
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ConfigError(f"{refusal}: {error}") from None


def parse_value(kind: Any, text: str, refusal: str) -> Any:
    """What an override gives to a field of type `kind`. A name or path is taken as it is, for YAML would read `runs #3` as
    `runs`, and 2026-11-29 as a date."""
    optional = kind == str | None
    if not (kind in (str, Path) or optional) or text.startswith(("'", '"')):
        return parse_yaml(text, refusal)
    return None if optional and text.strip() in ("", "~", "null") else text


def set_value(kind: type, data: dict[str, Any], item: str) -> None:
    """Apply `section.key=value` to the content of a dataclass. Raises `ConfigError` that names the override."""
    key, separator, value = item.partition("=")
    require(bool(separator), f"override {item!r}: write it as section.key=value")
    *parents, last = keys = key.split(".")
    for depth, parent in enumerate(parents):
        if not isinstance(data.get(parent), dict):
            path = ".".join(parents[: depth + 1])
            raise ConfigError(f"override {item!r}: no section {path!r}{nearest(parent, data)}")
        data = data[parent]
    found = field_type(kind, keys)
    require(not is_dataclass(found), f"override {item!r}: {key!r} is a section; set its keys")
    data[last] = parse_value(found, value, f"override {item!r}")


def field_type(kind: Any, keys: typing.Sequence[str]) -> Any:
    """The type of the field that `keys` lead to from a dataclass, None where there is none."""
    for key in keys:
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(key)
        else:
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is Mapping else None
    return kind


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key given twice, since either may be the one that was meant. A merged key (`<<`) may be given again."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        _require_unique(node, set())
        return node


def _require_unique(node: yaml.Node | None, seen: set[int]) -> None:
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    for child in node.value:
        for part in child if isinstance(child, tuple) else (child,):
            _require_unique(part, seen)
    if isinstance(node, yaml.MappingNode):
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for tag, name in keys:
            if keys.count((tag, name)) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is given twice", node.start_mark)


def from_dict(cls: type[T], data: Any, where: str = "config") -> T:
    """Build the dataclass `cls` from a mapping, strictly. Raises `ConfigError` on an unknown key or a wrong type."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping, got {data!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(typing.cast(Any, cls))]
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{nearest(str(key), known)} Valid: {', '.join(known)}")
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON and YAML types, every field present."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(Dotted key, in a, in b) wherever two nested dictionaries differ, in their order."""
    found = []
    for key in dict.fromkeys([*a, *b]):
        old, new = a.get(key), b.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append((prefix + key, old, new))
    return found
