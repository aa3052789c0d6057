"""One schema for all that tokexport stores in JSON: its format, what its reader must understand, and its records.

A document is one frozen dataclass as plain JSON values, beside `format` ([major, minor]) and `needs` (names of
`FEATURES`). Provenance in an ONNX file, the sidecar of an engine and every manifest are documents; `docs/format.md`
tells their fields. Imports no torch.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any, Literal, Protocol, TypeVar

from .errors import UsageError

FORMAT = (1, 0)
# What a reader must understand before it may use a file, and what that means to a person.
FEATURES = {
    "uint8_input": "it takes uint8 images",
    "class_tail": "its last block computes the class token alone",
    "activation": "its outputs are not to be read through a softmax",
    "plugin": "it runs native code that has to be brought along",
}
UNDERSTOOD: frozenset[str] = frozenset(
    {"activation", "class_tail", "plugin", "uint8_input"}
)  # the features that this version can serve

R = TypeVar("R")


class Document(Protocol):
    """A frozen dataclass that can be stored as a document of its own."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand."""


def to_document(record: Document) -> dict[str, Any]:
    """Plain JSON values of a record that is stored by itself; `from_document` takes them back."""
    return {"format": list(FORMAT), "needs": sorted(record.needs), **encode(record)}


def from_document(cls: type[R], data: Any, *, name: str, remake: str) -> R:
    """The record in a stored document.

    Args:
        cls: a frozen dataclass with a property `needs`.
        data: what `json.loads` gave.
        name: of the document, for messages, e.g. "vit.onnx".
        remake: how such a file is made again, for messages, e.g. "tokexport onnx".
    Returns:
        The record, validated. Of a newer minor format the fields that are not known here are left out.
    Raises:
        UsageError: no document, one of another major format, one that needs what this version does not understand, or a
        damaged one.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{name}: wanted an object of JSON, got {_short(data)}: make it again with `{remake}`")
    if "format" not in data:
        raise UsageError(
            f"{name} was made before format {FORMAT[0]} of tokexport's files, the oldest that is read: make it again "
            f"with `{remake}`"
        )
    values = dict(data)
    major, minor = _value(tuple[int, int], values.pop("format"), f"{name}: format", 0)
    if major != FORMAT[0]:
        advice = "upgrade tokexport" if major > FORMAT[0] else f"make it again with `{remake}`"
        raise UsageError(
            f"{name} has format {major}.{minor}, tokexport {_version()} reads format {FORMAT[0]}: {advice}"
        )
    needs = _value(tuple[str, ...], values.pop("needs", None), f"{name}: needs", 0)
    foreign = [f"{n} ({FEATURES[n]})" if n in FEATURES else n for n in needs if n not in UNDERSTOOD]
    if foreign:
        raise UsageError(
            f"{name} needs {', '.join(foreign)[:200]}, which tokexport {_version()} does not understand: "
            f"upgrade tokexport"
        )
    record = decode(cls, values, name=name, minor=minor)
    if not set(record.needs) <= set(needs):
        raise UsageError(f"{name}: needs lacks {', '.join(sorted(set(record.needs) - set(needs)))}: it was changed")
    return record


def parse(text: str | bytes, *, name: str) -> Any:
    """JSON values of a text. Raises: UsageError when it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise UsageError(
            f"{name} is not JSON ({' '.join(str(e).split())[:100]}): it is damaged, make it again"
        ) from None


def encode(record: Any) -> dict[str, Any]:
    """Plain JSON values of a dataclass: tuples are lists."""
    return json.loads(json.dumps(asdict(record), allow_nan=False))


def decode(cls: type[R], data: Any, *, name: str, minor: int = FORMAT[1]) -> R:
    """A dataclass from plain JSON values, nested ones too; every value is checked against its annotation.

    Args:
        cls: the dataclass. Its annotations may be str, bool, int, float, None, Literal, a union of these, tuple, dict
            and dataclasses.
        data: a dictionary with the fields' names.
        name: of the thing that is read, for messages.
        minor: of the format the values were written in. Of a newer one, fields that `cls` does not have are left out;
            of an older one, fields that came later (metadata `since`, a minor) may be missing and take their default.
    Returns:
        An instance of `cls`.
    Raises:
        UsageError: a field is missing, unknown or of another kind (its name is told), or `cls` refuses the values
        itself.
    """
    if not isinstance(data, dict):
        raise UsageError(f"{name}: wanted an object of JSON, got {_short(data)}")
    hints, values = typing.get_type_hints(cls), {}
    known = {f.name: f for f in fields(cls) if f.init}
    unknown = sorted(data.keys() - known.keys())
    if unknown and minor <= FORMAT[1]:
        raise UsageError(f"{name}: unknown field {', '.join(map(repr, unknown))[:200]}")
    for field_name, field in known.items():
        if field_name in data:
            values[field_name] = _value(hints[field_name], data[field_name], f"{name}: {field_name}", minor)
        elif field.metadata.get("since", 0) <= minor:
            raise UsageError(f"{name}: field {field_name!r} is missing")
    try:
        return cls(**values)
    except UsageError as e:
        raise UsageError(f"{name}: {e}") from None


def _value(hint: Any, value: Any, name: str, minor: int) -> Any:
    """A JSON value as what an annotation wants. Raises: UsageError that names the field."""
    if is_dataclass(hint):
        return decode(hint, value, name=name, minor=minor)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or origin is Literal and any(type(value) is type(a) and value == a for a in args):
        return value
    if origin in (types.UnionType, typing.Union):
        kinds = [a for a in args if a is not types.NoneType]
        return None if value is None and len(kinds) < len(args) else _value(kinds[0], value, name, minor)
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(hints) == len(value):
            return tuple(_value(h, v, f"{name}[{i}]", minor) for i, (h, v) in enumerate(zip(hints, value)))
    if (hint is dict or origin in (dict, Mapping)) and isinstance(value, dict):
        kind = args[1] if args else Any
        return {k: _value(kind, v, f"{name}[{k!r}]"[:200], minor) for k, v in value.items()}
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in (str, int, bool) and type(value) is hint:  # a bool is no int here
        return value
    raise UsageError(f"{name}: wanted {_words(hint)}, got {_short(value)}")


def _words(hint: Any) -> str:
    """An annotation for people."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        return f"a list of {_words(args[0])}" if args[-1] is Ellipsis else f"a list of {len(args)}: {_words(args[0])}"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if a is types.NoneType else _words(a) for a in args)
    words = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    return words.get(hint, "an object")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _version() -> str:
    from importlib.metadata import version

    return version("tokexport")
