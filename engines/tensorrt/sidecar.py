"""The sidecar PLAN.json beside an engine: what the engine is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from ...export.errors import UsageError
from ...export.provenance import Provenance
from . import runtime as runtimes

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")


@dataclass(frozen=True)
class EngineFile:
    """What the sidecar PLAN.json says of an engine.

    provenance: of the ONNX file. runtime: {"name", "version"}. compute_capability: GPUs it is for, [] for the one it was built on.
    precision: one of PRECISIONS. layers: of the typed network, by kind and type. profile: smallest, best and largest
    batch, null for a fixed one. batch: the fixed one, or null. outputs: names, decisions among them when they were asked for. size:
    bytes. sha256: of the engine. request: hash of what was asked, by which an engine is known again. source: the ONNX file.
    """

    provenance: dict
    runtime: dict
    compute_capability: list[str]
    precision: str
    layers: dict
    profile: list[int] | None
    batch: int | None
    outputs: list[str]
    size: int
    sha256: str
    request: str
    source: str
    warnings: list[str] = field(default_factory=list)


def sidecar(path: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return path.with_name(path.name + ".json")


def read_sidecar(path: str | Path) -> EngineFile:
    """The sidecar of an engine. Raises: UsageError when either is missing, damaged, or they do not belong together."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if not sidecar(path).is_file():
        raise UsageError(
            f"{path} has no {sidecar(path).name} beside it: it was not built by `tokexport trt`, or was moved without it"
        )
    try:
        found = EngineFile(**json.loads(sidecar(path).read_text()))
        wrong = _misfits(found)
        if wrong:
            raise ValueError(f"{', '.join(wrong)} of the wrong kind")
        Provenance.from_json(json.dumps(found.provenance))
    except (ValueError, TypeError) as e:
        raise UsageError(f"{sidecar(path)} cannot be read ({type(e).__name__}: {e}): build the engine again") from None
    if sha256_of(path) != found.sha256:
        raise UsageError(
            f"{path} is not the engine that {sidecar(path).name} speaks of (truncated or replaced): build it again"
        )
    return found


def _misfits(e: EngineFile) -> list[str]:
    """Fields of a sidecar whose values are not of the kind they should be."""
    texts = lambda v: isinstance(v, list) and all(isinstance(t, str) for t in v)
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0
    counts = lambda v: (
        isinstance(v, dict) and all(isinstance(t, dict) and all(map(whole, t.values())) for t in v.values())
    )
    fits = {
        "runtime": isinstance(e.runtime, dict)
        and e.runtime.get("name") in runtimes.PACKAGES
        and isinstance(e.runtime.get("version"), str),
        "compute_capability": texts(e.compute_capability),
        "precision": e.precision in PRECISIONS,
        "layers": counts(e.layers),
        "profile": e.profile is None
        or isinstance(e.profile, list)
        and len(e.profile) == 3
        and all(map(whole, e.profile)),
        "batch": e.batch is None or whole(e.batch),
        "outputs": texts(e.outputs),
        "size": whole(e.size),
        "warnings": texts(e.warnings),
        "batch and profile": bool(e.batch) != bool(e.profile),
        "source": isinstance(e.source, str),
    }
    return [name for name, ok in fits.items() if not ok]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
