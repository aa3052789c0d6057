"""How clear each token's part of a decision is: the least that a score would have to move for the token to be decided otherwise.

A decision gives every token of a step a fate: it stays, is folded into a host, or is dropped. A token whose margin is within what
rounding explains is a near-tie; of any other, two runtimes must decide alike. That can be checked later without the model.

Example: one of four tokens merges; their best similarities are 0.90, 0.80, 0.79, 0.50. The first merges. Its margin is 0.10 (to the
best that stays), those of the others are 0.10, 0.11 and 0.40 (to what merges). Margins are in the units of the near-tie limits
(`precisions.Precision.near_tie`): cosines of metrics, logarithms of attention, log-odds of a score head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import Signals
    from .step import Step


class RowMargins(NamedTuple):
    """Margins of the rows that come into a step; infinite where nothing is to be decided.

    Args:
        fate: [B, n_in] of staying, being folded or dropped. Where the order of the rows that stay is the next step's partition, of
            the place among them as well.
        host: [B, n_in] of a folded row: to the second best host.
    """

    fate: Tensor
    host: Tensor


def nothing_decided(signals: Signals, step: Step) -> RowMargins:
    """Margins of a step that decides nothing by scores.

    Args:
        signals: of a batch.
        step: the reduction.
    """
    free = signals.x.new_full((len(signals.x), step.n_in), float("inf"))
    return RowMargins(free, free)


def lead(scores: Tensor, chosen: Tensor) -> Tensor:
    """How far the chosen column of every row leads the best other one, [B, R].

    Args:
        scores: [B, R, K].
        chosen: [B, R] columns.
    """
    import torch

    own = scores.gather(2, chosen[..., None])
    others = scores.scatter(2, chosen[..., None], -torch.inf)
    return (own[..., 0] - others.amax(2)).clamp(min=0)
