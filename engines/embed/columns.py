"""What a part holds: the columns that a file's outputs become, and tables of them. docs/embed.md tells them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from ...export.errors import UsageError
from ...export.provenance import Provenance
from ..outputs import activation_of, probabilities

ALWAYS = ("index", "path")


@dataclass(frozen=True)
class Column:
    """One column of the parts.

    Attributes:
        name: of it.
        type: of a value, or of each number in it: "int64", "int32", "float32", "text".
        shape: of the numbers of an image, in order of rows; () for a single one.
        meaning: in words.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    meaning: str


def columns_of(
    provenance: Provenance, shapes: dict[str, tuple], *, top: int = 1, names: tuple[str, ...] = ()
) -> tuple[Column, ...]:
    """The columns that a file gives.

    Args:
        provenance: of the file.
        shapes: output name -> shape with its batch axis, as a runner tells them.
        top: classes of an image, 1 or more; from 2 on there are columns `classes` and `scores`.
        names: those that are wanted, beside index and path; () for all but the logits.
    Raises:
        UsageError: one of the names is none of the file's, or there are not so many classes.
    """
    own: dict[str, Column] = {}
    for output in provenance.outputs:
        shape = tuple(int(n) for n in shapes[output][1:])
        kind = "int64" if output.startswith("sources") else "float32"
        own[output] = Column(output, kind, shape, f"output {output!r} of the file")
        if output == "logits":
            own |= _class_columns(provenance, shape[-1], top)
        elif top > 1 and "logits" not in provenance.outputs:
            raise UsageError(f"top {top}: the file has no classes (its outputs are {', '.join(provenance.outputs)})")
    strange = [name for name in names if name not in own and name not in ALWAYS]
    if strange:
        raise UsageError(f"column {strange[0][:80]!r} is none that this file gives: wanted {', '.join(own)}")
    wanted = names or [name for name in own if name != "logits"]
    always = (
        Column("index", "int64", (), "the image's place in the data, from 0"),
        Column("path", "text", (), "the image as the data names it"),
    )
    return always + tuple(column for name, column in own.items() if name in wanted)


def _class_columns(provenance: Provenance, n_classes: int, top: int) -> dict[str, Column]:
    if not 1 <= top <= n_classes:
        raise UsageError(f"top {top}: wanted 1 to {n_classes}, the classes of the file")
    kind = activation_of(provenance.activation, n_classes)
    score = "its logit" if kind == "none" else f"its probability ({kind})"
    columns = [
        Column("class", "int32", (), "index of the likeliest class"),
        Column("score", "float32", (), score),
    ]
    if top > 1:
        columns += [
            Column("classes", "int32", (top,), f"the {top} likeliest classes, the likeliest first"),
            Column("scores", "float32", (top,), f"of each {score.removeprefix('its ')}"),
        ]
    return {column.name: column for column in columns}


def values_of(
    columns: tuple[Column, ...], outputs: dict[str, np.ndarray], activation: str | None
) -> dict[str, np.ndarray]:
    """The values of a file's columns for some images.

    Args:
        columns: as `columns_of` gave them.
        outputs: output name -> [B, ...].
        activation: of the file, see `outputs.activation_of`.
    Returns:
        Column name -> [B] or [B, numbers], without index and path.
    """
    values = {}
    names = {column.name for column in columns}
    if {"class", "score", "classes", "scores"} & names:
        logits = outputs["logits"]
        top = max([column.shape[0] for column in columns if column.name in ("classes", "scores")], default=1)
        order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
        chances = probabilities(logits, activation)
        scores = np.take_along_axis(logits if chances is None else chances, order, 1)
        values = {"class": order[:, 0], "score": scores[:, 0], "classes": order, "scores": scores}
    values |= outputs
    return {
        column.name: np.asarray(values[column.name], column.type).reshape(len(next(iter(outputs.values()))), -1)
        for column in columns
        if column.name not in ALWAYS
    }


def finite(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """[B] whether all outputs of an image are finite."""
    return np.all([np.isfinite(value).reshape(len(value), -1).all(1) for value in outputs.values()], axis=0)


def schema_of(columns: tuple[Column, ...]):
    """The pyarrow.Schema of a part: numbers of an image as a list of fixed length, its shape in the field's metadata."""
    import pyarrow as pa

    kinds = {"int64": pa.int64(), "int32": pa.int32(), "float32": pa.float32(), "text": pa.string()}

    def field(column: Column):
        kind = pa.list_(kinds[column.type], prod(column.shape)) if column.shape else kinds[column.type]
        metadata = {"meaning": column.meaning} | ({"shape": ",".join(map(str, column.shape))} if column.shape else {})
        return pa.field(column.name, kind, nullable=False, metadata=metadata)

    return pa.schema([field(column) for column in columns])


def error_schema():
    """The pyarrow.Schema of the errors table."""
    import pyarrow as pa

    kinds = (("index", pa.int64()), ("path", pa.string()), ("error", pa.string()))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds])


def table_of(columns: tuple[Column, ...], indices: list[int], paths: list[str], values: dict[str, np.ndarray]):
    """A pyarrow.Table of some images.

    Args:
        columns: of the part.
        indices: [B] places in the data.
        paths: [B] names; what is no text in them is replaced.
        values: as `values_of` gave them.
    """
    import pyarrow as pa

    schema = schema_of(columns)

    def array(column: Column):
        kind = schema.field(column.name).type
        if column.name == "index":
            return pa.array(indices, kind)
        if column.name == "path":
            return pa.array([clean(path) for path in paths], kind)
        flat = pa.array(np.ascontiguousarray(values[column.name]).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, type=kind) if column.shape else flat

    return pa.Table.from_arrays([array(column) for column in columns], schema=schema)


def clean(text: str) -> str:
    """A text as UTF-8 can hold it: bytes of a file name that are none stand as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
