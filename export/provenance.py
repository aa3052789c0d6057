"""What a file says of itself: stored in the ONNX metadata, read by every later command. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from . import macs, precisions
from .errors import UsageError
from .outputs import POOLED, Emission, is_pooled
from .records import from_document, parse, to_document
from .schedule import Schedule
from .step import Step
from .tail import Tail, in_file, left_out

Target = Literal["portable", "cpu", "tensorrt"]
TARGETS = get_args(Target)
KEY = "tokexport"  # of the entry in an ONNX file's metadata
WEIGHT_SOURCES = {"random": "seed", "checkpoint": "file", "pretrained": "file"}  # and what of `weights` names them


@dataclass(frozen=True)
class Preprocess:
    """From a photo to the input tensor, in timm's terms.

    Attributes:
        size: (height, width) of the input tensor, in pixels.
        mean: per channel, for values in [0, 1].
        std: per channel, for values in [0, 1].
        interpolation: "bicubic", "bilinear", ...
        crop: fraction of the resized image that is kept, above 0.
        crop_mode: "center" (resize the short side to size / crop), "squash" (resize to size / crop) or "border" (pad).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    crop_mode: Literal["center", "squash", "border"] = "center"

    def __post_init__(self):
        if min(self.size) < 1 or self.crop <= 0:
            raise UsageError(f"preprocess: size {self.size} and crop {self.crop} must be above 0")
        if not self.mean or len(self.mean) != len(self.std) or 0 in self.std:
            raise UsageError(
                f"preprocess: mean {self.mean} and std {self.std}: wanted one of each a channel, no std of 0"
            )


@dataclass(frozen=True)
class Provenance:
    """How a file was made.

    Attributes:
        version: of the tokexport that made it.
        model: name of the model in its family.
        model_kwargs: what the model was made with beside its name.
        weights: where they are from: "source" (of WEIGHT_SOURCES), its "seed" or "file", "sha256", and "predictor", a
            file of score heads.
        schedule: the token counts that were asked for; those in the graph are `file_schedule`.
        preprocess: of the images.
        opset: of the graph.
        precision: a name of `precisions.TABLE`.
        outputs: names, in order.
        emission: what was asked for, from which the names follow.
        dims: sizes of the model that the MACs are counted from (`macs.count`), and "channels" of the image.
        labels: class names when known.
        decisions: names of the graph's values that hold the merge plans.
        calibration: images that int8's scales were measured on.
        family: whose model it is: "timm".
        target: what the graph was written for: any tool, runtimes on CPUs, or TensorRT.
        activation: what makes probabilities of the classifier's outputs; null: not said, a softmax is taken.
        input: of the graph: normalised float32 images, or uint8 ones of either layout.
        tail: whether the last block computes all tokens or, behind its keys and values, the prefix tokens alone (see `tail`).
        tuning: the table of candidates that the schedule was chosen from (`tokexport tune`); null for one that was asked for.
    """

    version: str
    model: str
    model_kwargs: dict[str, Any]
    weights: dict[str, Any]
    schedule: Schedule
    preprocess: Preprocess
    opset: int
    precision: str
    outputs: tuple[str, ...]
    dims: dict[str, Any]
    labels: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()
    calibration: int = 0
    family: str = "timm"
    target: Target = "portable"
    activation: Literal["softmax", "sigmoid", "none"] | None = None
    input: Literal["float32", "uint8-nhwc", "uint8-nchw"] = "float32"
    tail: Tail = "full"
    emission: Emission = POOLED
    tuning: dict[str, Any] | None = None

    def __post_init__(self):
        precisions.get(self.precision)
        named = WEIGHT_SOURCES.get(str(self.weights.get("source")))
        if named not in self.weights or not isinstance(self.weights.get("sha256"), str):
            raise UsageError(f"weights: wanted source ({', '.join(WEIGHT_SOURCES)}), its seed or file, and sha256")
        if not 1 <= self.schedule.depth <= 10_000:
            raise UsageError(f"schedule: {self.schedule.depth} blocks, wanted 1 to 10000")
        pooled = next((name for name in self.outputs if is_pooled(name)), "features")
        if self.outputs != self.emission.resolved(self.schedule.depth).names(pooled):
            raise UsageError(
                f"outputs: {', '.join(self.outputs)[:200]}, which is not what was asked for ({self.emission})"
            )
        if self.tail == "class" and self.emission.emit != ("pooled",):
            raise UsageError(f"tail class with outputs {', '.join(self.outputs)[:200]}: wanted the pooled one alone")
        self._check_dims()

    @property
    def file_schedule(self) -> Schedule:
        """The schedule with the steps that are in the graph: with the class tail the one behind the last attention is not."""
        return in_file(self.schedule, self.tail)

    @property
    def step_left_out(self) -> Step | None:
        """The step of the schedule that is not in the graph; None when all are."""
        return left_out(self.schedule, self.tail)

    @property
    def tail_rows(self) -> int | None:
        """Rows in the last block's attention with the class tail; None for all."""
        return self.schedule.n_prefix if self.tail == "class" else None

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates for one image that the file computes, where `macs.count` counts as the papers do."""
        return macs.executed(self.dims, self.schedule, self.tail)

    @property
    def pooled(self) -> str | None:
        """Name of the pooled output; None without one."""
        return next(filter(is_pooled, self.outputs), None)

    @property
    def n_blocks(self) -> int:
        """Blocks that are computed: those behind the last one that an output depends on are left out."""
        return self.emission.last_block(self.schedule.depth) + 1

    def _check_dims(self) -> None:
        whole = lambda v: type(v) is int and v >= 0
        pairs = lambda v: isinstance(v, (list, tuple)) and all(len(p) == 2 and all(map(whole, p)) for p in v)
        try:
            wrong = [k for k, v in self.dims.items() if not (whole(v) or isinstance(v, str) or pairs(v))]
            if not wrong and whole(self.dims["channels"]) and whole(self.dims["classes"]):
                macs.count(self.dims, self.schedule)
                return
        except (KeyError, TypeError) as e:
            wrong = [str(e)]
        raise UsageError(f"dims: wanted the sizes that MACs are counted from, wrong: {', '.join(wrong)[:200]}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand (`records.FEATURES`)."""
        asked = {
            "uint8_input": self.input != "float32",
            "class_tail": self.tail == "class",
            "activation": self.activation not in (None, "softmax"),
        }
        return tuple(name for name, needed in asked.items() if needed)

    def to_json(self) -> str:
        """One line of JSON; `from_json` takes it back."""
        return json.dumps(to_document(self))

    @classmethod
    def from_json(cls, text: str, name: str = "provenance") -> Provenance:
        """A provenance as it was stored.

        Args:
            text: JSON.
            name: of the file it is from, for messages.
        Raises:
            UsageError: it is no provenance, is damaged, or this version cannot read it (see `records`).
        """
        return from_document(cls, parse(text, name=f"the provenance in {name}"), name=name, remake="tokexport onnx")


def of_model(onnx_model: Any, path: str) -> Provenance:
    """The provenance in an ONNX model.

    Args:
        onnx_model: onnx.ModelProto.
        path: of its file, for messages.
    Raises:
        UsageError: it has none, or one that cannot be read.
    """
    for entry in onnx_model.metadata_props:
        if entry.key == KEY:
            return Provenance.from_json(entry.value, path)
    raise UsageError(f"{path} has no provenance: it was not made by tokexport; make it with `tokexport onnx`")


def store(onnx_model: Any, provenance: Provenance) -> None:
    """Write a provenance into an onnx.ModelProto, in the place of all metadata that it has.

    Args:
        onnx_model: onnx.ModelProto, changed in place.
        provenance: of the model.
    """
    del onnx_model.metadata_props[:]
    onnx_model.metadata_props.add(key=KEY, value=provenance.to_json())
