"""Which part of a file is wrong: its tokens behind every stage against the reference, stage by stage.

The file's tokens are read at the borders of its stages, from copies with a few of them as outputs (so that an engine
fuses the rest as ever). The reference computes each stage from the file's own tokens before it: a fault shows where
it is and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...export import precisions
from ...export.graph import stages
from ...export.inspection import read_onnx
from ...export.provenance import Provenance
from ...export.schedule import Schedule
from ..runners import in_batches, open_runner
from .compare import WorstChunk
from .decisions import near_tie_limit
from .outputs import floor_of
from .report import StageParity
from .sides import Side, run_with_reach

BORDERS_AT_ONCE = 12  # in one copy
# Parts of later stages that read the tokens behind a part, the surest first.
READERS = {
    "embed": ("attn", "match", "merge", "head"),
    "attn": ("merge", "mlp", "match"),
    "merge": ("mlp", "attn"),
    "mlp": ("attn", "match", "merge", "head"),
}


class _Border(NamedTuple):
    """A value that may hold a stage's tokens. rank: of its surest reader in READERS, lower is surer."""

    rank: int
    value: str


def borders(model) -> dict[str, str]:
    """Where a file's tokens can be read.

    A stage's tokens are a float value as wide as the model that a later stage of the trunk reads. Matching may read
    keys that are as wide as the tokens, so who else reads a value decides (READERS).

    Args:
        model: onnx.ModelProto with the shapes of its inner values.
    Returns:
        Stage -> the value that holds the tokens behind it.
    """
    widths = _widths(model)
    stage_of = {output: stages.of_node(node.name) for node in model.graph.node for output in node.output}
    readers: dict[str, set] = defaultdict(set)
    for node in model.graph.node:
        for name in node.input:
            readers[name].add(stages.of_node(node.name))
    width = _model_width(model, stage_of, widths)
    best: dict[str, _Border] = {}
    for value, stage in stage_of.items():
        parts = READERS.get(_part(stage), ())
        ranks = [parts.index(_part(r)) for r in readers[value] if r != stage and _part(r) in parts]
        if widths.get(value) == width and ranks:
            border = _Border(min(ranks), value)
            if stage not in best or border.rank < best[stage].rank:
                best[stage] = border
    return {stage: border.value for stage, border in best.items()}


def _part(stage: str) -> str:
    """ "merge" of "block3.merge"."""
    return stage.rpartition(".")[2]


def _widths(model) -> dict[str, int]:
    """Last axis of every inner float value of two or three axes."""
    from onnx import TensorProto

    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    tensors = {v.name: v.type.tensor_type for v in model.graph.value_info}
    return {
        name: t.shape.dim[-1].dim_value
        for name, t in tensors.items()
        if t.elem_type in floats and len(t.shape.dim) in (2, 3)
    }


def _model_width(model, stage_of: dict[str, str], widths: dict[str, int]) -> int:
    """Width of the tokens: of what the first node of the first MLP reads."""
    first = next((value for value, stage in stage_of.items() if stage == "block0.mlp"), None)
    node = next((n for n in model.graph.node if first in n.output), None)
    return next((widths[i] for i in node.input if widths.get(i)), 0) if node else 0


def observe(
    path: Path, runtime: str, *, images: np.ndarray, progress: Callable[[str, float], None] = lambda text, share: None
) -> dict[str, np.ndarray]:
    """A file's tokens behind every stage of the trunk.

    Args:
        path: ONNX file.
        runtime: what runs it.
        images: [B, 3, H, W], a few.
        progress: called with what is being done and the share that is done.
    Returns:
        Stage -> its tokens [B, N, C], float32.
    """
    places, observed = list(borders(read_onnx(path)).items()), {}
    for start in range(0, len(places), BORDERS_AT_ONCE):
        some = dict(places[start : start + BORDERS_AT_ONCE])
        progress(f"stages {start + 1} to {start + len(some)} of {len(places)}", start / len(places))
        with open_runner(path, runtime, outputs=tuple(some.values())) as runner:
            values = in_batches(runner, images, tuple(some.values()))
        observed |= {stage: values[name].astype(np.float32) for stage, name in some.items()}
    return observed


def first_not_finite(path: Path, runtime: str, schedule: Schedule, images: np.ndarray) -> str | None:
    """Where a file's tokens stop being finite.

    Args:
        path: ONNX file.
        runtime: what runs it.
        schedule: of the file.
        images: [B, 3, H, W], a few.
    Returns:
        The first such stage, in words; None when all tokens are finite.
    """
    observed = observe(path, runtime, images=images)
    for stage in _order(schedule):
        if stage in observed and not np.isfinite(observed[stage]).all():
            return StageParity(stage, float("inf"), 0.0).words
    return None


def stage_parity(
    path: Path,
    runtime: str,
    *,
    reference,
    provenance: Provenance,
    worst: WorstChunk,
    progress: Callable[[str, float], None] = lambda text, share: None,
) -> list[StageParity]:
    """Every stage of a file, in the order it is computed.

    Args:
        path: ONNX file.
        runtime: what runs it.
        reference: the eager model.
        provenance: of the file.
        worst: images, and what the file made of them.
        progress: called with what is being done and the share that is done.
    Returns:
        A row for every stage; the worst image counts.
    """
    import torch

    precision, schedule = precisions.get(provenance.precision), provenance.file_schedule
    observed = observe(path, runtime, images=worst.images, progress=progress)
    tokens = {stage: torch.from_numpy(values) for stage, values in observed.items()}
    result, reach = run_with_reach(
        reference, worst.images, replay=worst.side.plans, observed=tokens, rounding=precision.rounding
    )
    errors = {stage: float(error.max()) for stage, error in result.departs.items()}
    if provenance.pooled is not None:
        errors["head"] = _head_error(worst.side, provenance.pooled, result, reach)
    rows = [StageParity(stage, error, precision.stage_limit) for stage, error in errors.items()]
    for step, regret in zip(schedule.steps, result.regrets, strict=True):
        limit = near_tie_limit(precision.name, step)
        rows.append(StageParity(f"block{step.block}.match", float(regret.max()), limit))
    order = {stage: i for i, stage in enumerate(_order(schedule))}
    return sorted(rows, key=lambda row: order[row.stage])


def _head_error(side: Side, name: str, result, reach: np.ndarray) -> float:
    """The head's error, of the worst image: over the length of what the reference makes of the same tokens, but as
    for outputs by no less than a share of the classifier's reach."""
    values, wanted = side.outputs[name].astype(np.float64), result.output.double().numpy()
    if values.shape != wanted.shape:
        return float("inf")
    length = np.maximum(np.linalg.norm(wanted, axis=1), np.maximum(floor_of(reach), 1e-30))
    error = np.linalg.norm(values - wanted, axis=1) / length
    return float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max())


def _order(schedule: Schedule) -> list[str]:
    """All stages that a model under a schedule can have, in the order they are computed."""
    sites, order = schedule.by_site, ["embed"]
    for b in range(schedule.depth):
        step = [f"block{b}.match", f"block{b}.merge"]
        before, behind = (step if (b, site) in sites else [] for site in ("pre_block", "post_attn"))
        order += [*before, f"block{b}.attn", *behind, f"block{b}.mlp"]
    return [*order, "head"]
