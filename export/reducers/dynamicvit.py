"""DynamicViT: a learned score head ranks the patch tokens before a block, the rest is dropped (Rao et al. 2021).

int(n0 rate^(stage + 1)) of the n0 original patch tokens stay, in descending score order, behind the prefix tokens.
"""

from __future__ import annotations

import torch

from .. import counts
from ..plan import MergePlan, Signals
from ..schedule import Step
from . import ranking

NEEDS = ("head",)
OPTIONS = {"keep_rate": 0.7, "at": (3, 6, 9)}


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept (cumulative rates), steps and notes; see `counts.tps`."""
    at = counts.parse_at(options["at"], depth)
    rates = counts.cumulative(options["keep_rate"], len(at))
    return (
        {**options, "at": at, "keep_rate": rates},
        *counts.tps(rates, at, n_tokens, n_prefix, cumulative=True, squeeze=False),
    )


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions (or the given ones) with a sort, on a batch: score [B, N, 1] -> row numbers."""
    return given or MergePlan(ranking.sort(s, step)[0])


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with one TopK."""
    found = ranking.top(s, step)
    return MergePlan(found["keep"], order=found["order"])


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much the plan gives away, [B]: of the log-odds to keep."""
    return ranking.regret(s, step, plan, log=False)
