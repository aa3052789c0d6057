"""Applying a merge plan: one sparse linear map, written once for each form. Tokens and sizes always move together."""

from __future__ import annotations

import torch

from ..kernels import ops
from .plan import MergePlan, row

# A ToMe step over this many tokens or more is exported in the gather form: its cost grows with N C, that of the matmul form with N N C,
# but the matmul form is four nodes shorter. Set by measurement on DeiT-S (README, "Measured"): the values keep one image at 450
# nodes and a dynamic batch under 563; a fixed batch has no such limit and takes the faster form everywhere.
GATHER_FROM = {"single": 158, "dynamic": 115, "fixed": 0}
SMALLEST = (
    2.0**-100
)  # a size that was zero or negative: its logarithm, -69, takes the token out of the attention, finitely


def use_target(n_in: int, batch: str) -> bool:
    """Whether a step over n_in tokens is exported in the matmul form. batch: "single" (one image), "fixed" or "dynamic"."""
    return n_in < GATHER_FROM[batch]


def apply_eager(plan: MergePlan, x: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference: x [B, N, C] and size [B, N, 1] -> [B, K + n_extra, C] and [B, K + n_extra, 1], by a scatter with a reduction."""
    rows = lambda t, index: t.gather(1, index.expand(-1, -1, t.shape[-1]))
    kept, kept_size = rows(x, plan.keep), rows(size, plan.keep)
    if plan.src is None:
        return kept, kept_size
    one = torch.ones_like(plan.keep, dtype=x.dtype), torch.ones_like(plan.src, dtype=x.dtype)
    w_keep, w_src = one if plan.w_src is None else (plan.w_keep if plan.w_keep is not None else one[0], plan.w_src)
    if plan.by_size:
        w_keep, w_src = kept_size, rows(size, plan.src)
    if plan.n_extra:
        kept, kept_size, w_keep = (
            torch.cat([t, t.new_zeros(len(t), plan.n_extra, t.shape[-1])], 1) for t in (kept, kept_size, w_keep)
        )
    fold = lambda base, t: base.scatter_add(1, plan.dst.expand(-1, -1, t.shape[-1]), t)
    total, n = fold(w_keep, w_src), plan.keep.shape[1]
    total = torch.cat([total[:, :n], torch.ones_like(total[:, n:])], 1)  # an extra row is a sum
    sizes = fold(kept_size, rows(size, plan.src) * (1 if plan.w_size is None else plan.w_size))
    return fold(kept * w_keep, rows(x, plan.src) * w_src) / total, sizes.clamp(min=SMALLEST)


def follow(plan: MergePlan, at: torch.Tensor, n: int) -> torch.Tensor:
    """Positions after a reference plan of things at rows `at` [B, M] of n before it.

    -1 stays -1; a row that is dropped or squeezed becomes -1.
    """
    batch = at.shape[0]
    where = torch.full((batch, n), -1, dtype=torch.int64)
    where.scatter_(1, plan.keep[..., 0], torch.arange(plan.keep.shape[1]).expand(batch, -1))
    if plan.src is not None and not plan.squeezed:
        where.scatter_(1, plan.src[..., 0], plan.dst[..., 0])
    return torch.where(at < 0, at, where.gather(1, at.clamp(min=0)))


def apply_static(
    plan: MergePlan, x: torch.Tensor, size: torch.Tensor | None, to_attention: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same map without a reducing scatter: x [.., N, C], size [.., N, 1] or None -> [.., K + n_extra, C], sizes or None.

    to_attention: the new sizes go on to proportional attention, which takes them as a row; the numbers are the same.
    """
    if plan.target is not None:
        return _by_matmul(plan, x, size, to_attention)
    if plan.src is None:
        return _split(plan, x)[0], size if size is None else _split(plan, size)[0]
    if plan.by_size:
        return _by_size(plan, x, size)
    kept, folded = _split(plan, x)
    if plan.n_extra:
        return torch.cat([kept, ops.matmul(plan.w_src, folded, True, False)], -2), None
    hit = _hit(plan)
    weight = hit if plan.w_src is None else hit * plan.w_src
    total = ops.addmm(weight, _ones(hit), row([1.0], x), True, False)
    out = ops.addmm(weight, folded, kept, True, False) / total
    if plan.w_size is None:
        return out, None
    kept_size, folded_size = (row([1.0], x), None) if size is None else _split(plan, size)
    folded_size = plan.w_size if folded_size is None else folded_size * plan.w_size
    return out, torch.maximum(ops.addmm(hit, folded_size, kept_size, True, False), row([SMALLEST], x))


def _hit(plan):
    """[.., R, K]: 1 where a folded row goes to an output row. A label names its output row, and hosts have the labels from 0 on."""
    names = plan.labels or range(plan.keep.shape[-2])
    return ops.one_hot(plan.dst, [names.index(label) for label in range(max(names) + 1)], len(names))


def _ones(hit):
    return ops.floats([1.0] * hit.shape[-2], [hit.shape[-2], 1])


def _split(plan, x):
    """Kept and folded rows of x."""
    if plan.order is None:
        return ops.take_rows(x, plan.keep), None if plan.src is None else ops.take_rows(x, plan.src)
    rows, n = ops.take_rows(x, plan.order), plan.keep.shape[-2]
    return (rows, None) if plan.src is None else rows.split([n, plan.src.shape[-2]], -2)


def _by_matmul(plan, x, size, to_attention):
    """Weights [.., N, K]: the size of each input row in the column of its output row."""
    hit = plan.target == row(plan.labels, plan.target)
    weight = ops.to_float(hit) if size is None else torch.where(hit, size, row([0.0], size))
    n, kept = weight.shape[-2:]
    if to_attention:  # a row of ones from the left is also the faster product
        total = ops.matmul(ops.floats([1.0] * n, [1, 1, 1, n] if x.ndim == 2 else [1, 1, n]), weight, False, False)
        total = ops.reshape(total, [kept, 1] if x.ndim == 2 else [-1, kept, 1])
    else:
        total = ops.matmul(weight, _ones(weight), True, False)
    return ops.matmul(weight, x, True, False) / total, total


def _by_size(plan, x, size):
    """Kept rows are gathered, and the few folded rows [.., R, C] added to them by a one-hot [.., R, K]."""
    hit = _hit(plan)
    if size is None:
        total = ops.addmm(hit, _ones(hit), row([1.0], x), True, False)
    else:
        kept, folded = _split(plan, size)
        total = ops.addmm(hit, folded, kept, True, False)
        x = x * size
    kept, folded = _split(plan, x)
    return ops.addmm(hit, folded, kept, True, False) / total, total
