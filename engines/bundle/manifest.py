"""The manifest of a bundle, `tokexport.json`: what C++, a server or a person needs to run the file, in plain fields.

Everything in it that can be worked out is worked out when it is written, so that a reader needs neither PyTorch nor the
code that made the file. docs/bundle.md tells every field. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...export.errors import UsageError
from ...export.records import from_document, to_document
from .names import NAME, plain_file, refuse_path

LARGEST = 64 << 20  # bytes of a manifest; one with ten thousand labels has half a megabyte


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle.

    Attributes:
        name: of the file in the folder.
        sha256: of its bytes, in hexadecimal.
        size: bytes.
    """

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class TensorEntry:
    """An input of the file.

    Attributes:
        name: in the file.
        type: of its elements: "float32", "uint8".
        shape: null for an axis of any length.
        meaning: in words.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]
    meaning: str


@dataclass(frozen=True)
class OutputEntry:
    """An output of the file, and how it is judged.

    Attributes:
        name, type, shape, meaning: as of an input.
        kind: "logits", "features", "sources", ...: what its values are.
        exact: values are indices, which must be equal.
        by_row: values stand in the order of the tokens that are left: not compared where two runtimes order them
            otherwise.
        limit: largest difference to the reference over the image's scale (see `Proof`); 0 for exact ones.
        own_limit: the same to what the file gave when it was bundled.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]
    meaning: str
    kind: str
    exact: bool
    by_row: bool
    limit: float
    own_limit: float


@dataclass(frozen=True)
class Preprocessing:
    """From a photo to the input.

    Attributes:
        size: (height, width) in pixels.
        mean, std: one a channel, of values in [0, 1].
        interpolation: Pillow's filter: "nearest", "bilinear", "bicubic", "lanczos", "box" or "hamming".
        crop: share of the resized image that is kept.
        crop_mode: "center", "squash" or "border".
        channels: 3 (RGB) or 1 (grey).
        layout: of the input: "nchw" or "nhwc".
        normalised: whether the input is (value / 255 - mean) / std in float32; else the pixels themselves, uint8.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float
    crop_mode: Literal["center", "squash", "border"]
    channels: int
    layout: Literal["nchw", "nhwc"]
    normalised: bool


@dataclass(frozen=True)
class DecisionEntry:
    """One reduction, and the file's inner values that hold its decision.

    Attributes:
        block: from 0.
        site: "pre_block" or "post_attn".
        n_in, n_kept, n_out, n_folded: tokens that come in, stay, go out (one more than stay where the rest is fused),
            are folded.
        signal: what it looks at.
        near_tie: the largest margin (of the proof) that rounding explains.
        parts: part -> name of the value in the file: "order", or "keep" and "src"; "dst" or "target".
        type: of the values' elements.
        row_labels: names of the rows that go out, by which "dst" and "target" speak of hosts; empty for a fused rest.
    """

    block: int
    site: str
    n_in: int
    n_kept: int
    n_out: int
    n_folded: int
    signal: str | None
    near_tie: float
    parts: dict[str, str]
    type: str
    row_labels: tuple[int, ...]


@dataclass(frozen=True)
class Builder:
    """What built an engine.

    Attributes:
        name: "rtx" or "tensorrt". version: of it; an engine runs with no other.
        compute_capability: GPUs it is for, empty for the one it was built on.
        host_code: it carries native code of a plugin, which runs when the engine is loaded.
    """

    name: str
    version: str
    compute_capability: tuple[str, ...]
    host_code: bool


@dataclass(frozen=True)
class ProofEntry:
    """The proof.

    Attributes:
        file: its tensors.
        images: how many.
        runtime: what gave the file's own outputs. runtime_version: of it.
        photos: whether the photos themselves are in it, so that preprocessing is proven too.
    """

    file: FileEntry
    images: int
    runtime: str
    runtime_version: str
    photos: bool


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        version: of the tokexport that wrote it.
        kind: "onnx" or "engine".
        file: what is run. beside: files that belong to it: external weights, the sidecar of an engine.
        inputs, outputs: of the file. preprocessing: for its first input.
        classes: 0 for a model without. labels: their names, or none.
        activation: what makes probabilities of logits; "none" too where there are no classes.
        precision: of `precisions.TABLE`.
        decisions: every reduction whose decision the file gives; none of a file that gives none, which is judged by its
            outputs.
        ordered: the order of the tokens that stay is part of the decision.
        tokens: that enter block 0.
        proof: see `proof.verify_bundle`.
        builder: of an engine, null for an ONNX file.
        provenance: as it is stored in the file.
    """

    version: str
    kind: Literal["onnx", "engine"]
    file: FileEntry
    beside: tuple[FileEntry, ...]
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[OutputEntry, ...]
    preprocessing: Preprocessing
    classes: int
    labels: tuple[str, ...]
    activation: Literal["softmax", "sigmoid", "none"]
    precision: str
    decisions: tuple[DecisionEntry, ...]
    ordered: bool
    tokens: int
    proof: ProofEntry
    builder: Builder | None
    provenance: dict[str, Any]

    def __post_init__(self):
        p = self.preprocessing
        if len(self.inputs) != 1 or not self.outputs:
            raise UsageError(
                f"{len(self.inputs)} inputs and {len(self.outputs)} outputs: wanted one input, an output or more"
            )
        if self.labels and len(self.labels) != self.classes:
            raise UsageError(f"labels: {len(self.labels)} of {self.classes} classes: wanted one for each, or none")
        logits = [o for o in self.outputs if o.kind == "logits"]
        if any(o.shape[-1] != self.classes for o in logits) or bool(self.classes) != bool(logits):
            raise UsageError(f"classes: {self.classes}, which is not what the output {self.outputs[0].name} has")
        if len(p.mean) != p.channels or len(p.std) != p.channels or p.channels not in (1, 3) or 0 in p.std:
            raise UsageError(f"preprocessing: wanted mean and std (not 0) of {p.channels} channels, which are 1 or 3")
        if min(p.size) < 1 or not 0 < p.crop <= 8:
            raise UsageError(f"preprocessing: size {p.size} and crop {p.crop} must be above 0")
        axes = (p.channels, *p.size) if p.layout == "nchw" else (*p.size, p.channels)
        if tuple(self.inputs[0].shape[1:]) != axes:
            raise UsageError(
                f"preprocessing gives {axes}, the input {self.inputs[0].name} takes {self.inputs[0].shape[1:]}"
            )
        if (self.kind == "engine") != (self.builder is not None):
            raise UsageError("builder: wanted one of an engine, and none of an ONNX file")

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand: those of the file."""
        return tuple(self.provenance.get("needs", ()))

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file beside the manifest."""
        return (self.file, *self.beside, self.proof.file)


def to_text(manifest: Manifest) -> str:
    """The manifest as it is written: JSON with a line a field."""
    return json.dumps(to_document(manifest), indent=1, allow_nan=False) + "\n"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle; no other file is opened.

    Args:
        folder: of the bundle.
    Returns:
        The manifest, validated. Its files are plain names, but have not been looked at (see `folder.check_files`).
    Raises:
        UsageError: there is none, it is a link, damaged or of a newer format, needs what is not understood here, or
            names a file that is not a plain name.
    """
    path = plain_file(Path(folder), NAME)
    size = path.stat().st_size
    if size > LARGEST:
        raise UsageError(f"{path} has {size} bytes, a manifest at most {LARGEST}: it is none")
    manifest = from_document(Manifest, _values(path), name=str(path), remake="tokexport bundle")
    names = [entry.name for entry in manifest.files]
    for name in names:
        refuse_path(name, path)
    if len({*names, NAME}) != len(names) + 1:
        raise UsageError(f"{path} names a file twice: {', '.join(names)}")
    return manifest


def _values(path: Path) -> Any:
    def no_number(word: str):
        raise ValueError(f"{word} is no number of JSON")

    def no_twin(pairs: list[tuple[str, Any]]) -> dict:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a field stands twice")
        return values

    try:
        return json.loads(path.read_bytes(), parse_constant=no_number, object_pairs_hook=no_twin)
    except (ValueError, RecursionError) as e:
        raise UsageError(
            f"{path} is not JSON ({' '.join(str(e).split())[:100]}): the bundle is damaged, make it again"
        ) from None
