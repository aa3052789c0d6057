"""What a file says of itself: stored in the ONNX metadata, read by every later command. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .errors import UsageError
from .schedule import Schedule

KEY = "tokexport"


@dataclass(frozen=True)
class Preprocess:
    """From a photo to the input tensor, in timm's terms.

    size: (height, width) in pixels. mean, std: per channel, for values in [0, 1]. crop: fraction of the resized image that is kept.
    crop_mode: "center" (resize the short side to size / crop), "squash" (resize to size / crop) or "border" (pad).
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop: float = 1.0
    crop_mode: str = "center"


@dataclass(frozen=True)
class Provenance:
    """How a file was made.

    version: of tokexport. model, model_kwargs: for timm. weights: see `LoadedModel`. schedule: the token counts. preprocess: of the images.
    opset: of the graph. precision: "fp32", "fp16", "bf16" or "int8". outputs: names. dims: sizes the MACs are counted from.
    labels: class names when known. decisions: names of the graph's values that hold the merge plans. calibration: images int8's
    scales were measured on. activation: "softmax", "sigmoid" or "none", what makes probabilities of the logits.
    """

    version: str
    model: str
    model_kwargs: dict
    weights: dict
    schedule: Schedule
    preprocess: Preprocess
    opset: int
    precision: str
    outputs: tuple[str, ...]
    dims: dict
    labels: tuple[str, ...] = ()
    decisions: tuple[str, ...] = field(default=())
    calibration: int = 0
    activation: str | None = None

    def to_json(self) -> str:
        """One line of JSON; `from_json` takes it back."""
        return json.dumps({**asdict(self), "schedule": self.schedule.to_json()})

    def misfits(self) -> list[str]:
        """Fields whose values are not of the kind they should be."""
        numbers = lambda v, kind: all(isinstance(n, kind) and not isinstance(n, bool) for n in v)
        s, w, p, d = self.schedule, self.weights, self.preprocess, self.dims
        named = {"random": "seed", "checkpoint": "file", "pretrained": "file"}
        sizes = ("width", "attn_width", "classes", "channels", "heads", "patches", "patch_values")
        fits = {
            "model": isinstance(self.model, str) and isinstance(self.model_kwargs, dict),
            "weights": isinstance(w, dict) and named.get(w.get("source")) in w and isinstance(w.get("sha256"), str),
            "schedule": isinstance(s.options, dict) and 1 <= s.depth <= 10_000,
            "preprocess": len(p.size) == 2
            and numbers(p.size, int)
            and numbers([*p.mean, *p.std, p.crop], (int, float)),
            "precision": self.precision in ("fp32", "fp16", "bf16", "int8") and numbers([self.calibration], int),
            "dims": isinstance(d, dict)
            and numbers([d.get(k) for k in sizes], int)
            and all(len(m) == 2 and numbers(m, int) for m in d.get("mlp", [""])),
            "outputs": numbers([*self.outputs, *self.labels, *self.decisions], str),
        }
        return [name for name, ok in fits.items() if not ok]

    @classmethod
    def from_json(cls, text: str) -> "Provenance":
        """Raises: UsageError when the text is no provenance of this version."""
        try:
            d = json.loads(text)
            pre = d["preprocess"]
            pre = Preprocess(**{**pre, **{k: tuple(pre[k]) for k in ("size", "mean", "std")}})
            tuples = {k: tuple(d[k]) for k in ("outputs", "labels", "decisions")}
            made = cls(**{**d, "schedule": Schedule.from_json(d["schedule"]), "preprocess": pre, **tuples})
            wrong = made.misfits()
            if wrong:
                raise ValueError(f"{', '.join(wrong)} of the wrong kind")
            return made
        except (ValueError, KeyError, TypeError) as e:
            raise UsageError(
                f"provenance cannot be read ({type(e).__name__}: {e}): the file was made by another version of tokexport, "
                f"or damaged"
            ) from None


def of_model(onnx_model, path: str) -> Provenance:
    """Provenance of an onnx.ModelProto. Raises: UsageError when it has none."""
    for entry in onnx_model.metadata_props:
        if entry.key == KEY:
            return Provenance.from_json(entry.value)
    raise UsageError(f"{path} has no provenance: it was not made by tokexport; make it with `tokexport onnx`")
