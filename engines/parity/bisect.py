"""Which part of a file is wrong: its tokens behind every stage against the reference, stage by stage.

The file's tokens are read at the borders of its stages, from copies with a few of them as outputs (so that an engine fuses the rest
as ever). The reference computes each stage from the file's own tokens before it: a fault shows where it is and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np

from ...export.graph import stages
from ...export.inspection import read_onnx
from ..runners import in_batches, open_runner
from .limits import ROUNDING, STAGE

AT_ONCE = 12  # borders in one copy
PARTS = {
    "embed": "embedding",
    "attn": "attention",
    "match": "matching",
    "merge": "merging",
    "mlp": "MLP",
    "head": "head",
}


@dataclass(frozen=True)
class StageParity:
    """One stage of a file. stage: "embed", "block3.attn", ..., "head". error: the worst image's, see `tolerances`; of matching, what
    its decisions give away. limit: of the error."""

    stage: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit

    @property
    def words(self) -> str:
        """ "block 3, merging"."""
        block, _, part = self.stage.rpartition(".")
        return f"block {block.removeprefix('block')}, {PARTS[part]}" if block else PARTS[part]


def borders(model) -> dict[str, str]:
    """Stage -> the value that holds the tokens behind it, for an onnx.ModelProto with shapes: floats as wide as the model that a later
    stage of the trunk reads."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    width = {
        v.name: v.type.tensor_type.shape.dim[-1].dim_value
        for v in model.graph.value_info
        if v.type.tensor_type.elem_type in floats and len(v.type.tensor_type.shape.dim) in (2, 3)
    }
    part = lambda stage: stage.rpartition(".")[2]
    home = {o: stages.of_node(n.name) for n in model.graph.node for o in n.output}
    readers: dict[str, set] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(stages.of_node(node.name))
    first = next((o for o in home if home[o] == "block0.mlp"), None)
    c = next((width[i] for n in model.graph.node if first in n.output for i in n.input if width.get(i)), 0)
    after = {"embed": ("attn", "match", "merge", "head"), "attn": ("merge", "mlp", "match"), "merge": ("mlp", "attn")}
    after["mlp"] = after["embed"]
    found: dict[str, tuple[int, str]] = {}
    for name, stage in home.items():
        wanted = after.get(part(stage), ())
        ranks = [wanted.index(part(s)) for s in readers.get(name, ()) if s != stage and part(s) in wanted]
        if width.get(name) == c and ranks:  # matching may read keys as wide as the tokens: who else reads them decides
            found[stage] = min(found.get(stage, (9, "")), (min(ranks), name), key=lambda r: r[0])
    return {stage: name for stage, (_, name) in found.items()}


def observe(
    path: Path, runtime: str, image: np.ndarray, progress: Callable[[str], None] = lambda stage: None
) -> dict[str, np.ndarray]:
    """A file's tokens behind every stage of the trunk, [B, N, C] float32 by stage name. image: [B, 3, H, W], a few."""
    places, observed = list(borders(read_onnx(path)).items()), {}
    for start in range(0, len(places), AT_ONCE):
        some = dict(places[start : start + AT_ONCE])
        progress(f"stages {start + 1} to {start + len(some)} of {len(places)}")
        with open_runner(path, runtime, outputs=tuple(some.values())) as runner:
            got = in_batches(runner, image, tuple(some.values()))
        observed |= {stage: got[name].astype(np.float32) for stage, name in some.items()}
    return observed


def not_finite(path: Path, runtime: str, schedule, image: np.ndarray) -> str | None:
    """The first stage behind which a file's tokens are not finite, in words; None when they all are."""
    observed = observe(path, runtime, image)
    first = next((s for s in _order(schedule) if s in observed and not np.isfinite(observed[s]).all()), None)
    return None if first is None else StageParity(first, float("inf"), 0.0).words


def stage_parity(
    path: Path,
    runtime: str,
    reference,
    precision: str,
    near_tie: float,
    image: np.ndarray,
    got,
    progress: Callable[[str], None] = lambda stage: None,
) -> list[StageParity]:
    """Every stage of a file in the order it is computed.

    reference: the eager model. got: the file's own `Side` for image [B, 3, H, W], a few.
    """
    import torch

    observed = {stage: torch.from_numpy(v) for stage, v in observe(path, runtime, image, progress).items()}
    out = reference.run(torch.from_numpy(image), got.plans, observed, ROUNDING[precision])
    apart, length = (
        (torch.from_numpy(got.output.astype(np.float32)) - out.output).norm(dim=1),
        out.output.norm(dim=1).clamp(min=1e-30),
    )
    out.departs["head"] = (apart / length).nan_to_num(torch.inf, torch.inf)
    steps = {f"block{s.block}.match": r for s, r in zip(reference.schedule.steps, out.regrets)}
    order = {s: i for i, s in enumerate(_order(reference.schedule))}
    rows = [StageParity(s, float(e.max()), STAGE[precision]) for s, e in out.departs.items()]
    rows += [StageParity(s, float(e.max()), near_tie) for s, e in steps.items()]
    return sorted(rows, key=lambda r: order[r.stage])


def _order(schedule) -> list[str]:
    """All stages a model under a schedule can have, in the order they are computed."""
    sites, out = schedule.by_site, ["embed"]
    for b in range(schedule.depth):
        step = [f"block{b}.match", f"block{b}.merge"]
        before, behind = (step if (b, site) in sites else [] for site in ("pre_block", "post_attn"))
        out += [*before, f"block{b}.attn", *behind, f"block{b}.mlp"]
    return [*out, "head"]
