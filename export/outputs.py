"""The outputs of a file: one row a kind, and which of them are asked for. Imports no torch.

`tokens_5` is the kind `tokens` of block 5; without a number it is what the last block gives, after the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .errors import UsageError

PARTS = {  # what can be asked for
    "pooled": "logits, or features of a model without classes",
    "tokens": "the tokens that are left, with sizes, sources and positions",
    "patches": "a feature for every patch of the image, reduced or not, with the honesty map",
    "sources": "the row of the token that each input token ended up in",
}
DROPPED = {
    "last": "what it was when it was dropped",
    "nearest": "the token of the nearest patch that is left",
    "zero": "zero, beside a mask",
}


@dataclass(frozen=True)
class OutputRow:
    """One kind of output: what it is and how it is judged.

    Attributes:
        meaning: in words.
        parts: of PARTS, with which it comes.
        axes: of an image, behind the batch: "classes", "width", "tokens" (rows that are left), "inputs" (tokens that
            enter block 0), "patches", or a number.
        exact: entries must be equal: indices, counts, masks.
        whole: entries are int64, else float32.
        by_row: values stand in the order of the tokens that are left.
        classes: values are logits.
        each: every row of the last axis is judged by its own length, so that a few loud tokens do not hide the others.
        unit: what an error is divided by at least; 0 for the image's own largest value.
        precision: whose limit holds; None for the file's own, another for what stays in float32 in every file.
    """

    meaning: str
    parts: tuple[str, ...]
    axes: tuple[str | int, ...]
    exact: bool = False
    whole: bool = False
    by_row: bool = False
    classes: bool = False
    each: bool = False
    unit: float = 0.0
    precision: str | None = None


TABLE = {
    "logits": OutputRow("a value for each class, before the activation", ("pooled",), ("classes",), classes=True),
    "features": OutputRow("the image's feature", ("pooled",), ("width",)),
    "tokens": OutputRow(
        "the tokens that are left, prefix tokens first", ("tokens",), ("tokens", "width"), by_row=True, each=True
    ),
    "sizes": OutputRow(
        "input tokens that each token stands for (whose source it is)",
        ("tokens",),
        ("tokens",),
        exact=True,
        by_row=True,
    ),
    "sources": OutputRow(
        "for each input token the row of the token it ended up in, -1 where it was dropped",
        ("tokens", "sources"),
        ("inputs",),
        exact=True,
        whole=True,
        by_row=True,
    ),
    "positions": OutputRow(
        "row and column in the grid of patches, the mean of what a token stands for, -1 for prefix tokens",
        ("tokens",),
        ("tokens", 2),
        by_row=True,
        unit=1.0,
        precision="fp32",
    ),
    "patches": OutputRow("a feature for every patch of the image", ("patches",), ("patches", "width"), each=True),
    "honesty": OutputRow(
        "for each patch the sum, over the merges it went through, of 1 - cosine of its token before and after",
        ("patches",),
        ("patches",),
        unit=1.0,
    ),
    "mask": OutputRow("1 where the patch has a token, 0 where it was dropped", ("patches",), ("patches",), exact=True),
}


def row_of(name: str) -> OutputRow:
    """The row of an output's name. Raises: UsageError when there is none."""
    row = TABLE.get(name.partition("_")[0])
    if row is None:
        raise UsageError(f"output {name!r} is of no kind that is known: {', '.join(TABLE)}")
    return row


def is_pooled(name: str) -> bool:
    """Whether an output is one vector for an image."""
    return "pooled" in row_of(name).parts


@dataclass(frozen=True)
class Emission:
    """Which outputs a file has.

    Attributes:
        emit: parts, keys of PARTS, in their order.
        layers: blocks, from 0, whose tokens and patches are given; none for what the last block gives.
        norm_layers: what is given of blocks goes through the final norm too.
        layout: of patches: [B, N, C] ("nlc") or [B, C, rows, columns] ("nchw").
        dropped: what stands for a patch that was dropped, a key of DROPPED.
    """

    emit: tuple[str, ...] = ("pooled",)
    layers: tuple[int, ...] = ()
    norm_layers: bool = False
    layout: Literal["nlc", "nchw"] = "nlc"
    dropped: Literal["last", "nearest", "zero"] = "last"

    def __post_init__(self):
        unknown = [part for part in self.emit if part not in PARTS]
        if unknown or not self.emit:
            raise UsageError(f"emit {', '.join(unknown) or 'nothing'}: wanted some of {', '.join(PARTS)}")
        if len(set(self.emit)) < len(self.emit):
            raise UsageError(f"emit {', '.join(self.emit)}: wanted each once")
        object.__setattr__(self, "emit", tuple(part for part in PARTS if part in self.emit))
        if self.layers and not {"tokens", "patches"} & set(self.emit):
            raise UsageError(f"layers give tokens or patches: add one of them to emit ({', '.join(self.emit)})")
        if self.norm_layers and not self.layers:
            raise UsageError("norm_layers says how layers are given: give layers too, or leave it out")
        if "patches" not in self.emit and (self.layout, self.dropped) != ("nlc", "last"):
            raise UsageError("layout and dropped say how patches are given: add patches to emit, or leave them out")
        if self.layout not in ("nlc", "nchw") or self.dropped not in DROPPED:
            raise UsageError(
                f"layout {self.layout}, dropped {self.dropped}: wanted nlc or nchw, and {', '.join(DROPPED)}"
            )

    def resolved(self, depth: int) -> Emission:
        """The same with layers counted from 0, in order.

        Raises: UsageError for a block that is not there, or named twice.
        """
        outside = [i for i in self.layers if not -depth <= i < depth]
        if outside:
            raise UsageError(
                f"layers {', '.join(map(str, outside))}: the model has {depth} blocks, 0 to {depth - 1} (or -{depth} to -1)"
            )
        layers = sorted(i % depth for i in self.layers)
        twice = [i for i, j in zip(layers, layers[1:]) if i == j]
        if twice:
            raise UsageError(f"layers name block {twice[0]} twice")
        return replace(self, layers=tuple(layers))

    def names(self, pooled: str) -> tuple[str, ...]:
        """Names of all outputs, in order.

        Args:
            pooled: what the pooled one is called: "logits" or "features".
        """
        names = [pooled] if "pooled" in self.emit else []
        for layer in self.layers or (None,):
            names += [kind if layer is None else f"{kind}_{layer}" for kind in self.kinds]
        return tuple(names)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of the outputs that are given of every layer."""
        asked = set(self.emit) - {"pooled"}
        kinds = [kind for kind, row in TABLE.items() if asked & set(row.parts)]
        return tuple(kind for kind in kinds if kind != "mask" or self.dropped == "zero")

    @property
    def needs_grid(self) -> bool:
        """Whether an output knows where patches are."""
        return bool({"tokens", "patches"} & set(self.emit))

    def last_block(self, depth: int) -> int:
        """The last block that an output depends on. depth: blocks of the model."""
        return depth - 1 if "pooled" in self.emit or not self.layers else max(self.layers)


POOLED = Emission()
WITH_SOURCES = Emission(("pooled", "sources"))


def parse_emission(
    emit: str | Sequence[str] = ("pooled",),
    *,
    layers: str | int | Sequence[int] = (),
    norm_layers: bool = False,
    layout: str | None = None,
    dropped: str | None = None,
    sources: bool = False,
) -> Emission:
    """What is asked for, as typed at the command line or as Python values.

    Args:
        emit: "pooled,patches" or a sequence, of PARTS.
        layers: "2,5,-1" or numbers; of blocks, from 0, negative ones from the end.
        norm_layers: put them through the final norm.
        layout: of patches, "nlc" or "nchw"; None for "nlc".
        dropped: a key of DROPPED; None for "last".
        sources: add "sources" to emit.
    Raises:
        UsageError: something that is not there, or does not go together.
    """
    parts = [p.strip() for p in emit.split(",")] if isinstance(emit, str) else list(emit)
    if sources and "sources" not in parts:
        parts.append("sources")
    if isinstance(layers, str):
        words = [w.strip() for w in layers.split(",")]
        if not all(w.removeprefix("-").isascii() and w.removeprefix("-").isdigit() and len(w) < 7 for w in words):
            raise UsageError(f"layers {layers[:80]!r}: wanted numbers of blocks, e.g. 2,5,8,11 or -2")
        layers = [int(w) for w in words]
    numbers = (layers,) if isinstance(layers, int) else tuple(layers)
    return Emission(tuple(parts), numbers, norm_layers, layout or "nlc", dropped or "last")
