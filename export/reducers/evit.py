"""EViT: attentive tokens stay, the others become one (Liang et al. 2022, Not All Patches Are What You Need).

After the attention, tokens are sorted by the attention the class token pays them, mean over heads. The first K stay in descending
order; with fusion the rest becomes one token behind them, the sum of x weighted by its raw scores. An earlier fused token competes
with the others. Of equal scores, the lower position comes first.
"""

from __future__ import annotations

import torch

from .. import counts
from ..plan import MergePlan, Signals
from ..schedule import Step
from . import ranking

NEEDS = ("attention",)
OPTIONS = {"keep_rate": 0.7, "at": (3, 6, 9), "score": "class", "fuse": True}


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept, steps and notes; see `counts.evit`."""
    at = counts.parse_at(options["at"], depth)
    rates = counts.parse_rates(options["keep_rate"], len(at))
    return ({**options, "at": at, "keep_rate": rates}, *counts.evit(rates, at, n_tokens, n_prefix, options["fuse"]))


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions (or the given ones) with a sort, on a batch: score [B, N, 1] -> row numbers."""
    keep, src = (given.keep, given.src) if given else ranking.sort(s, step)
    if src is None:
        return MergePlan(keep)
    return MergePlan(keep, src, torch.full_like(src, step.n_kept), w_src=s.score.gather(1, src), n_extra=1)


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with one TopK."""
    found = ranking.top(s, step)
    return MergePlan(
        found["keep"], found["src"], w_src=found["value"], n_extra=int(step.n_folded > 0), order=found["order"]
    )


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much the plan gives away, [B]: of the logarithm of the class attention."""
    return ranking.regret(s, step, plan)
