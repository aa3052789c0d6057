"""What a file is: an ONNX file of tokexport or an engine, told by its name and by what lies beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from ..export import macs
from ..export.inspection import Inspection, inspect
from ..export.provenance import Provenance
from .tensorrt.sidecar import EngineFile, read_sidecar


def is_engine(path: str | Path) -> bool:
    """Whether a path names an engine, not an ONNX file."""
    return Path(path).suffix == ".plan" or Path(path).suffix != ".onnx" and Path(f"{path}.json").is_file()


def provenance_of(engine: EngineFile) -> Provenance:
    """The provenance of the file an engine was built from, in the engine's own precision and with the decisions that it gives."""
    p = Provenance.from_json(json.dumps(engine.provenance))
    return replace(p, precision=engine.precision, decisions=tuple(d for d in p.decisions if d in engine.outputs))


def inspect_file(path: str | Path) -> Inspection:
    """What an ONNX file or an engine is. Raises: UsageError as `inspect` and `read_sidecar`."""
    if not is_engine(path):
        return inspect(path)
    found = read_sidecar(path)
    p = provenance_of(found)
    return Inspection(
        Path(path),
        p,
        {},
        found.size,
        [],
        macs.count(p.dims, p.schedule),
        macs.count(p.dims, macs.dense(p.schedule)),
        found.batch,
    )
