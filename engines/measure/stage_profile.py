"""Where a runtime spends its time: by the stage of the model each node belongs to, from the runtime's own profiler."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from ...export.errors import UsageError
from ...export.graph import stages
from ..parity.report import PARTS
from ..runners import TABLE, require

if TYPE_CHECKING:
    import numpy as np

REST = "rest"


def profiled() -> list[str]:
    """Names of the runtimes that have a profiler."""
    return [runtime.name for runtime in TABLE.values() if runtime.profiler]


def stage_times(
    path: str | Path, runtime: str, images: np.ndarray, *, rounds: int = 10, threads: int = 1
) -> dict[str, float]:
    """Milliseconds a run spends in each stage ("embed", "block0.attn", ..., "head"), and in nodes the runtime made
    itself ("rest").

    Profiling itself takes time: compare shares, not sums.

    Args:
        path: an ONNX file.
        runtime: one of `profiled()`.
        images: [B, 3, H, W] float32.
        rounds: runs, of which the mean is taken.
        threads: of the processor.
    Raises:
        UsageError: the runtime has no profiler.
    """
    row = require(runtime)
    if row.profiler is None:
        raise UsageError(f"{row.words} has no profiler: wanted one of {', '.join(profiled())}")
    times = getattr(row.load(), row.profiler)(Path(path), images, rounds=rounds, threads=threads)
    by_stage: Counter = Counter()
    for name, ms in times.items():
        stage = stages.of_node(name)
        by_stage[stage if stage.rpartition(".")[2] in PARTS else REST] += ms
    return dict(by_stage)


def by_part(times: dict[str, float]) -> dict[str, float]:
    """Stage times summed over blocks: {"attention": ms, ...}."""
    parts: Counter = Counter()
    for stage, ms in times.items():
        parts[PARTS.get(stage.rpartition(".")[2], REST)] += ms
    return dict(parts)
