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


def fixed_shape(x: Tensor) -> bool:
    """Whether every dimension is a number (not so for a dynamic batch being traced)."""
    return all(isinstance(d, int) for d in x.shape)


@dataclass(frozen=True)
class Signals:
    """What one block offers; a reducer names what it needs and only that is computed.

    The eager reference has a batch, [B, N, ..]; a static graph for one image has none, [N, ..].

    x: tokens after the attention residual, [.., N, C].
    size: input tokens each token stands for, [.., N, 1]; None while every size is 1.
    metric: keys averaged over heads, each divided by its L2 norm, [.., N, D].
    n_prefix: class, distillation and register tokens at the head of the sequence.
    has_class: whether the first of them is a class token.
    """

    x: Tensor
    size: Tensor | None
    metric: Tensor
    n_prefix: int
    has_class: bool


@dataclass(frozen=True)
class MergePlan:
    """Which rows stay and which are folded into which: a sparse linear map, K rows kept and R folded.

    New row j is the mean of x[keep[j]] and of all x[src[i]] with dst[i] = j, weighted by the tokens' sizes; sizes add.
    Static shapes, int64 columns.

    keep: [.., K, 1] input rows that stay, in output order.
    src: [.., R, 1] input rows that are folded.
    dst: [.., R, 1] the output row each of them goes to; in a static plan its label instead, see below.
    labels: one int per output row, by which a static plan's dst names it (None: the row number itself).
    target: [.., N, 1] label of every input row: the whole plan in one column.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor | None = None
    labels: tuple[int, ...] | None = None
    target: Tensor | None = None
