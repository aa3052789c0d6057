"""eTPS: EViT's choice, and the pruned tokens squeezed into the kept ones (Wei et al. 2023, Joint Token Pruning and Squeezing).

Tokens are sorted by class attention after the attention and counted as in EViT. Each pruned token goes to the most similar kept
token j (cosine c, norms plus 1e-6), which becomes (e x_j + sum_i exp(c_ij) x_i) / (e + sum_i exp(c_ij)). Prefix
tokens are no hosts. Of equal cosines the first host in score order receives; the authors' inference code gives such a token to all.
"""

from __future__ import annotations

import math

import torch

from .. import counts
from ..plan import MergePlan, Signals
from ..schedule import Step
from . import ranking

NEEDS = ("attention",)
OPTIONS = {"keep_rate": 0.7, "at": (3, 6, 9), "score": "class"}
EPS = 1e-6


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept, steps and notes; see `counts.etps`."""
    at = counts.parse_at(options["at"], depth)
    rates = counts.parse_rates(options["keep_rate"], len(at))
    return ({**options, "at": at, "keep_rate": rates}, *counts.etps(rates, at, n_tokens, n_prefix))


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions (or the given ones) and weights, on a batch: score [B, N, 1], x [B, N, C] -> row numbers."""
    keep, src = (given.keep, given.src) if given else ranking.sort(s, step)
    cosine = ranking.cosines(s, keep, src, EPS)
    dst = given.dst if given else cosine.max(-1, keepdim=True).indices
    return MergePlan(
        keep,
        src,
        dst,
        w_keep=torch.full(keep.shape, math.e, dtype=s.x.dtype),
        w_src=cosine.gather(2, dst).exp(),
        squeezed=True,
    )


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with fixed shapes. Weights are divided by e: 1 for the host, exp(c - 1) for what it receives."""
    found = ranking.top(s, step)
    value, host = ranking.hosts(s, step, found["order"], EPS, shift=-1.0)
    return MergePlan(found["keep"], found["src"], host, w_src=value.exp(), squeezed=True, order=found["order"])


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much the plan gives away, [B]: of the logarithm of the class attention, or of the host's cosine."""
    return ranking.regret(s, step, plan, ranking.cosines(s, plan.keep, plan.src, EPS))
