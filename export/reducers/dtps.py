"""dTPS: DynamicViT's choice, and the pruned tokens squeezed into the kept ones (Wei et al. 2023, Joint Token Pruning and Squeezing).

Before a block, a learned score head ranks the patch tokens; int(n0 rate^(stage + 1)) of the n0 original ones stay, in descending
score order. The others are squeezed as in eTPS.
"""

from __future__ import annotations

import torch

from .. import counts
from ..plan import MergePlan, Signals
from ..schedule import Step
from . import etps, ranking

NEEDS = ("head",)
OPTIONS = {"keep_rate": 0.7, "at": (3, 6, 9)}
reference, static = etps.reference, etps.static


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept (cumulative rates), steps and notes; see `counts.tps`."""
    at = counts.parse_at(options["at"], depth)
    rates = counts.cumulative(options["keep_rate"], len(at))
    return (
        {**options, "at": at, "keep_rate": rates},
        *counts.tps(rates, at, n_tokens, n_prefix, cumulative=True, squeeze=True),
    )


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much the plan gives away, [B]: of the log-odds to keep, or of the host's cosine."""
    return ranking.regret(s, step, plan, ranking.cosines(s, plan.keep, plan.src, etps.EPS), log=False)
