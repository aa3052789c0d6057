"""DiffRate: learned counts of tokens to prune and to merge in every block (Chen et al. 2023, Differentiable Compression Rate).

After the attention, tokens are sorted by class attention, prefix tokens first, and cut to prune_kept; those beyond merge_kept are
merged into the kept token of the most similar x (cosine; prefix tokens are no hosts). A token becomes the plain mean of itself and
what it receives. Its size grows by each source's size times their cosine; attention is proportional to size.

A cosine below zero can bring a size to zero or below, where the authors' code takes the logarithm to NaN; here such a size is 2^-100.
Wherever theirs is finite, sizes are the same. Counts above the present number of tokens do nothing but sort.
"""

from __future__ import annotations

import torch

from .. import counts, rates
from ..plan import MergePlan, Signals
from ..schedule import Step
from . import ranking

NEEDS = ("attention",)
OPTIONS = {"rates": None, "prop_attn": True, "score": "class", "pool": "auto"}


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept, steps and notes; see `rates.resolve`, `counts.diffrate`."""
    prune, merge, notes = rates.fit(options["rates"], n_tokens, n_prefix)
    found, more = counts.diffrate(prune, merge, n_tokens, n_prefix, depth)
    name = "given" if isinstance(options["rates"], dict) else str(options["rates"])
    return {**options, "rates": name, "prune_kept": prune, "merge_kept": merge}, found, [*notes, *more]


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions (or the given ones) and weights, on a batch: score [B, N, 1], x [B, N, C] -> row numbers."""
    keep, src = (given.keep, given.src) if given else ranking.sort(s, step)
    if src is None:
        return MergePlan(keep)
    cosine = ranking.cosines(s, keep, src, 0.0)
    dst = given.dst if given else cosine.max(-1, keepdim=True).indices
    return MergePlan(keep, src, dst, w_size=cosine.gather(2, dst))


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with fixed shapes."""
    found = ranking.top(s, step)
    if found["src"] is None:
        return MergePlan(found["keep"], order=found["order"])
    value, host = ranking.hosts(s, step, found["order"], 0.0)
    return MergePlan(found["keep"], found["src"], host, w_size=value, order=found["order"])


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much the plan gives away, [B]: of the logarithm of the class attention, or of the host's cosine."""
    return ranking.regret(s, step, plan, None if plan.src is None else ranking.cosines(s, plan.keep, plan.src, 0.0))
