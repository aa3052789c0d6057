"""The sidecar PLAN.json beside an engine: what the engine is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...export import precisions
from ...export.errors import UsageError
from ...export.files import sha256_of
from ...export.provenance import Provenance
from ...export.records import from_document, parse, to_document
from . import runtime as runtimes

ENDING = ".json"  # behind an engine's name


@dataclass(frozen=True)
class Builder:
    """What built an engine: `name` is a key of `runtime.PACKAGES`."""

    name: str
    version: str

    def __post_init__(self):
        if self.name not in runtimes.PACKAGES:
            raise UsageError(f"builder {self.name[:40]!r}: wanted one of {', '.join(runtimes.PACKAGES)}")

    @property
    def words(self) -> str:
        """What people call it."""
        return runtimes.PACKAGES[self.name].words


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine: `type` as in NumPy ("float32"), `shape` with None for a free batch."""

    name: str
    type: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Plugin:
    """The native library that an engine was built with: `sha256` of it, `embedded` when the engine carries it in itself."""

    sha256: str
    embedded: bool


@dataclass(frozen=True)
class EngineFile:
    """What the sidecar of an engine says.

    Attributes:
        provenance: of the ONNX file.
        builder: what built the engine.
        compute_capability: of the GPUs it is for, e.g. ("86", "89"); that of `gpu` when none was named.
        gpu: the GPU it was built on and for; null when capabilities were named.
        precision: a name of `precisions.TABLE`, its own, not the file's.
        layers: of the typed network, {kind: {type: count}}.
        inputs: in order.
        outputs: in order, decisions among them when they were asked for.
        profile: smallest, best and largest batch of a free one, else null.
        batch: the fixed one, or null.
        size: bytes.
        sha256: of the engine.
        request: SHA-256 of what was asked, of the builder's version and of all bytes of the ONNX file; by it an engine
            is known again.
        source: path of the ONNX file when it was built.
        source_sha256: of that file and of its weights beside it.
        warnings: of the builder, each once.
        plugin: the library that runs its nodes TokenReduce; null: it needs none.
    """

    provenance: Provenance
    builder: Builder
    compute_capability: tuple[str, ...]
    gpu: runtimes.Gpu | None
    precision: str
    layers: dict[str, dict[str, int]]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    profile: tuple[int, int, int] | None
    batch: int | None
    size: int
    sha256: str
    request: str
    source: str
    source_sha256: str
    warnings: tuple[str, ...] = ()
    plugin: Plugin | None = None

    def __post_init__(self):
        precisions.get(self.precision)
        if (self.batch is None) == (self.profile is None):
            raise UsageError("wanted either batch or profile")
        low, best, high = self.profile or (self.batch,) * 3
        if not 1 <= low <= best <= high:
            raise UsageError(f"batch {low}:{best}:{high}: wanted smallest:best:largest")
        if not self.inputs or not self.outputs or self.size < 1:
            raise UsageError("wanted an input, an output and a size")

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that a reader must understand (`records.FEATURES`)."""
        return (*self.provenance.needs, *(["plugin"] if self.plugin else []))

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(output.name for output in self.outputs)


def sidecar(path: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return path.with_name(path.name + ENDING)


def read_sidecar(path: str | Path) -> EngineFile:
    """The sidecar of an engine.

    Raises: UsageError when either is missing or damaged, they do not belong together, or this version cannot read it
    (see `records`).
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    beside = sidecar(path)
    if not beside.is_file():
        raise UsageError(
            f"{path} has no {beside.name} beside it: it was not built by `tokexport trt`, or was moved without it"
        )
    data = parse(beside.read_bytes(), name=str(beside))
    engine = from_document(EngineFile, data, name=str(beside), remake="tokexport trt")
    if sha256_of(path) != engine.sha256:
        raise UsageError(
            f"{path} is not the engine that {beside.name} speaks of (truncated or replaced): build it again"
        )
    return engine


def write_sidecar(path: Path, engine: EngineFile) -> None:
    """Write the sidecar of the engine at path, as `read_sidecar` takes it.

    Args:
        path: of the engine.
        engine: what it is.
    """
    sidecar(path).write_text(json.dumps(to_document(engine), indent=1) + "\n")
