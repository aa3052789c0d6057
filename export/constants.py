"""Constant columns and rows for static graphs, of the type and number of axes of the tensors that they meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def column(values: Sequence, like: Tensor, *, full: bool = False) -> Tensor:
    """Constants as a column (TensorRT needs a layer to broadcast a tensor of fewer axes).

    Args:
        values: K numbers.
        like: [.., M, 1], whose type and number of axes the column takes.
        full: repeat the column over the batch of `like`, whose size must then be known.
    Returns:
        [K, 1], or [1, K, 1] ([B, K, 1] with `full`) where `like` has a batch axis.
    """
    batch = like.shape[0] if full and like.ndim == 3 else 1
    return _make(like)([*values] * batch, [batch, len(values), 1] if like.ndim == 3 else [len(values), 1])


def row(values: Sequence, like: Tensor) -> Tensor:
    """Constants as a row.

    Args:
        values: K numbers.
        like: a tensor whose type and number of axes the row takes.
    Returns:
        [1, K], or [1, 1, K] where `like` has a batch axis.
    """
    return _make(like)(list(values), [*[1] * (like.ndim - 1), len(values)])


def constant(values: Sequence, like: Tensor, *, any_batch: bool) -> Tensor:
    """Constants as a column for every image, also when the number of images is free in the graph.

    Args:
        values: K whole numbers.
        like: [.., M, 1] whole numbers.
        any_batch: the batch of `like` is free: the column is then added to zeros made of `like`.
    Returns:
        [.., K, 1].
    """
    from ..kernels import ops

    return ops.fixed_rows(like, [0]) * 0 + column(values, like) if any_batch else column(values, like, full=True)


def bounded(values: Sequence, like: Tensor, bound: Callable, *, any_batch: bool) -> Tensor:
    """Constants as a column for every image, made of another column in one node when the number of images is free.

    Args:
        values: K numbers.
        like: [.., K, 1], a column as long as the constants.
        bound: torch.minimum when no value of `like` is below its constant, torch.maximum when none is above: the constant wins.
        any_batch: the batch of `like` is free in the graph.
    Returns:
        [.., K, 1].
    """
    return bound(like, column(values, like)) if any_batch else column(values, like, full=True)


def lift(n: int, n_prefix: int) -> list[float]:
    """What is added to scores below 10^5 so that prefix tokens come first, in their order.

    Args:
        n: tokens, prefix tokens included.
        n_prefix: prefix tokens at the head of the sequence.
    Returns:
        One number a token: 2^20, 2^20 - 2^8, ... for prefix tokens, 0 for the others.
    """
    return [float(2**20 - 2**8 * i) for i in range(n_prefix)] + [0.0] * (n - n_prefix)


def _make(like: Tensor) -> Callable:
    from ..kernels import ops

    return ops.floats if like.dtype.is_floating_point else ops.ints
