"""ToMe: bipartite soft matching of keys (Bolya et al. 2023, Token Merging: Your ViT But Faster, section 3 and appendix D).

Even positions of the sequence are A, odd positions B. Every A token finds its most similar B token; the r most similar pairs merge.
Prefix tokens neither merge nor receive. New order: prefix, A tokens left in ascending position (without a class token: in
descending similarity, as the authors leave them), B tokens. Of equal similarities, the lower position merges first and the lower
position receives. Six tokens are worked through on top of `plan.py`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from ..constants import bounded, column, constant, row
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import matching, options
from .base import Counts, Reducer
from .merging import merge_counts


def steps(asked: dict, size: ModelSize) -> Counts:
    """ToMe's counts from its options.

    Args:
        asked: r, at, align, prop_attn, pool.
        size: of the model.
    """
    make = lambda block, n, out: Step(block, "post_attn", n, out, out, signal="keys")
    return Counts(*merge_counts(asked, size, make=make), prop_attn=asked["prop_attn"], pool=asked["pool"])


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions with argsort.

    Args:
        s: a batch, with metric [B, N, D].
        step: N - r rows stay.
        given: decisions to keep instead.
    """
    import torch

    if given:
        return replace(given, combine="size")
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
    return MergePlan(keep[..., None], a[order[:, :r]][..., None], dst[..., None], combine="size")


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with TopK and one scatter of an index column.

    A row's key sorts it into the new order: prefix above A above B, each by position; merged rows, overwritten, come last. In the
    example of `plan.py` (N = 6) the keys are 8N + 10 - 0 = 58 for the class token, 4N + 10 - i = 32 and 30 for A at 2 and 4,
    2N + 10 - i = 21, 19, 17 for B at 1, 3, 5. Position 2 merges: its key becomes its similarity, 0.9. The five largest keys,
    58 30 21 19 17, stand at 0 4 1 3 5, which is the new order.

    Args:
        s: with metric [.., N, D].
        step: N - r rows stay.
    Returns:
        A plan whose layout names the best host of every row.
    """
    import torch

    from ...kernels import ops

    n, n_kept = step.n_in, step.n_kept
    a, b = matching.sets(n, s.n_prefix)
    barred = column([0.0 if i in set(a) else -8.0 for i in range(n)], s.metric)
    hosts = ops.fixed_rows(s.metric, b)
    if s.metric.ndim == 2:  # one Gemm takes the bar along
        value, host = ops.best_column(ops.addmm(s.metric, hosts, barred, False, True))
    else:
        value, host = ops.best_column(ops.matmul(s.metric, hosts, False, True))
        value = value + barred
    top, src = ops.top_rows(value, n - n_kept, True)
    if s.many and n - n_kept < len(a):
        keep = (_kept_by_position if s.has_class else _kept_by_similarity)(s, value, src)
    else:
        base, merged = (_keys_by_position if s.has_class else _keys_by_similarity)(s, value, top, torch)
        keep = ops.top_rows(ops.put_rows(base, src, merged), n_kept, True)[1]
    layout = StaticLayout(labels=matching.labels(step, s.n_prefix), hosts=host)
    return MergePlan(keep, src, combine="size", layout=layout)


def _keys_by_position(s, value, top, torch):
    """Keys of all rows, and those that the merged rows get instead: all are at least 10, above any similarity."""
    n, a = value.shape[-2], set(matching.sets(value.shape[-2], s.n_prefix)[0])
    key = [4.0 * n + 10 - i if i in a else 8.0 * n + 10 - i if i < s.n_prefix else 2.0 * n + 10 - i for i in range(n)]
    return bounded(key, value, torch.maximum, any_batch=s.any_batch), top


def _keys_by_similarity(s, value, top, torch):
    """The same where A rows keep their similarity as the key: it is at most 1, below their bound of 4."""
    n, p = value.shape[-2], s.n_prefix
    a = set(matching.sets(n, p)[0])
    key = column([4.0 if i in a else -10.0 - i for i in range(n)], value)
    base = torch.minimum(value, key)
    last = bounded([-4.0 * n - 40] * top.shape[-2], top, torch.minimum, any_batch=s.any_batch)
    if p:  # registers come first
        base = torch.maximum(base, column([n + 10.0 - i if i < p else -8.0 * n for i in range(n)], value))
    return base, last


def _kept_by_position(s, value, src):
    """Kept rows of which only the merged ones, few, were sorted: the t-th of them is as many places on as merged rows come before it.

    With rows 0 2 4 1 3 5 in the new order and row 2 merged, at place 1: place 1 - 0 <= t holds for t = 1, 2, 3, 4, so the kept rows
    are those at places 0 2 3 4 5, which are 0 4 1 3 5.
    """
    from ...kernels import ops

    n, r = value.shape[-2], src.shape[-2]
    order = [*range(s.n_prefix), *chain(*matching.sets(n, s.n_prefix))]
    places = ops.floats([float(order.index(i)) for i in range(n)], [n, 1])
    gone = ops.top_rows(ops.look_up(places, src), r, False)[0]
    before = gone - column([float(j) for j in range(r)], gone) < row([t + 0.5 for t in range(n - r)], gone)
    kept = column([float(t) for t in range(n - r)], gone)
    place = ops.addmm(ops.to_float(before), ops.floats([1.0] * r, [r, 1]), kept, True, False)
    return ops.look_up(ops.ints(order, [n, 1]), place.to(src.dtype))


def _kept_by_similarity(s, value, src):
    """Kept rows of which only those of A were sorted."""
    import torch

    from ...kernels import ops

    n, r = value.shape[-2], src.shape[-2]
    a, b = matching.sets(n, s.n_prefix)
    by_value = ops.top_rows(ops.fixed_rows(value, a), len(a), True)[1]
    left = ops.look_up(ops.ints(a, [len(a), 1]), ops.fixed_rows(by_value, list(range(r, len(a)))))
    parts = [constant(rows, src, any_batch=s.any_batch) for rows in (list(range(s.n_prefix)), b) if rows]
    return torch.cat([*parts[:-1], left, parts[-1]], -2)


REDUCER = Reducer(
    "tome",
    "ToMe",
    "the most similar pairs of tokens merge in every block (Bolya et al. 2023)",
    steps,
    options=(options.R, options.EVERY, options.ALIGN, options.PROP_ATTN, options.POOL),
    signals=("keys",),
    reference=reference,
    static=static,
    regret=matching.regret,
    margins=matching.margins,
    labels=matching.labels,
    node={"select": "pairs", "fold": "size_mean"},
)
