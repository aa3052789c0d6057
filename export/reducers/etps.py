"""eTPS: EViT's choice, and the pruned tokens squeezed into the kept ones (Wei et al. 2023, Joint Token Pruning and Squeezing).

Tokens are sorted by class attention after the attention and counted as in EViT. Each pruned token goes to the most similar kept
token j (cosine c, norms plus 1e-6), which becomes (e x_j + sum_i exp(c_ij) x_i) / (e + sum_i exp(c_ij)). Prefix
tokens are no hosts. Of equal cosines the first host in score order receives; the authors' inference code gives such a token to all.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..margins import RowMargins
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import evit, options, ranking
from .base import Counts, Reducer

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-6


def steps(asked: dict, size: ModelSize) -> Counts:
    """eTPS's counts from its options: EViT's; what does not stay is squeezed, so there is never an extra token.

    Args:
        asked: at, keep_rate, score.
        size: of the model.
    """
    return evit.stage_counts(asked, size, fold=True, extra=False)


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions and weights.

    Args:
        s: a batch, with score [B, N, 1] and x [B, N, C].
        step: how many stay.
        given: decisions to keep instead; weights are computed.
    """
    import torch

    order = given or ranking.sort(s, step)
    cosine = ranking.cosines(s, order.keep, order.src, eps=EPS)
    dst = given.dst if given else cosine.max(-1, keepdim=True).indices
    w_keep = torch.full_like(order.keep, math.e, dtype=s.x.dtype)
    return MergePlan(order.keep, order.src, dst, combine="weighted", w_keep=w_keep, w_src=cosine.gather(2, dst).exp())


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with fixed shapes. Weights are divided by e: 1 for the host, exp(c - 1) for what it receives.

    Args:
        s: with score [.., N, 1] and x [.., N, C].
        step: how many stay.
    """
    order = ranking.top(s, step)
    value, host = ranking.hosts(s, step, order=order.column, eps=EPS, shift=-1.0)
    layout = StaticLayout(order.column)
    return MergePlan(order.keep, order.src, host, combine="weighted", w_src=value.exp(), layout=layout)


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the logarithm of the attention received, or of the host's cosine.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay.
        plan: row numbers.
    """
    return ranking.regret(s, step, plan=plan, cosine=ranking.cosines(s, plan.keep, plan.src, eps=EPS))


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is, in logarithms of the attention received and in cosines.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay.
        plan: row numbers.
    """
    return ranking.margins(s, step, plan=plan, cosine=ranking.cosines(s, plan.keep, plan.src, eps=EPS))


REDUCER = Reducer(
    "etps",
    "eTPS",
    "EViT's choice, the pruned tokens squeezed into the kept ones (Wei et al. 2023)",
    steps,
    options=(options.KEEP_RATE, options.AT, options.SCORE),
    signals=tuple(options.SIGNAL_OF.values()),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
    squeezes=True,
    node={"select": "score", "fold": "squeeze", "eps": EPS},
)
