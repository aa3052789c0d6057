"""Bipartite matching, ToMe's way of pairing tokens: who may merge with whom, and how much given pairs give away."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..margins import RowMargins, lead, nothing_decided
from ..plan import MergePlan, Signals
from ..step import Step

if TYPE_CHECKING:
    from torch import Tensor


MOST_SORTED = 3840  # rows that one TopK of TensorRT and TensorRT-RTX gives; ONNX Runtime and OpenVINO have no limit


def sets(n: int, n_prefix: int) -> tuple[list[int], list[int]]:
    """Positions of A (even, may merge) and B (odd, may receive), prefix tokens left out.

    Args:
        n: tokens, prefix tokens included.
        n_prefix: prefix tokens at the head of the sequence.
    """
    return [p for p in range(0, n, 2) if p >= n_prefix], [p for p in range(1, n, 2) if p >= n_prefix]


def labels(step: Step, n_prefix: int) -> tuple[int, ...]:
    """The name of every output row in a static plan: B rows carry their place in B, the rows before them count down from -1.

    Six tokens, one of them a prefix token, of which one merges: rows cls, A, B, B, B are named -1, -2, 0, 1, 2.

    Args:
        step: how many rows stay.
        n_prefix: prefix tokens at the head of the sequence.
    """
    n_b = len(sets(step.n_in, n_prefix)[1])
    return (*range(-1, n_b - step.n_kept - 1, -1), *range(n_b))


class Similarities(NamedTuple):
    """Positions of A [A] and of B [B] among the tokens, and the cosines of their metrics, [batch, A, B]."""

    a: Tensor
    b: Tensor
    cosine: Tensor


def similarities(s: Signals, n: int) -> Similarities:
    """Every A token against every B token.

    Args:
        s: with metric [batch, N, D].
        n: tokens.
    """
    import torch

    a, b = (torch.tensor(p, dtype=torch.int64, device=s.metric.device) for p in sets(n, s.n_prefix))
    return Similarities(a, b, s.metric[:, a] @ s.metric[:, b].mT)


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much similarity a plan gives away, [batch]: 0 when it is what the reference decides, tiny for a flipped near-tie.

    The largest of: best left-out pair minus worst merged pair; best host minus chosen host; (without a class token) the worst
    inversion of the order by similarity. Infinite for what no tie explains: a prefix or B token out of place or merged, a host that
    is none, A tokens out of order.

    Args:
        s: with metric [batch, N, D].
        step: how many rows stay.
        plan: row numbers.
    """
    import torch

    a, b, scores = similarities(s, step.n_in)
    value, n_left = scores.amax(-1), step.n_kept - s.n_prefix - b.numel()
    keep, src, host = plan.keep[..., 0], plan.src[..., 0], plan.dst[..., 0] - s.n_prefix - n_left
    left = keep[:, s.n_prefix : s.n_prefix + n_left]
    fixed = torch.cat([keep[:, : s.n_prefix], keep[:, s.n_prefix + n_left :]], 1)
    in_place = (fixed == torch.cat([torch.arange(s.n_prefix, device=b.device), b])).all(1)
    in_a = torch.isin(torch.cat([left, src], 1), a).all(1) & (host >= 0).all(1)
    if s.has_class and n_left > 1:
        in_place &= (left[:, 1:] > left[:, :-1]).all(1)
    rank = torch.zeros(step.n_in, dtype=torch.int64, device=a.device)
    rank[a] = torch.arange(a.numel(), device=a.device)
    merged = value.gather(1, rank[src])
    rows = scores.gather(1, rank[src][..., None].expand(-1, -1, b.numel()))
    chosen = rows.gather(2, host.clamp(min=0)[..., None])[..., 0]
    worst = (merged - chosen).amax(1)
    if n_left:
        kept = value.gather(1, rank[left])
        worst = torch.maximum(worst, kept.amax(1) - merged.amin(1))
        if not s.has_class and n_left > 1:
            worst = torch.maximum(worst, (kept[:, 1:] - kept[:, :-1]).amax(1))
    return torch.where(in_place & in_a, worst.clamp(min=0), torch.inf)


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan of pairs is; 0 where the plan departs from the scores.

    Args:
        s: with metric [batch, N, D].
        step: how many rows stay.
        plan: row numbers.
    """
    import torch

    free = nothing_decided(s, step).fate
    if step.n_in == 1:
        return RowMargins(free, free)
    a, b, scores = similarities(s, step.n_in)
    n_left = step.n_kept - s.n_prefix - len(b)
    left, src = plan.keep[:, s.n_prefix : s.n_prefix + n_left, 0], plan.src[..., 0]
    host = (plan.dst[..., 0] - s.n_prefix - n_left).clamp(min=0)
    place = torch.zeros(step.n_in, dtype=torch.int64, device=a.device)
    place[a] = torch.arange(len(a), device=a.device)
    best = scores.amax(-1)
    kept, merged = best.gather(1, place[left]), best.gather(1, place[src])
    rows = scores.gather(1, place[src][..., None].expand(-1, -1, len(b)))
    hosts = free.scatter(1, src, lead(rows, host))
    if not n_left:
        return RowMargins(free, hosts)
    fate = free.scatter(1, src, merged - kept.amax(1, keepdim=True))
    own = merged.amin(1, keepdim=True) - kept
    if not s.has_class and n_left > 1:
        gaps = kept[:, :-1] - kept[:, 1:]
        far = torch.full_like(gaps[:, :1], torch.inf)
        own = torch.minimum(own, torch.minimum(torch.cat([far, gaps], 1), torch.cat([gaps, far], 1)))
    return RowMargins(fate.scatter(1, left, own).clamp(min=0), hosts)
