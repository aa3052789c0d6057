"""What the methods that sort tokens by a score share: the order, hosts among the kept tokens, and how much an order gives away."""

from __future__ import annotations

import torch

from ...kernels import ops
from ..plan import MergePlan, Signals, row
from ..schedule import Step


def sort(s: Signals, step: Step) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that stay and rows that are folded, [B, K, 1] and [B, R, 1] (None for none), both in descending score order."""
    order = s.score.sort(dim=1, descending=True, stable=True).indices
    return order[:, : step.n_kept], order[:, step.n_kept : step.n_kept + step.n_folded] if step.n_folded else None


def top(s: Signals, step: Step) -> dict:
    """The same as fields of a static plan, by one TopK; "value" has the folded rows' scores [.., R, 1]."""
    value, order = ops.top_rows(s.score, step.n_kept + step.n_folded, True)
    if not step.n_folded:
        return {"order": order, "keep": order, "src": None, "value": None}
    keep, src = order.split([step.n_kept, step.n_folded], -2)
    return {"order": order, "keep": keep, "src": src, "value": value.split([step.n_kept, step.n_folded], -2)[1]}


def cosines(s: Signals, keep: torch.Tensor, src: torch.Tensor, eps: float) -> torch.Tensor:
    """Cosine of folded and kept tokens [B, R, K], each divided by its norm + eps; prefix tokens are no hosts: -inf."""
    unit = s.x / (s.x.norm(dim=-1, keepdim=True) + eps)
    rows = lambda index: unit.gather(1, index.expand(-1, -1, unit.shape[-1]))
    cosine = rows(src) @ rows(keep).mT
    cosine[..., : s.n_prefix] = -torch.inf
    return cosine


def hosts(
    s: Signals, step: Step, order: torch.Tensor, eps: float, shift: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best cosine plus shift [.., R, 1] of every folded row, and its host's row number [.., R, 1], in a static graph."""
    x = ops.take_rows(s.x, order)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    kept, folded = (x / (norm + eps if eps else norm)).split([step.n_kept, step.n_folded], -2)
    barred = row([shift - 8.0] * s.n_prefix + [shift] * (step.n_kept - s.n_prefix), x)
    return ops.best_column(ops.addmm(folded, kept, barred, False, True))


def regret(
    s: Signals, step: Step, plan: MergePlan, cosine: torch.Tensor | None = None, log: bool = True
) -> torch.Tensor:
    """How much the plan's order and hosts give away, [B]; infinite for a prefix token out of place or an impossible host.

    The largest of: inversions of the order among kept rows, kept below folded, folded below dropped, each as a difference of
    scores (of their logarithms with log); best host's cosine minus the chosen one's.
    """
    score, n = s.score[..., 0], step.n_in
    score = score.clamp(min=1e-30).log() if log else score
    parts = [plan.keep[..., 0]] + ([] if plan.src is None else [plan.src[..., 0]])
    used = torch.zeros(len(score), n, dtype=torch.bool).scatter_(1, torch.cat(parts, 1), True)
    kept = score.gather(1, parts[0])
    worst = (kept[:, 1:] - kept[:, :-1]).clamp(min=0).amax(1) if kept.shape[1] > 1 else score.new_zeros(len(score))
    low = kept.amin(1)
    if plan.src is not None:
        folded = score.gather(1, parts[1])
        worst = torch.maximum(worst, folded.amax(1) - low)
        low = torch.minimum(low, folded.amin(1))
    if step.n_kept + step.n_folded < n:
        worst = torch.maximum(worst, score.masked_fill(used, -torch.inf).amax(1) - low)
    if cosine is not None:
        chosen = cosine.gather(2, plan.dst.clamp(max=step.n_kept - 1))[..., 0]
        worst = torch.maximum(worst, (cosine.amax(2) - chosen).amax(1))
    in_place = (parts[0][:, : s.n_prefix] == torch.arange(s.n_prefix)).all(1)
    return torch.where(in_place, worst.clamp(min=0), torch.inf)
