"""What a comparison adds up, chunk by chunk: one small sum for each kind of row in the report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .outputs import ImageErrors, OutputKind, cosines, top
from .report import BlockParity, Cost, OutputParity


class ChunkErrors:
    """Errors of one output on a chunk, and which images are beyond the limit.

    Attributes:
        max_rel, cosine: [B].
        failed: [B] bool.
    """

    def __init__(self, errors: ImageErrors, limit: float):
        self.max_rel, self.cosine = errors.max_rel, errors.cosine
        self.failed = ~(errors.max_rel <= limit)


class OutputSum:
    """One output over all images.

    Args:
        name: of the output.
        kind: how it is judged.
        precision: whose limit holds.
    """

    def __init__(self, name: str, kind: OutputKind, precision: str):
        self.name, self.kind, self.limit = name, kind, kind.limit(precision)
        self.n = self.n_failed = 0
        self.max_abs = self.max_rel = self.kl = self.top1 = self.top5 = 0.0
        self.cosine = 1.0

    def add(self, values: np.ndarray, wanted: np.ndarray, reach: np.ndarray) -> ChunkErrors:
        """One chunk.

        Args:
            values: [B, ...] of the file.
            wanted: [B, ...] to be compared with.
            reach: [B] of the classifiers, see `sides.run_with_reach`.
        Returns:
            `ChunkErrors` of its images.
        """
        errors = self.kind.errors(values, wanted, reach)
        chunk = ChunkErrors(errors, self.limit)
        self.n += len(values)
        self.n_failed += int(chunk.failed.sum())
        self.max_abs = max(self.max_abs, float(errors.max_abs.max()))
        self.max_rel = max(self.max_rel, float(errors.max_rel.max()))
        self.cosine = min(self.cosine, float(errors.cosine.min()))
        if self.kind.classes:
            self.kl = max(self.kl, float(errors.kl.max()))
            self.top1 += float(errors.top1.sum())
            self.top5 += float(errors.top5.sum())
        return chunk

    def parity(self, name: str | None = None) -> OutputParity:
        """The row of the report. name: in the place of the output's own."""
        kl, top1, top5 = (self.kl, self.top1 / self.n, self.top5 / self.n) if self.kind.classes else (None, None, None)
        return OutputParity(
            name=name or self.name,
            max_abs=self.max_abs,
            max_rel=self.max_rel,
            limit=self.limit,
            cosine=self.cosine,
            kl=kl,
            top1=top1,
            top5=top5,
            exact=self.kind.exact,
            n_failed=self.n_failed,
            passed=self.n_failed == 0,
        )


@dataclass
class BlockSum:
    """Decisions of one block over all images.

    limit: of a near-tie. n: images. equal: those decided alike. margin: the largest.
    """

    block: int
    limit: float
    n: int = 0
    equal: int = 0
    margin: float = 0.0

    def add(self, alike: np.ndarray, margins: np.ndarray) -> None:
        """One chunk.

        Args:
            alike: [B] bool, decided like the other side.
            margins: [B] what a difference gives away.
        """
        self.n += len(alike)
        self.equal += int(alike.sum())
        self.margin = float(np.maximum(self.margin, margins.max()))  # one that is no number stays

    def parity(self) -> BlockParity:
        """The row of the report."""
        return BlockParity(self.block, self.equal / self.n, self.margin, self.limit)


@dataclass
class CostSum:
    """A file's main output against another model's over all images. classes: whether it is logits."""

    classes: bool
    n: int = 0
    cosine: float = 0.0
    worst: float = 1.0
    top1: float = 0.0
    finite: bool = True

    def add(self, values: np.ndarray, wanted: np.ndarray) -> None:
        """One chunk.

        Args:
            values: [B, classes or C] of the file.
            wanted: [B, classes or C] of the other model.
        """
        self.finite = (
            self.finite
            and values.shape == wanted.shape
            and bool(np.isfinite(values).all() and np.isfinite(wanted).all())
        )
        if not self.finite:
            return
        cosine = cosines(values.astype(np.float64), wanted.astype(np.float64))
        self.n += len(values)
        self.cosine += float(cosine.sum())
        self.worst = min(self.worst, float(cosine.min()))
        self.top1 += float(top(values, wanted, 1).sum()) if self.classes else 0.0

    def cost(self) -> Cost | None:
        """The row of the report; None when some value was not finite."""
        if not self.n or not self.finite:
            return None
        return Cost(self.cosine / self.n, self.worst, self.top1 / self.n if self.classes else None)
