"""Converts frozen dataclasses to JSON and back, and derives the JSON Schema that describes them.

The dataclasses are the only description of stored data. `encode` and `decode` convert values. `json_schema` derives the schema
that is shipped in ``sjepa_deploy/assets``. `decode` is strict: an unknown key, a missing key or a value of the wrong type is an
error, and the error names the place.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, Union

T = TypeVar("T")

_JSON_TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


_TAGGED: dict[type, tuple[str, Mapping[str, type]]] = {}


class DecodeError(ValueError):
    """Reports that a value does not fit the dataclass that it is decoded to."""


def tagged(base: type, key: str, table: Mapping[str, type]) -> None:
    """Store the subclasses of `base` with their name in `table` under `key`, so that they are told apart."""
    _TAGGED[base] = key, table


def encode(value: Any) -> Any:
    """Return `value` (a dataclass, mapping, sequence or scalar) as plain JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        for base, (key, table) in _TAGGED.items():
            if isinstance(value, base):
                return {key: next(name for name, cls in table.items() if cls is type(value))} | fields
        return fields
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    assert value is None or isinstance(value, (str, int, float, bool)), f"{type(value)} is not stored as JSON"
    return value


def decode(cls: type[T], data: Any, place: str = "") -> T:
    """Build the dataclass `cls` from the plain JSON types in `data`.

    Raises
    ------
    DecodeError
        If a key is unknown or missing, or a value has the wrong type. The message names the place.
    """
    result = _decode(cls, data, place)
    assert isinstance(result, cls)
    return result


def decode_fields(cls: type, data: Any) -> dict[str, Any]:
    """Return the fields of the dataclass `cls` that the plain JSON types in `data` hold; others may be missing.

    Raises
    ------
    DecodeError
        If a key is unknown, or a value has the wrong type. The message names the place.
    """
    if not isinstance(data, dict):
        raise DecodeError(f"the top level must be an object, not {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(map(str, set(data) - {f.name for f in dataclasses.fields(cls)})):
        raise DecodeError(f"the top level has the unknown key {unknown[0]!r}")
    return {name: _decode(hints[name], value, name) for name, value in data.items()}


def _decode(hint: Any, data: Any, place: str) -> Any:
    here = place or "the top level"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(data, dict):
            raise DecodeError(f"{here} must be an object, not {type(data).__name__}")
        if hint in _TAGGED:
            key, table = _TAGGED[typing.cast(type, hint)]
            tag = data.get(key)
            if not isinstance(tag, str) or tag not in table:
                raise DecodeError(f"{here} has the unknown {key} {tag!r}; known are {', '.join(table)}")
            hint, data = table[tag], {name: value for name, value in data.items() if name != key}
        hints = typing.get_type_hints(hint)
        fields = {f.name: f for f in dataclasses.fields(hint)}
        if unknown := sorted(map(str, set(data) - set(fields))):  # keys of YAML need not be text
            raise DecodeError(f"{here} has the unknown key {unknown[0]!r}")
        required = [n for n, f in fields.items() if not _has_default(f)]
        if missing := [n for n in required if n not in data]:
            raise DecodeError(f"{here} lacks the key {missing[0]!r}")
        values = {k: _decode(hints[k], v, f"{place}.{k}" if place else k) for k, v in data.items()}
        return typing.cast(Any, hint)(**values)
    if origin in (Union, types.UnionType):
        if data is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), data, place)
    if origin is typing.Literal:
        if data not in args or isinstance(data, bool):
            raise DecodeError(f"{here} must be one of {', '.join(map(str, args))}, not {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise DecodeError(f"{here} must be an array, not {type(data).__name__}")
        if args[-1] is Ellipsis:
            return tuple(_decode(args[0], v, f"{place}[{i}]") for i, v in enumerate(data))
        if len(data) != len(args):
            raise DecodeError(f"{here} must have {len(args)} items, not {len(data)}")
        return tuple(_decode(a, v, f"{place}[{i}]") for i, (a, v) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        if not isinstance(data, dict):
            raise DecodeError(f"{here} must be an object, not {type(data).__name__}")
        return {k: _decode(args[1], v, f"{place}[{k!r}]") for k, v in data.items()}
    if hint is Any:  # plain JSON types
        return data
    if hint is int and isinstance(data, float) and data.is_integer():
        return int(data)  # JSON knows one kind of number: 1.0 is an integer there
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        try:
            return float(data)
        except OverflowError:
            raise DecodeError(f"{here} is too large a number") from None
    assert hint in _JSON_TYPES, f"{hint} cannot be decoded"
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise DecodeError(f"{here} must be of type {_JSON_TYPES[hint]}, not {type(data).__name__}")
    return data


def overridden(config: T, changes: dict[str, Any]) -> T:
    """Return `config` with the values of `changes` that are not None; ``"data.sfreq"`` reaches into a field."""
    for name, value in changes.items():
        if value is None:
            continue
        outer, _, inner = name.partition(".")
        if inner:
            value = overridden(getattr(config, outer), {inner: value})
        config = dataclasses.replace(typing.cast(Any, config), **{outer: value})
    return config


def json_schema(cls: type) -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the dataclass `cls`."""
    definitions: dict[str, Any] = {}
    root = _schema(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        name = typing.cast(Any, hint).__name__
        if hint in _TAGGED:
            key, table = _TAGGED[typing.cast(type, hint)]
            for tag, each in table.items():
                _schema(each, definitions)
                made = definitions[each.__name__]
                made["properties"] = {key: {"const": tag}} | made["properties"]
                made["required"] = [key, *(field for field in made["required"] if field != key)]
            return {"oneOf": [{"$ref": f"#/$defs/{each.__name__}"} for each in table.values()]}
        if name not in definitions:
            definitions[name] = {}
            hints = typing.get_type_hints(hint)
            definitions[name] = {
                "type": "object",
                "description": (hint.__doc__ or "").strip().split("\n")[0],
                "properties": {f.name: _schema(hints[f.name], definitions) for f in dataclasses.fields(hint)},
                "required": [f.name for f in dataclasses.fields(hint) if not _has_default(f)],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(next(a for a in args if a is not type(None)), definitions), {"type": "null"}]}
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin is tuple and args[-1] is Ellipsis:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        items = [_schema(a, definitions) for a in args]
        return {"type": "array", "prefixItems": items, "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    return {"type": _JSON_TYPES[hint]}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
