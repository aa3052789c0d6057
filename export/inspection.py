"""What a file says of itself and what is in it, without torch and in under a second."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from . import macs
from .errors import UsageError
from .files import weight_files
from .graph import checks
from .provenance import Provenance, of_model


@dataclass(frozen=True)
class Inspection:
    """What a file is.

    Attributes:
        path: of the file.
        provenance: as stored.
        ops: nodes by operator, the most frequent first; of an engine none.
        size: bytes, weights beside the file included.
        refusals: why no engine can be built from it, or none worth having, by node; each says with which builder.
        macs: multiply-accumulates per image.
        macs_dense: those of the model without a reduction.
        batch: images per run, None for any number.
        files: all that must be kept together: the file itself first, then its weights or its sidecar.
    """

    path: Path
    provenance: Provenance
    ops: dict[str, int]
    size: int
    refusals: list[str]
    macs: int
    macs_dense: int
    batch: int | None
    files: tuple[Path, ...]

    @property
    def macs_executed(self) -> int:
        """Multiply-accumulates per image that the file computes; less than `macs` with the class tail."""
        return self.provenance.macs_executed

    def to_json(self) -> dict:
        """Plain JSON values."""
        import json

        return {
            "path": str(self.path),
            "size": self.size,
            "batch": self.batch,
            "nodes": sum(self.ops.values()),
            "ops": self.ops,
            "macs": self.macs,
            "macs_dense": self.macs_dense,
            "macs_executed": self.macs_executed,
            "tokens": self.provenance.schedule.tokens_per_block(),
            "refusals": self.refusals,
            "provenance": json.loads(self.provenance.to_json()),
        }


def _folder_words(path: Path) -> str:
    """What a folder is in whose place a file was wanted, and which file to name."""
    for manifest, kind in (("ladder.json", "a ladder"), ("tokexport.json", "a bundle")):
        inside = sorted(p.name for pattern in ("*.onnx", "*.plan") for p in path.glob(pattern))
        if (path / manifest).is_file() and inside:
            return f"{kind}: wanted a file in it, e.g. {path / inside[0]}"
    return "a folder: wanted an ONNX file"


def read_onnx(path: str | Path):
    """The onnx.ModelProto of a file, weights left beside it.

    Raises: UsageError when it is missing or no ONNX file, or its weights are not where it says.
    """
    import onnx

    if not str(path).strip():
        raise UsageError("an empty file name was given: wanted an ONNX file")
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is {_folder_words(path)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix == ".plan":
        raise UsageError(f"{path} is an engine: wanted the ONNX file it was built from")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception:
        model = None
    if model is None or not model.graph.node:
        raise UsageError(f"{path} is not an ONNX file (or is damaged): wanted one made with `tokexport onnx`")
    weight_files(model, path)
    return model


def _check_graph(path: Path, model, provenance: Provenance) -> None:
    """Raises: UsageError when the graph is not the one the provenance speaks of."""
    schedule, wrong = provenance.file_schedule, []
    known = {o for n in model.graph.node for o in n.output}
    wanted = [n for n, _ in schedule.tokens_per_block()][: provenance.n_blocks]
    if checks.attention_tokens(model, provenance.tail_rows) != wanted:
        wrong.append("token counts")
    if [i.name for i in model.graph.input] != ["image"]:
        wrong.append("inputs")
    if tuple(o.name for o in model.graph.output) != provenance.outputs:
        wrong.append("outputs")
    named = {d.split(".")[0] for d in provenance.decisions}
    steps = {f"block{s.block}" for s in schedule.steps}
    decided = {f"block{s.block}" for s in schedule.steps if s.n_in > 1}  # of one token nothing is left to decide
    if not decided <= named <= steps or not known.issuperset(provenance.decisions):
        wrong.append("merge decisions")
    if bool(provenance.schedule.steps) and schedule.method == "none":
        wrong.append("method")
    if wrong:
        raise UsageError(
            f"{path}: the graph is not the one its provenance speaks of ({', '.join(wrong)}): it was changed, "
            f"or made by another version; make it again with `tokexport onnx`"
        )


def inspect(path: str | Path) -> Inspection:
    """What an ONNX file made by tokexport is.

    Raises: UsageError when it is missing, no ONNX file, or has no provenance (what speaks against building an engine is
    told then too).
    """
    path, model = Path(path), read_onnx(path)
    refusals = checks.model_refusals(model)
    try:
        provenance = of_model(model, str(path))
    except UsageError as e:
        if refusals:
            raise UsageError(f"{e}\nNor is it one to build engines from: " + "; ".join(refusals[:5])) from None
        raise
    _check_graph(path, model, provenance)
    files = (path, *weight_files(model, path))
    schedule = provenance.schedule
    return Inspection(
        path=path,
        provenance=provenance,
        ops=dict(Counter(n.op_type for n in model.graph.node).most_common()),
        size=sum(f.stat().st_size for f in files),
        refusals=refusals,
        macs=macs.count(provenance.dims, schedule),
        macs_dense=macs.count(provenance.dims, macs.dense(schedule)),
        batch=model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None,
        files=files,
    )
