"""The text form of protobuf messages, as much of it as `config.pbtxt` needs; no protobuf is imported."""

from __future__ import annotations

import json
from typing import Any

from ...export.errors import UsageError


class Word(str):
    """The name of an enum's value, which stands without quotes."""


def to_pbtxt(fields: dict[str, Any]) -> str:
    """A message as text.

    Args:
        fields: in order: numbers, true or false, text, `Word`, dicts (messages), and lists of these (repeated fields;
            of numbers and words on one line). A map is a list of {"key": ..., "value": ...}. None and [] are left out.
    """
    return "".join(_field(name, value, 0) for name, value in fields.items())


def _field(name: str, value: Any, depth: int) -> str:
    indent = "  " * depth
    if value is None:
        return ""
    if isinstance(value, dict):
        inside = "".join(_field(k, v, depth + 1) for k, v in value.items())
        return f"{indent}{name} {{\n{inside}{indent}}}\n"
    if isinstance(value, (list, tuple)):
        if value and not isinstance(value[0], dict):
            return f"{indent}{name}: [ {', '.join(_scalar(v) for v in value)} ]\n"
        return "".join(_field(name, v, depth) for v in value)
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, (int, float)):
        return str(value)
    text = str(value)
    if not text.isprintable():
        raise UsageError(f"{text[:80]!r} has characters that a configuration cannot hold: give the bundle another name")
    return json.dumps(text, ensure_ascii=False)
