"""ToMe: bipartite soft matching of keys (Bolya et al. 2023, Token Merging: Your ViT But Faster, section 3 and appendix D).

Even positions of the sequence are A, odd positions B. Every A token finds its most similar B token; the r most similar pairs merge.
Prefix tokens neither merge nor receive. New order: prefix, A tokens left in ascending position (without a class token: in
descending similarity, as the authors leave them), B tokens. Of equal similarities, the lower position merges first and the lower
position receives.
"""

from __future__ import annotations

import torch

from ...kernels import ops
from ..plan import MergePlan, Signals, column, fixed_shape
from ..schedule import Step

NEEDS = ("metric",)


def sets(n: int, n_prefix: int) -> tuple[list[int], list[int]]:
    """Positions of A (may merge) and B (may receive) among n tokens, prefix tokens left out."""
    return [p for p in range(0, n, 2) if p >= n_prefix], [p for p in range(1, n, 2) if p >= n_prefix]


def labels(step: Step, n_prefix: int) -> tuple[int, ...]:
    """The label of every output row in a static plan: B rows carry their place in B, the rows before them count down from -1."""
    n_b = len(sets(step.n_in, n_prefix)[1])
    return (*range(-1, n_b - step.n_kept - 1, -1), *range(n_b))


def _scores(s: Signals, n: int):
    a, b = sets(n, s.n_prefix)
    at = lambda p: torch.tensor(p, device=s.metric.device)
    return at(a), at(b), s.metric[:, at(a)] @ s.metric[:, at(b)].mT


def reference(s: Signals, step: Step) -> MergePlan:
    """The paper's decisions with argsort, on a batch: metric [B, N, D] -> row numbers."""
    batch, r = s.x.shape[0], step.n_in - step.n_kept
    a, b, scores = _scores(s, step.n_in)
    value, host = scores.max(-1)
    order = value.sort(dim=-1, descending=True, stable=True).indices
    left = order[:, r:]
    if s.has_class:
        left = left.sort(-1).values
    prefix = torch.arange(s.n_prefix, device=s.x.device).expand(batch, -1)
    keep = torch.cat([prefix, a[left], b.expand(batch, -1)], 1)
    dst = s.n_prefix + left.shape[1] + host.gather(1, order[:, :r])
    return MergePlan(keep[..., None], a[order[:, :r]][..., None], dst[..., None])


def regret(s: Signals, step: Step, plan: MergePlan) -> torch.Tensor:
    """How much similarity the plan gives away, [B]: 0 when it is what `reference` decides, tiny for a flipped near-tie.

    The largest of: best left-out pair minus worst merged pair; best host minus chosen host; (without a class token) the worst
    inversion of the order by similarity. Infinite for what no tie explains: a prefix or B token out of place or merged, a host that
    is none, A tokens out of order.
    """
    a, b, scores = _scores(s, step.n_in)
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
    chosen = scores.gather(1, rank[src][..., None].expand(-1, -1, b.numel())).gather(2, host.clamp(min=0)[..., None])[..., 0]
    worst = (merged - chosen).amax(1)
    if n_left:
        kept = value.gather(1, rank[left])
        worst = torch.maximum(worst, kept.amax(1) - merged.amin(1))
        if not s.has_class and n_left > 1:
            worst = torch.maximum(worst, (kept[:, 1:] - kept[:, :-1]).amax(1))
    return torch.where(in_place & in_a, worst.clamp(min=0), torch.inf)


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with TopK and one scatter of an index column; metric [.., N, D].

    by_target: give `target` too (for the matmul form); what is not used leaves the graph.
    A row's key sorts it into the new order: prefix, A and B by position; the merged rows, overwritten, come last.
    """
    n, n_kept, p = step.n_in, step.n_kept, s.n_prefix
    a, b = sets(n, p)
    a_rows = set(a)
    barred = column([0.0 if i in a_rows else -8.0 for i in range(n)], s.metric)
    hosts = ops.fixed_rows(s.metric, b)
    if s.metric.ndim == 2:  # one Gemm takes the bar along
        value, host = ops.best_column(ops.addmm(s.metric, hosts, barred, False, True))
    else:
        value, host = ops.best_column(ops.matmul(s.metric, hosts, False, True))
        value = value + barred
    top, src = ops.top_rows(value, n - n_kept, True)
    if s.has_class:  # all keys are at least 10, above any similarity: written into place, those sort merged rows last
        key = [4.0 * n + 10 - i if i in a_rows else 8.0 * n + 10 - i if i < p else 2.0 * n + 10 - i for i in range(n)]
        base, merged = _like(value, key, torch.maximum), top
    else:  # A rows keep their similarity as the key
        key = [4.0 if i in a_rows else -10.0 - i for i in range(n)]
        base, merged = torch.minimum(value, column(key, value)), _like(top, [-4.0 * n - 40] * (n - n_kept), torch.minimum)
        if p:  # registers come first
            base = torch.maximum(base, column([n + 10.0 - i if i < p else -8.0 * n for i in range(n)], value))
    keep = ops.top_rows(ops.put_rows(base, src, merged), n_kept, True)[1]
    names, target = labels(step, p), None
    if by_target:  # a label is never above the row it names
        target = ops.put_rows(host, keep, _like(keep, names, torch.minimum))
    return MergePlan(keep, src, ops.take_rows(host, src), names, target)


def _like(x, values, bound):
    """A constant column in the shape of x [.., K, 1]: itself, or for a dynamic batch bound(x, constant), which x never wins."""
    return column(values, x, full=True) if fixed_shape(x) else bound(x, column(values, x))
