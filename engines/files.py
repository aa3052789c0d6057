"""What a file is: an ONNX file of tokexport or an engine, told by its name and by what lies beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..export import macs
from ..export.errors import UsageError
from ..export.inspection import Inspection, inspect
from ..export.provenance import Provenance
from ..export.records import encode, parse
from .tensorrt.sidecar import EngineFile, read_sidecar, sidecar


@dataclass(frozen=True)
class EngineInspection(Inspection):
    """What an engine is: an `Inspection` of what it computes, and its sidecar."""

    engine: EngineFile

    def to_json(self) -> dict:
        """Plain JSON values."""
        return {
            "path": str(self.path),
            "macs": self.macs,
            "macs_dense": self.macs_dense,
            "macs_executed": self.macs_executed,
            **encode(self.engine),
        }


def is_engine(path: str | Path) -> bool:
    """Whether a path names an engine: it ends in .plan, or in anything but .onnx and has an engine's sidecar."""
    path = Path(path)
    if path.suffix in (".plan", ".onnx") or not path.name:
        return path.suffix == ".plan"
    beside = sidecar(path)
    try:
        data = parse(beside.read_bytes(), name=str(beside)) if beside.is_file() else None
    except (UsageError, OSError):
        return False
    return isinstance(data, dict) and {"builder", "sha256", "provenance"} <= data.keys()


def provenance_of(engine: EngineFile) -> Provenance:
    """The provenance of an engine's file, in the engine's own precision and with the decisions that it gives."""
    decisions = tuple(name for name in engine.provenance.decisions if name in engine.output_names)
    return replace(engine.provenance, precision=engine.precision, decisions=decisions)


def inspect_file(path: str | Path) -> Inspection:
    """What an ONNX file or an engine is (`EngineInspection`). Raises: UsageError as `inspect` and `read_sidecar`."""
    if not is_engine(path):
        return inspect(path)
    path, engine = Path(path), read_sidecar(path)
    provenance = provenance_of(engine)
    return EngineInspection(
        path=path,
        provenance=provenance,
        ops={},
        size=engine.size,
        refusals=[],
        macs=macs.count(provenance.dims, provenance.schedule),
        macs_dense=macs.count(provenance.dims, macs.dense(provenance.schedule)),
        batch=engine.batch,
        files=(path, sidecar(path)),
        engine=engine,
    )
