"""dTPS: DynamicViT's choice, and the pruned tokens squeezed into the kept ones (Wei et al. 2023, Joint Token Pruning and Squeezing).

Before a block, a learned score head ranks the patch tokens; int(n0 rate^(stage + 1)) of the n0 original ones stay, in descending
score order. The others are squeezed as in eTPS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..margins import RowMargins
from ..plan import MergePlan, Signals
from ..step import ModelSize, Step
from . import dynamicvit, etps, options, ranking
from .base import Counts, Reducer

if TYPE_CHECKING:
    from torch import Tensor


def steps(asked: dict, size: ModelSize) -> Counts:
    """dTPS's counts from its options: DynamicViT's.

    Args:
        asked: at, keep_rate.
        size: of the model.
    """
    return dynamicvit.stage_counts(asked, size, squeeze=True)


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the log-odds to keep, or of the host's cosine.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay.
        plan: row numbers.
    """
    cosine = ranking.cosines(s, plan.keep, plan.src, eps=etps.EPS)
    return ranking.regret(s, step, plan=plan, cosine=cosine, log=False)


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is, in log-odds to keep and in cosines.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay.
        plan: row numbers.
    """
    cosine = ranking.cosines(s, plan.keep, plan.src, eps=etps.EPS)
    return ranking.margins(s, step, plan=plan, cosine=cosine, log=False)


REDUCER = Reducer(
    "dtps",
    "dTPS",
    "DynamicViT's choice, the pruned patches squeezed into the kept ones (Wei et al. 2023)",
    steps,
    options=(options.KEEP_SHARE, options.AT),
    signals=("score_head",),
    reference=etps.reference,
    static=etps.static,
    regret=regret,
    margins=margins,
    squeezes=True,
    node=etps.REDUCER.node,
)
