"""Applying a merge plan: one sparse linear map, written once for each form. Tokens and sizes always move together."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

import torch
from torch import Tensor

from ..kernels import ops
from .constants import bounded, row
from .plan import MergePlan


class Form(Enum):
    """How a static graph applies a plan whose layout leaves the choice (`StaticLayout.hosts`).

    MATMUL: one one-hot matrix [K, N] times all rows, out of the plan's target column.
    GATHER: kept rows are gathered, and the few folded ones added to them by a small one-hot matrix [R, K].
    """

    MATMUL = "matmul"
    GATHER = "gather"


# A step over this many tokens or more is exported in the gather form: its cost grows with N C, that of the matmul form with N N C,
# but the matmul form is four nodes shorter. Set by measurement on DeiT-S (README, "Measured"): the values keep one image at 450
# nodes and a dynamic batch under 563; a fixed batch has no such limit and takes the faster form everywhere.
GATHER_FROM = {"single": 158, "dynamic": 115, "fixed": 0}
# A size that was zero or negative: its logarithm, -69, takes the token out of the attention, finitely.
SMALLEST = 2.0**-100
MLERP = ("mlerp", "mlerp_code")


def choose_form(n_in: int, batch: str) -> Form:
    """The form in which a step is exported.

    Args:
        n_in: tokens that come in.
        batch: "single" (one image), "fixed" or "dynamic".
    """
    return Form.MATMUL if n_in < GATHER_FROM[batch] else Form.GATHER


def lay_out(plan: MergePlan, form: Form, *, any_batch: bool) -> MergePlan:
    """A static plan with the columns that a form needs; a plan whose layout names no hosts is complete as it is.

    Args:
        plan: of a reducer's `static`.
        form: see `choose_form`; there is a matmul form of means by size only.
        any_batch: the batch is free in the graph.
    Returns:
        The plan with `dst`, and in the matmul form with `layout.target`; what is not used leaves the graph.
    """
    layout = plan.layout
    if layout is None or layout.hosts is None:
        return plan
    if (
        form is Form.MATMUL and plan.combine == "size"
    ):  # a label is never above the row it names, so the smaller of the two is the label
        names = bounded(layout.labels, plan.keep, torch.minimum, any_batch=any_batch)
        layout = replace(layout, target=ops.put_rows(layout.hosts, plan.keep, names))
    return replace(plan, dst=ops.take_rows(layout.hosts, plan.src), layout=layout)


def apply_eager(plan: MergePlan, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: a plan applied by a scatter with a reduction.

    Args:
        plan: row numbers, [B, .., 1].
        x: tokens [B, N, C].
        size: input tokens that each stands for [B, N, 1].
    Returns:
        Tokens [B, K + n_extra, C] and their sizes [B, K + n_extra, 1].
    """
    rows = lambda t, index: t.gather(1, index.expand(-1, -1, t.shape[-1]))
    kept, kept_size = rows(x, plan.keep), rows(size, plan.keep)
    if plan.src is None:
        return kept, kept_size
    w_keep, w_src = _weights(plan, kept_size, rows(size, plan.src), x.dtype)
    if plan.n_extra:
        kept, kept_size, w_keep = (
            torch.cat([t, t.new_zeros(len(t), plan.n_extra, t.shape[-1])], 1) for t in (kept, kept_size, w_keep)
        )
    fold = lambda base, t: base.scatter_add(1, plan.dst.expand(-1, -1, t.shape[-1]), t)
    total, n = fold(w_keep, w_src), plan.keep.shape[1]
    total = torch.cat([total[:, :n], torch.ones_like(total[:, n:])], 1)  # an extra row is a sum
    sizes = fold(kept_size, rows(size, plan.src) * (1 if plan.w_size is None else plan.w_size))
    folded, mean = rows(x, plan.src), fold(kept * w_keep, rows(x, plan.src) * w_src) / total
    if plan.combine in MLERP:
        largest = kept.norm(dim=-1, keepdim=True).scatter_reduce(1, plan.dst, folded.norm(dim=-1, keepdim=True), "amax")
        mean = _rescaled(mean, kept, largest, plan.combine)
    return mean, sizes.clamp(min=SMALLEST)


def _rescaled(mean: Tensor, kept: Tensor, largest: Tensor, combine: str) -> Tensor:
    """Rows of means times their largest member's norm over a norm: their own ("mlerp") or the host's ("mlerp_code").

    A divisor of zero, which the published code turns into NaN, counts as SMALLEST.
    """
    divisor = torch.linalg.vector_norm(mean if combine == "mlerp" else kept, dim=-1, keepdim=True)
    return mean * (largest / torch.maximum(divisor, row([SMALLEST], divisor)))


def _weights(plan: MergePlan, kept_size: Tensor, src_size: Tensor, dtype) -> tuple[Tensor, Tensor]:
    """What hosts and folded rows are multiplied by."""
    if plan.combine == "size":
        return kept_size, src_size
    given = lambda weight, rows: torch.ones_like(rows, dtype=dtype) if weight is None else weight
    return given(plan.w_keep, plan.keep), given(plan.w_src, plan.src)


def follow(plan: MergePlan, positions: Tensor, n: int, *, squeezes: bool = False) -> Tensor:
    """Where things stand after a reference's plan.

    Args:
        plan: row numbers.
        positions: [B, M] rows, among the n before the plan, at which M things stand; -1 for what is gone.
        n: rows before the plan.
        squeezes: a folded row counts as gone (`Reducer.squeezes`).
    Returns:
        [B, M] rows after the plan, -1 for what was gone or is dropped now.
    """
    batch = positions.shape[0]
    where = torch.full((batch, n), -1, dtype=torch.int64, device=positions.device)
    where.scatter_(1, plan.keep[..., 0], torch.arange(plan.keep.shape[1], device=positions.device).expand(batch, -1))
    if plan.src is not None and not squeezes:
        where.scatter_(1, plan.src[..., 0], plan.dst[..., 0])
    return torch.where(positions < 0, positions, where.gather(1, positions.clamp(min=0)))


def apply_static(
    plan: MergePlan, x: Tensor, size: Tensor | None, to_attention: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The same map without a reducing scatter.

    Args:
        plan: static, laid out.
        x: tokens [.., N, C].
        size: [.., N, 1], or None while every size is 1.
        to_attention: the new sizes go on to proportional attention, which takes them as a row; the numbers are the same.
    Returns:
        Tokens [.., K + n_extra, C] and sizes [.., K + n_extra, 1], None when the plan does not follow them.
    """
    if plan.layout is not None and plan.layout.target is not None:
        return _by_matmul(plan, x, size, to_attention)
    if plan.src is None:
        return _split(plan, x)[0], size if size is None else _split(plan, size)[0]
    if plan.combine == "size":
        return _by_size(plan, x, size)
    kept, folded = _split(plan, x)
    if plan.combine == "sum":
        return torch.cat([kept, ops.matmul(plan.w_src, folded, True, False)], -2), None
    hit = _hit(plan)
    weight = hit if plan.w_src is None else hit * plan.w_src
    total = ops.addmm(weight, _ones(hit), row([1.0], x), True, False)
    out = ops.addmm(weight, folded, kept, True, False) / total
    if plan.combine in MLERP:
        norms = [torch.linalg.vector_norm(rows, dim=-1, keepdim=True) for rows in (kept, folded)]
        largest = torch.maximum((hit * norms[1]).amax(-2, keepdim=True).transpose(-1, -2), norms[0])
        return _rescaled(out, kept, largest, plan.combine), None
    if plan.w_size is None:
        return out, None
    kept_size, folded_size = (row([1.0], x), None) if size is None else _split(plan, size)
    folded_size = plan.w_size if folded_size is None else folded_size * plan.w_size
    return out, torch.maximum(ops.addmm(hit, folded_size, kept_size, True, False), row([SMALLEST], x))


def _hit(plan):
    """[.., R, K]: 1 where a folded row goes to an output row. A label names its output row, and hosts have the labels from 0 on."""
    labels = None if plan.layout is None else plan.layout.labels
    names = labels or range(plan.keep.shape[-2])
    return ops.one_hot(plan.dst, [names.index(label) for label in range(max(names) + 1)], len(names))


def _ones(hit):
    return ops.floats([1.0] * hit.shape[-2], [hit.shape[-2], 1])


def _split(plan, x):
    """Kept and folded rows of x."""
    if plan.layout is None or plan.layout.order is None:
        return ops.take_rows(x, plan.keep), None if plan.src is None else ops.take_rows(x, plan.src)
    rows, n = ops.take_rows(x, plan.layout.order), plan.keep.shape[-2]
    return (rows, None) if plan.src is None else rows.split([n, plan.src.shape[-2]], -2)


def _by_matmul(plan, x, size, to_attention):
    """Weights [.., N, K]: the size of each input row in the column of its output row."""
    target = plan.layout.target
    hit = target == row(plan.layout.labels, target)
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
