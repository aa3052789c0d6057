"""What a block offers a reducer (Signals), and what a reducer decides (MergePlan)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..kernels import ops

if TYPE_CHECKING:
    from torch import Tensor


def column(values, like: Tensor, full: bool = False) -> Tensor:
    """Constants as a column of the type and number of axes of `like` (TensorRT needs a layer to broadcast one of fewer): [K, 1] or
    [1, K, 1]; with `full` repeated over the batch of `like`, whose size must be known."""
    batch = like.shape[0] if full and like.ndim == 3 else 1
    make = ops.floats if like.dtype.is_floating_point else ops.ints
    return make([*values] * batch, [batch, len(values), 1] if like.ndim == 3 else [len(values), 1])


def row(values, like: Tensor) -> Tensor:
    """Constants as a row of the type and number of axes of `like`: [1, K] or [1, 1, K]."""
    make = ops.floats if like.dtype.is_floating_point else ops.ints
    return make(list(values), [*[1] * (like.ndim - 1), len(values)])


def constant(values, like: Tensor, any_batch: bool) -> Tensor:
    """The column of `column(full=True)` when the batch of `like` [.., M, 1] (integers) is free too: [.., K, 1]."""
    return ops.fixed_rows(like, [0]) * 0 + column(values, like) if any_batch else column(values, like, full=True)


def lift(n: int, n_prefix: int) -> list[float]:
    """What is added to the scores of n tokens: prefix tokens come first, in their order, whatever the scores (below 10^5)."""
    return [float(2**20 - 2**8 * i) for i in range(n_prefix)] + [0.0] * (n - n_prefix)


@dataclass(frozen=True)
class Signals:
    """What one block offers; a reducer names in NEEDS what it reads, and only that is computed.

    The eager reference has a batch, [B, N, ..]; a static graph for one image has none, [N, ..].

    x: tokens, [.., N, C]: after the attention residual, or before the block.
    n_prefix: class, distillation and register tokens at the head of the sequence.
    has_class: whether the first of them is a class token.
    size: input tokens each token stands for, [.., N, 1]; None while every size is 1 (or the method has none).
    metric: keys averaged over heads, each divided by its L2 norm, [.., N, D].
    score: what tokens are sorted by, [.., N, 1]: attention received from the class token, mean over heads ("attention"), or the score
        head's ("head"); prefix tokens are lifted above all others.
    any_batch: the batch is free in the graph that is traced; constants cannot be repeated over it.
    """

    x: Tensor
    n_prefix: int
    has_class: bool
    size: Tensor | None = None
    metric: Tensor | None = None
    score: Tensor | None = None
    any_batch: bool = False


@dataclass(frozen=True)
class MergePlan:
    """Which rows stay and which are folded into which: a sparse linear map, K rows kept, R folded, the others dropped.

    New row j < K is the weighted mean of x[keep[j]] and of all x[src[i]] with dst[i] = j; an extra row K is the weighted sum of what
    is folded into it. Static shapes, int64 columns.

    keep: [.., K, 1] input rows that stay, in output order.
    src: [.., R, 1] input rows that are folded; None when there are none.
    dst: [.., R, 1] the output row each of them goes to; in a static plan its label instead, see below, and None with an extra row.
    by_size: the weights are the tokens' sizes, and sizes add (ToMe).
    w_keep, w_src: [.., K, 1], [.., R, 1] the weights otherwise; None for 1.
    w_size: [.., R, 1] sizes add, those of folded rows multiplied by this (DiffRate); None: sizes are not followed, unless by_size.
    squeezed: folded rows count as gone in the map of tokens (TPS: they only tint their hosts).
    n_extra: 1 when everything is folded into an extra row, else 0.
    order: [.., K + R, 1] keep and src in one column, when a static plan has them so.
    labels: one int per output row, by which a static plan's dst names it (None: the row number itself).
    target: [.., N, 1] label of every input row: the whole plan in one column.
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    by_size: bool = False
    w_keep: Tensor | None = None
    w_src: Tensor | None = None
    w_size: Tensor | None = None
    squeezed: bool = False
    n_extra: int = 0
    order: Tensor | None = None
    labels: tuple[int, ...] | None = None
    target: Tensor | None = None
