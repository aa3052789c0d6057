"""Applying a merge plan: one sparse linear map, written once for each form. Tokens and sizes always move together."""

from __future__ import annotations

import torch

from ..kernels import ops
from .plan import MergePlan, row

# A step over this many tokens or more is exported in the gather form: its cost grows with N C, that of the matmul form with N N C,
# but the matmul form is five nodes shorter. Set by measurement on DeiT-S (README, "Measured"): the values keep one image under 450
# nodes and a dynamic batch under 563; a fixed batch has no such limit and takes the faster form everywhere.
GATHER_FROM = {"single": 165, "dynamic": 115, "fixed": 0}


def use_target(n_in: int, batch: str) -> bool:
    """Whether a step over n_in tokens is exported in the matmul form. batch: "single" (one image), "fixed" or "dynamic"."""
    return n_in < GATHER_FROM[batch]


def apply_eager(plan: MergePlan, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: x [B, N, C] and size [B, N, 1] -> [B, K, C] and [B, K, 1], by a scatter with a reduction."""
    rows = lambda t, index: t.gather(1, index.expand(-1, -1, t.shape[-1]))
    fold = lambda t: rows(t, plan.keep).scatter_add(1, plan.dst.expand(-1, -1, t.shape[-1]), rows(t, plan.src))
    total = fold(size)
    return fold(x * size) / total, total


def follow(plan: MergePlan, at: torch.Tensor) -> torch.Tensor:
    """Positions after a reference plan of things at rows `at` [B, M] before it; -1 stays -1, a dropped row becomes -1."""
    batch, n = at.shape[0], int(max(plan.keep.max(), plan.src.max())) + 1 if plan.src.numel() else int(plan.keep.max()) + 1
    n = max(n, int(at.max()) + 1)
    where = torch.full((batch, n), -1, dtype=torch.int64)
    where.scatter_(1, plan.keep[..., 0], torch.arange(plan.keep.shape[1]).expand(batch, -1))
    where.scatter_(1, plan.src[..., 0], plan.dst[..., 0])
    return torch.where(at < 0, at, where.gather(1, at.clamp(min=0)))


def apply_static(plan: MergePlan, x: torch.Tensor, size: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The same map without a reducing scatter: x [.., N, C], size [.., N, 1] or None (all 1) -> [.., K, C], [.., K, 1]."""
    return _by_matmul(plan, x, size) if plan.target is not None else _by_gather(plan, x, size)


def _by_matmul(plan, x, size):
    """Weights [.., N, K]: the size of each input row in the column of its output row."""
    hit = plan.target == row(plan.labels, plan.target)
    weight = ops.to_float(hit) if size is None else torch.where(hit, size, row([0.0], size))
    total = ops.matmul(weight, ops.floats([1.0] * hit.shape[-2], [hit.shape[-2], 1]), True, False)
    return ops.matmul(weight, x, True, False) / total, total


def _by_gather(plan, x, size):
    """Kept rows are gathered, and the few folded rows [.., R, C] added to them by a one-hot [.., R, K]."""
    hit = ops.to_float(plan.dst == row(plan.labels, plan.dst))
    if size is None:
        total = ops.addmm(hit, ops.floats([1.0] * hit.shape[-2], [hit.shape[-2], 1]), row([1.0], x), True, False)
    else:
        total = ops.addmm(hit, ops.take_rows(size, plan.src), ops.take_rows(size, plan.keep), True, False)
        x = x * size
    return ops.addmm(hit, ops.take_rows(x, plan.src), ops.take_rows(x, plan.keep), True, False) / total, total
