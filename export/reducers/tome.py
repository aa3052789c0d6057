"""ToMe: bipartite soft matching of keys (Bolya et al. 2023, Token Merging: Your ViT But Faster, section 3 and appendix D).

Even positions of the sequence are A, odd positions B. Every A token finds its most similar B token; the r most similar pairs merge.
Prefix tokens neither merge nor receive. New order: prefix, A tokens left in ascending position (without a class token: in
descending similarity, as the authors leave them), B tokens. Of equal similarities, the lower position merges first and the lower
position receives.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ...kernels import ops
from .. import counts
from ..plan import MergePlan, Signals, column
from ..schedule import Step
from . import matching

NEEDS = ("metric",)
labels, regret = matching.labels, matching.regret
OPTIONS = {"r": None, "prop_attn": True, "pool": "auto"}


def steps(options: dict, n_tokens: int, n_prefix: int, depth: int) -> tuple:
    """Options as they are kept, steps and notes; see `counts.parse_r`, `counts.tome`."""
    values = counts.parse_r(options["r"], depth)
    return ({**options, "r": values}, *counts.tome(values, n_tokens, n_prefix))


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions (or the given ones) with argsort, on a batch: metric [B, N, D] -> row numbers."""
    if given:
        return replace(given, by_size=True)
    batch, r = s.x.shape[0], step.n_in - step.n_kept
    a, b, scores = matching.similarities(s, step.n_in)
    value, host = scores.max(-1)
    order = value.sort(dim=-1, descending=True, stable=True).indices
    left = order[:, r:]
    if s.has_class:
        left = left.sort(-1).values
    prefix = torch.arange(s.n_prefix, device=s.x.device).expand(batch, -1)
    keep = torch.cat([prefix, a[left], b.expand(batch, -1)], 1)
    dst = s.n_prefix + left.shape[1] + host.gather(1, order[:, :r])
    return MergePlan(keep[..., None], a[order[:, :r]][..., None], dst[..., None], by_size=True)


def static(s: Signals, step: Step, by_target: bool) -> MergePlan:
    """The same decisions with TopK and one scatter of an index column; metric [.., N, D].

    by_target: give `target` too (for the matmul form); what is not used leaves the graph.
    A row's key sorts it into the new order: prefix, A and B by position; the merged rows, overwritten, come last.
    """
    n, n_kept, p = step.n_in, step.n_kept, s.n_prefix
    a, b = matching.sets(n, p)
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
        base, merged = _like(s, value, key, torch.maximum), top
    else:  # A rows keep their similarity as the key
        key = [4.0 if i in a_rows else -10.0 - i for i in range(n)]
        base, merged = (
            torch.minimum(value, column(key, value)),
            _like(s, top, [-4.0 * n - 40] * (n - n_kept), torch.minimum),
        )
        if p:  # registers come first
            base = torch.maximum(base, column([n + 10.0 - i if i < p else -8.0 * n for i in range(n)], value))
    keep = ops.top_rows(ops.put_rows(base, src, merged), n_kept, True)[1]
    names, target = matching.labels(step, p), None
    if by_target:  # a label is never above the row it names
        target = ops.put_rows(host, keep, _like(s, keep, names, torch.minimum))
    return MergePlan(keep, src, ops.take_rows(host, src), by_size=True, labels=names, target=target)


def _like(s, x, values, bound):
    """A constant column in the shape of x [.., K, 1]: itself, or for any batch bound(x, constant), which x never wins."""
    return bound(x, column(values, x)) if s.any_batch else column(values, x, full=True)
