"""Bipartite matching, ToMe's way of pairing tokens: who may merge with whom, and how much given pairs give away."""

from __future__ import annotations

import torch

from ..plan import MergePlan, Signals
from ..schedule import Step


def sets(n: int, n_prefix: int) -> tuple[list[int], list[int]]:
    """Positions of A (may merge) and B (may receive) among n tokens, prefix tokens left out."""
    return [p for p in range(0, n, 2) if p >= n_prefix], [p for p in range(1, n, 2) if p >= n_prefix]


def labels(step: Step, n_prefix: int) -> tuple[int, ...]:
    """The label of every output row in a static plan: B rows carry their place in B, the rows before them count down from -1."""
    n_b = len(sets(step.n_in, n_prefix)[1])
    return (*range(-1, n_b - step.n_kept - 1, -1), *range(n_b))


def similarities(s: Signals, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of A and of B, and the cosines of their metrics [B, A, B]."""
    a, b = sets(n, s.n_prefix)
    at = lambda p: torch.tensor(p, device=s.metric.device)
    return at(a), at(b), s.metric[:, at(a)] @ s.metric[:, at(b)].mT


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much similarity the plan gives away, [B]: 0 when it is what `reference` decides, tiny for a flipped near-tie.

    The largest of: best left-out pair minus worst merged pair; best host minus chosen host; (without a class token) the worst
    inversion of the order by similarity. Infinite for what no tie explains: a prefix or B token out of place or merged, a host that
    is none, A tokens out of order.
    """
    a, b, scores = similarities(s, step.n_in)
    value, n_left = scores.amax(-1), step.n_kept - s.n_prefix - b.numel()
    keep, src, host = plan.keep[..., 0], plan.src[..., 0], plan.dst[..., 0] - s.n_prefix - n_left
    left = keep[:, s.n_prefix : s.n_prefix + n_left]
    fixed = torch.cat([keep[:, : s.n_prefix], keep[:, s.n_prefix + n_left :]], 1)
    in_place = (fixed == torch.cat([torch.arange(s.n_prefix), b])).all(1)
    in_a = torch.isin(torch.cat([left, src], 1), a).all(1) & (host >= 0).all(1)
    if s.has_class and n_left > 1:
        in_place &= (left[:, 1:] > left[:, :-1]).all(1)
    rank = torch.zeros(step.n_in, dtype=torch.int64)
    rank[a] = torch.arange(a.numel())
    merged = value.gather(1, rank[src])
    chosen = scores.gather(1, rank[src][..., None].expand(-1, -1, b.numel())).gather(2, host.clamp(min=0)[..., None])[
        ..., 0
    ]
    worst = (merged - chosen).amax(1)
    if n_left:
        kept = value.gather(1, rank[left])
        worst = torch.maximum(worst, kept.amax(1) - merged.amin(1))
        if not s.has_class and n_left > 1:
            worst = torch.maximum(worst, (kept[:, 1:] - kept[:, :-1]).amax(1))
    return torch.where(in_place & in_a, worst.clamp(min=0), torch.inf)
