"""How clear each token's part of a decision is: the least that a score would have to move for the token to be decided
otherwise.

A decision gives every token of a step a fate: it stays, is folded into a host, or is dropped. A token whose margin is
within what rounding explains is a near-tie; of any other, two runtimes must decide alike. That can be checked later
without the model.

Example: one of four tokens merges; their best similarities are 0.90, 0.80, 0.79, 0.50. The first merges. Its margin is
0.10 (to the best that stays), those of the others are 0.10, 0.11 and 0.40 (to what merges). Margins are in the units of
the near-tie limits (`precisions.Precision.near_tie`): cosines of keys, logarithms of attention, log-odds of a score
head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from .plan import MergePlan, Signals
    from .step import Step


class RowMargins(NamedTuple):
    """Margins of the rows that come into a step; infinite where nothing is to be decided.

    Args:
        fate: [B, n_in] of staying, being folded or dropped. Of a ToMe without a class token, whose order is its next
            partition, of the place among the rows that stay as well.
        host: [B, n_in] of a folded row: to the second best host.
    """

    fate: Tensor
    host: Tensor


def row_margins(signals: Signals, step: Step, *, plan: MergePlan) -> RowMargins:
    """Margins of a plan by the scores of the reference.

    Args:
        signals: of the reference in this step, on a batch.
        step: the reduction.
        plan: row numbers, of the same images.
    Returns:
        `RowMargins`, 0 where the plan itself departs from the scores.
    """
    import torch

    free = torch.full((len(signals.x), step.n_in), torch.inf, device=signals.x.device)
    if step.n_in == 1 or step.signal is None:
        return RowMargins(free, free)
    if signals.metric is not None:
        return _of_matching(signals, step, plan, free)
    return _of_ranking(signals, step, plan, free, log=step.signal != "score_head")


def _of_matching(s: Signals, step: Step, plan: MergePlan, free: Tensor) -> RowMargins:
    import torch

    from .reducers import matching

    a, b, scores = matching.similarities(s, step.n_in)
    n_left = step.n_kept - s.n_prefix - len(b)
    left, src = plan.keep[:, s.n_prefix : s.n_prefix + n_left, 0], plan.src[..., 0]
    host = (plan.dst[..., 0] - s.n_prefix - n_left).clamp(min=0)
    place = torch.zeros(step.n_in, dtype=torch.int64, device=a.device)
    place[a] = torch.arange(len(a), device=a.device)
    best = scores.amax(-1)
    kept, merged = best.gather(1, place[left]), best.gather(1, place[src])
    rows = scores.gather(1, place[src][..., None].expand(-1, -1, len(b)))
    hosts = free.scatter(1, src, _lead(rows, host))
    if not n_left:
        return RowMargins(free, hosts)
    fate = free.scatter(1, src, merged - kept.amax(1, keepdim=True))
    own = merged.amin(1, keepdim=True) - kept
    if not s.has_class and n_left > 1:
        gaps = kept[:, :-1] - kept[:, 1:]
        far = torch.full_like(gaps[:, :1], torch.inf)
        own = torch.minimum(own, torch.minimum(torch.cat([far, gaps], 1), torch.cat([gaps, far], 1)))
    return RowMargins(fate.scatter(1, left, own).clamp(min=0), hosts)


def _of_ranking(s: Signals, step: Step, plan: MergePlan, free: Tensor, log: bool) -> RowMargins:
    import torch

    from .reducers import ranking

    score = s.score[..., 0].clamp(min=1e-30).log() if log else s.score[..., 0]
    keep, kept = plan.keep[..., 0], score.gather(1, plan.keep[..., 0])
    low, hosts = kept.amin(1, keepdim=True), free
    rest = score.scatter(1, keep, -torch.inf)
    fate = (low - score).scatter(1, keep, kept - rest.amax(1, keepdim=True))
    if plan.src is not None:
        src, folded = plan.src[..., 0], score.gather(1, plan.src[..., 0])
        dropped = rest.scatter(1, src, -torch.inf).amax(1, keepdim=True)
        fate = torch.minimum(fate, folded.amin(1, keepdim=True) - score)  # of rows that are dropped
        fate = fate.scatter(1, keep, kept - rest.amax(1, keepdim=True))
        fate = fate.scatter(1, src, torch.minimum(low - folded, folded - dropped))
        if plan.dst is not None and not plan.n_extra:
            cosine = ranking.cosines(s, plan.keep, plan.src, eps=0.0)
            hosts = free.scatter(1, src, _lead(cosine, plan.dst[..., 0].clamp(max=step.n_kept - 1)))
    return RowMargins(fate.clamp(min=0), hosts)


def _lead(scores: Tensor, chosen: Tensor) -> Tensor:
    """How far the chosen column of every row leads the best other one: [B, R, K] and [B, R] -> [B, R]."""
    import torch

    own = scores.gather(2, chosen[..., None])
    others = scores.scatter(2, chosen[..., None], -torch.inf)
    return (own[..., 0] - others.amax(2)).clamp(min=0)
