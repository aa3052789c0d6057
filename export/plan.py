"""What a block offers a reducer (Signals), and what a reducer decides (MergePlan)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def column(values, like: Tensor) -> Tensor:
    """Constants as a column of as many axes as `like` (TensorRT needs a layer to broadcast one of fewer): [K, 1] or [1, K, 1]."""
    import torch

    values = torch.tensor(values, dtype=like.dtype)[:, None]
    return values[None] if like.ndim == 3 else values


def row(values, like: Tensor) -> Tensor:
    """Constants as a row of as many axes as `like`: [1, K] or [1, 1, K]."""
    return column(values, like).mT


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
