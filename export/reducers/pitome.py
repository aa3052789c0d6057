"""PiToMe: tokens in crowds merge, tokens that stand alone are protected (Tran et al. 2024, Accelerating Transformers with
Spectrum-Preserving Token Merging).

Keys are compared as in ToMe, prefix tokens left out. The energy of a token is the mean over all tokens of ELU(cosine - margin), with
a margin that falls from block to block: high energy means many tokens alike. Tokens are ranked by falling energy; even ranks are A,
odd ranks B. In the first form all take part: every A token takes its best B token, the r best pairs merge. In the second only the
2r highest ranks do, and all their A tokens merge. New order: prefix, what is left (first form: A by falling similarity; second: ranks
from 2r on), B by rank. Tokens are means by size; attention is not proportional to it. Of equal energies the lower position ranks first.

Almost any two tokens of a photo may rank closer than rounding tells: flipped near-ties are the rule, and each is judged. Energies span
little, so what an order gives away in them is told as a share of their range in the image.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..constants import column, lift
from ..errors import UsageError
from ..margins import RowMargins, lead, nothing_decided
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import options
from .base import Counts, Option, Reducer
from .merging import rounded

if TYPE_CHECKING:
    from torch import Tensor

ALL_RANKS, TOP_RANKS = "all ranks", "top ranks"  # the first and the second form


def steps(asked: dict, size: ModelSize) -> Counts:
    """PiToMe's counts from its options: of T tokens that are no prefix, floor(T - T * keep_rate) merge, computed in float64 as written.

    Args:
        asked: keep_rate (one, or one for each block of `at`), at, align, forms (blocks of the first form), margin, pool.
        size: of the model.
    """
    rates, n = options.parse_rates(asked["keep_rate"], len(asked["at"])), size.n_tokens
    made, cut, (start, slope) = [], [], asked["margin"]
    for rate, block in zip(rates, asked["at"], strict=True):
        total, first = n - size.n_prefix, block in asked["forms"]
        wish, most = math.floor(total - total * rate), (total + 1) // 2 if first and total > 1 else total // 2
        if wish > most:
            cut.append(f"{block} ({wish} to {most})")
        out = rounded(n - min(wish, most), n, least=n - most, multiple=asked["align"]) if wish else n
        if out < n:
            form = ALL_RANKS if first else TOP_RANKS
            settings = {"form": form, "margin": start - slope * block / size.depth}
            made.append(Step(block, "post_attn", n, out, out, signal="keys", settings=settings))
            n = out
    notes = [f"what merges was cut to half of the tokens in block {', '.join(cut)}"] if cut else []
    if asked["align"] > 1:
        notes.append(
            f"tokens after each step are multiples of {asked['align']}: {', '.join(str(s.n_out) for s in made)}"
        )
    return Counts({**asked, "keep_rate": rates}, made, notes, pool=asked["pool"])


class Sets(NamedTuple):
    """Numbers of rows in the new order, prefix tokens left out: what is left, B, and the A rows that merge."""

    left: int
    b: int
    merged: int


def sets(step: Step, n_prefix: int) -> Sets:
    """How many rows are what.

    Args:
        step: N - r rows stay.
        n_prefix: prefix tokens at the head of the sequence.
    """
    r = step.n_in - step.n_kept
    b = (step.n_in - n_prefix) // 2 if step.settings["form"] == ALL_RANKS else r
    return Sets(step.n_kept - n_prefix - b, b, r)


def labels(step: Step, n_prefix: int) -> tuple[int, ...]:
    """The name of every output row in a static plan: B rows carry their place in B, the rows before them count down from -1.

    Args:
        step: N - r rows stay.
        n_prefix: prefix tokens at the head of the sequence.
    """
    b = sets(step, n_prefix).b
    return (*range(-1, b - step.n_kept - 1, -1), *range(b))


def energies(s: Signals, step: Step) -> tuple[Tensor, Tensor]:
    """Energies [B, T] and cosines [B, T, T] of the tokens that are no prefix.

    Args:
        s: a batch, with metric [B, N, D].
        step: with the margin.
    """
    from torch.nn.functional import elu

    unit = s.metric[:, s.n_prefix :]
    cosine = unit @ unit.mT
    return elu(cosine - step.settings["margin"]).mean(-1), cosine


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions with sorts.

    Args:
        s: a batch, with metric [B, N, D].
        step: N - r rows stay.
        given: decisions to keep instead.
    """
    import torch

    if given:
        return replace(given, combine="size")
    (energy, cosine), (n_left, _, r), p = energies(s, step), sets(step, s.n_prefix), s.n_prefix
    order = energy.sort(dim=-1, descending=True, stable=True).indices
    ranked = order if step.settings["form"] == ALL_RANKS else order[:, : 2 * r]
    a, b = ranked[:, ::2], ranked[:, 1::2]
    value, host = _between(cosine, a, b).max(-1)
    if step.settings["form"] == ALL_RANKS:
        by_value = value.sort(dim=-1, descending=True, stable=True).indices
        merged, left = by_value[:, :r], a.gather(1, by_value[:, r:])
        src, dst = a.gather(1, merged), host.gather(1, merged)
    else:
        left, src, dst = order[:, 2 * r :], a, host
    prefix = torch.arange(p, device=order.device).expand(len(order), -1)
    keep = torch.cat([prefix, left + p, b + p], 1)
    return MergePlan(keep[..., None], (src + p)[..., None], (dst + p + n_left)[..., None], combine="size")


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with fixed shapes: one TopK over all energies, and in the first form one over the A tokens' similarities.

    Args:
        s: with metric [.., N, D].
        step: N - r rows stay.
    """
    import torch
    from torch.nn.functional import elu

    from ...kernels import ops

    n, p, (n_left, n_b, r) = step.n_in, s.n_prefix, sets(step, s.n_prefix)
    patches = ops.fixed_rows(s.metric, list(range(p, n))) if p else s.metric
    bonds = elu(ops.matmul(s.metric, patches, False, True) - step.settings["margin"])
    # The mean as a product: OpenVINO 2026.4 fuses ReduceMean and the Add behind it wrongly for a batch of more than one image.
    share = ops.floats([1 / (n - p)] * (n - p), [n - p, 1])
    if p:
        energy = ops.addmm(bonds, share, column(lift(n, p), bonds), False, False)
    else:
        energy = ops.matmul(bonds, share, False, False)
    order = ops.top_rows(energy, n, True)[1]
    first = step.settings["form"] == ALL_RANKS
    end = n if first else p + 2 * r
    ranks = [*range(p), *range(end, n), *range(p + 1, end, 2), *range(p, end, 2)]  # prefix, protected, B, A
    head, pairs = _cut(ops.fixed_rows(order, ranks), p + n - end, end - p)
    metric_b, metric_a = _cut(ops.take_rows(s.metric, pairs), n_b, end - p - n_b)
    value, host = ops.best_column(ops.matmul(metric_a, metric_b, False, True))
    if first:
        b, a = _cut(pairs, n_b, end - p - n_b)
        by_value = ops.top_rows(value, r + n_left, True)[1]
        src, left = _cut(ops.take_rows(a, by_value), r, n_left)
        host = ops.take_rows(host, _cut(by_value, r, n_left)[0])
        parts = [head, left, b, src]
    else:
        parts = [head, pairs]
    rows = torch.cat([part for part in parts if part is not None], -2)
    keep, src = rows.split([step.n_kept, r], -2)
    return MergePlan(keep, src, host, combine="size", layout=StaticLayout(rows, labels(step, p)))


def _cut(rows: Tensor, first: int, second: int) -> list[Tensor | None]:
    """Rows in two parts; None for an empty one, since no graph has a tensor without rows."""
    if not first or not second:
        return [rows if first else None, rows if second else None]
    return list(rows.split([first, second], -2))


def _between(cosine: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Cosines [B, R, K] of some rows [B, R] and columns [B, K]."""
    picked = cosine.gather(1, rows[..., None].expand(-1, -1, cosine.shape[-1]))
    return picked.gather(2, columns[:, None].expand(-1, rows.shape[1], -1))


class _Judged(NamedTuple):
    """A plan in the terms of its decisions; rows are numbered behind the prefix."""

    energy: Tensor  # as a share of its range, [B, T]
    left: Tensor
    b: Tensor
    src: Tensor
    host: Tensor
    left_scores: Tensor  # cosines with B
    src_scores: Tensor


def _judged(s: Signals, step: Step, plan: MergePlan) -> _Judged:
    (energy, cosine), (n_left, n_b, _), p = energies(s, step), sets(step, s.n_prefix), s.n_prefix
    energy = energy / (energy.amax(1, keepdim=True) - energy.amin(1, keepdim=True)).clamp(min=1e-30)
    keep, src = (column[..., 0] - p for column in (plan.keep, plan.src))
    left, b = (rows.clamp(min=0) for rows in keep[:, p:].split([n_left, n_b], 1))
    src, host = src.clamp(min=0), (plan.dst[..., 0] - p - n_left).clamp(min=0)
    return _Judged(
        energy,
        left,
        b=b,
        src=src,
        host=host,
        left_scores=_between(cosine, left, b),
        src_scores=_between(cosine, src, b),
    )


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the energies' range by its ranks, or of a cosine by pairs and hosts.

    Infinite for what no tie explains: a prefix token out of place or merged, a host that is none.

    Args:
        s: a batch, with metric [B, N, D].
        step: N - r rows stay.
        plan: row numbers.
    """
    import torch

    p, j = s.n_prefix, _judged(s, step, plan)
    of = lambda rows: j.energy.gather(1, rows)
    first = step.settings["form"] == ALL_RANKS
    a, b = of(torch.cat([j.left, j.src], 1) if first else j.src).sort(1, descending=True).values, of(j.b)
    k = min(b.shape[1], a.shape[1] - 1)
    given = [b - a[:, : b.shape[1]], a[:, 1 : k + 1] - b[:, :k], _inversions(b)]  # ranks run A, B, A, B, ...
    chosen = j.src_scores.gather(2, j.host[..., None])[..., 0]
    given.append(j.src_scores.amax(2) - chosen)
    if j.left.shape[1]:
        order = j.left_scores.amax(2) if first else of(j.left)
        lowest = j.src_scores.amax(2) if first else torch.cat([a, b], 1)
        given += [_inversions(order), order.amax(1, keepdim=True) - lowest.amin(1, keepdim=True)]
    worst = torch.cat([g.amax(1, keepdim=True) for g in given if g.shape[1]], 1).amax(1).clamp(min=0)
    keep, src = plan.keep[..., 0], plan.src[..., 0]
    in_place = (
        (keep[:, :p] == torch.arange(p, device=keep.device)).all(1) & (keep[:, p:] >= p).all(1) & (src >= p).all(1)
    )
    return torch.where(in_place & (plan.dst[..., 0] >= step.n_kept - j.b.shape[1]).all(1), worst, torch.inf)


def _inversions(values: Tensor) -> Tensor:
    """How far each value is above the one before it."""
    return values[:, 1:] - values[:, :-1]


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is: its rank by energy, whether it merges, its host; 0 where the plan departs from the scores.

    Args:
        s: a batch, with metric [B, N, D].
        step: N - r rows stay.
        plan: row numbers.
    """
    import torch

    p, j, free = s.n_prefix, _judged(s, step, plan), nothing_decided(s, step).fate
    value, order = j.energy.sort(dim=1, descending=True, stable=True)
    gaps = value[:, :-1] - value[:, 1:]
    far = torch.full_like(value[:, :1], torch.inf)
    gaps = torch.minimum(torch.cat([far, gaps], 1), torch.cat([gaps, far], 1))
    fate = free.scatter(1, order + p, gaps)
    if step.settings["form"] == ALL_RANKS and j.left.shape[1]:
        merged, left = j.src_scores.amax(2), j.left_scores.amax(2)
        sides = [-_inversions(left), torch.full_like(left[:, :1], torch.inf)]
        place = torch.minimum(torch.cat(sides, 1), torch.cat(sides[::-1], 1))
        own = torch.minimum(merged.amin(1, keepdim=True) - left, place)
        for rows, lead_of in ((j.left, own), (j.src, merged - left.amax(1, keepdim=True))):
            fate = fate.scatter(1, rows + p, torch.minimum(fate.gather(1, rows + p), lead_of))
    hosts = free.scatter(1, j.src + p, lead(j.src_scores, j.host))
    return RowMargins(fate.clamp(min=0), hosts)


def parse_margin(value: str | float | tuple | list) -> list[float]:
    """The margin of block 0 and how far it falls to the last block's end: "0.75" or 0.75 falls to 0, "0.75:0.4" by 0.4.

    Raises: UsageError for anything else.
    """
    parts = value.split(":") if isinstance(value, str) else list(value) if isinstance(value, (tuple, list)) else [value]
    texts = [str(v).strip() for v in parts]
    if not 1 <= len(texts) <= 2 or not all(re.fullmatch(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)", t) for t in texts):
        raise UsageError(
            f"margin {options.short(value)}: wanted a number such as 0.75, or two, 0.75:0.4 (margin:slope)"
        )
    numbers = [float(t) for t in texts] * (2 if len(texts) == 1 else 1)
    if not all(-2 <= v <= 2 for v in numbers):
        raise UsageError(f"margin {options.short(value)}: wanted numbers of at most 2: it is compared with cosines")
    return numbers


def parse_forms(value: str | list | tuple, depth: int) -> list[int]:
    """The blocks of the first form: "first" or "last" half of them, "all", "none", or a list.

    Args:
        value: as typed, or block numbers.
        depth: number of blocks.
    Raises:
        UsageError: it is none of these.
    """
    half = -(-depth // 2)
    words = {"first": range(half), "last": range(half, depth), "all": range(depth), "none": range(0)}
    if isinstance(value, str) and value in words:
        return list(words[value])
    if isinstance(value, (list, tuple)) and not value:
        return []
    try:
        return options.parse_at(value, depth)
    except UsageError as e:
        raise UsageError(f"forms{str(e).removeprefix('at')}, or first, last, all, none") from None


FORMS = Option(
    "forms",
    "the blocks with the first form, where all tokens are paired: first or last (half of them), all, none, or a list",
    default="first",
    metavar="BLOCKS",
    parse=lambda value, size: parse_forms(value, size.depth),
)
MARGIN = Option(
    "margin",
    "of cosines, and how far it falls over the blocks: 0.75 falls to 0, 0.75:0.4 by 0.4",
    default="0.75",
    metavar="M[:SLOPE]",
    parse=lambda value, size: parse_margin(value),
)
RATE = replace(options.KEEP_RATE, help="share of tokens that each block keeps, or a list, one a block", default=0.9125)
REDUCER = Reducer(
    "pitome",
    "PiToMe",
    "tokens in crowds merge, tokens that stand alone are protected (Tran et al. 2024)",
    steps,
    options=(RATE, options.EVERY, options.ALIGN, FORMS, MARGIN, options.POOL),
    signals=("keys",),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
    labels=labels,
)
