"""What the methods that sort tokens by a score share: the order, hosts among the kept tokens, and how much an order gives away."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..constants import row
from ..margins import RowMargins, lead, nothing_decided
from ..plan import MergePlan, Signals
from ..step import Step

if TYPE_CHECKING:
    from torch import Tensor


class Order(NamedTuple):
    """Tokens in descending order of a score, of equal scores the lower position first.

    Args:
        keep: [.., K, 1] rows that stay.
        src: [.., R, 1] rows that are folded; None for none.
        column: [.., K + R, 1] both in one column; None in the reference.
        value: [.., R, 1] scores of the folded rows; None for none, and in the reference.
    """

    keep: Tensor
    src: Tensor | None
    column: Tensor | None = None
    value: Tensor | None = None


def sort(s: Signals, step: Step) -> Order:
    """Rows that stay and rows that are folded, by a sort of the whole batch.

    Args:
        s: with score [B, N, 1].
        step: how many stay and are folded.
    """
    order = s.score.sort(dim=1, descending=True, stable=True).indices
    src = order[:, step.n_kept : step.n_kept + step.n_folded] if step.n_folded else None
    return Order(order[:, : step.n_kept], src)


def top(s: Signals, step: Step) -> Order:
    """The same in a static graph, by one TopK.

    Args:
        s: with score [.., N, 1].
        step: how many stay and are folded.
    """
    from ...kernels import ops

    value, order = ops.top_rows(s.score, step.n_kept + step.n_folded, True)
    if not step.n_folded:
        return Order(order, None, order)
    keep, src = order.split([step.n_kept, step.n_folded], -2)
    return Order(keep, src, order, value.split([step.n_kept, step.n_folded], -2)[1])


def cosines(s: Signals, keep: Tensor, src: Tensor, *, eps: float) -> Tensor:
    """Cosine of folded and kept tokens [B, R, K]; prefix tokens are no hosts: -inf.

    Args:
        s: with x [B, N, C].
        keep: [B, K, 1] rows that stay.
        src: [B, R, 1] rows that are folded.
        eps: added to each norm.
    """
    import torch

    unit = s.x / (s.x.norm(dim=-1, keepdim=True) + eps)
    rows = lambda index: unit.gather(1, index.expand(-1, -1, unit.shape[-1]))
    cosine = rows(src) @ rows(keep).mT
    cosine[..., : s.n_prefix] = -torch.inf
    return cosine


def hosts(s: Signals, step: Step, *, order: Tensor, eps: float, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best host of every folded row, in a static graph.

    Args:
        s: with x [.., N, C].
        step: how many rows stay and are folded.
        order: [.., K + R, 1] the rows, kept ones first.
        eps: added to each norm.
        shift: added to the cosines.
    Returns:
        The best cosine plus shift, and the host's row number, both [.., R, 1].
    """
    import torch

    from ...kernels import ops

    x = ops.take_rows(s.x, order)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    kept, folded = (x / (norm + eps if eps else norm)).split([step.n_kept, step.n_folded], -2)
    barred = row([shift - 8.0] * s.n_prefix + [shift] * (step.n_kept - s.n_prefix), x)
    return ops.best_column(ops.addmm(folded, kept, barred, False, True))


def regret(s: Signals, step: Step, *, plan: MergePlan, cosine: Tensor | None = None, log: bool = True) -> Tensor:
    """How much a plan's order and hosts give away, [B]; infinite for a prefix token out of place or an impossible host.

    The largest of: inversions of the order among kept rows, kept below folded, folded below dropped, each as a difference of
    scores; best host's cosine minus the chosen one's.

    Args:
        s: with score [B, N, 1].
        step: how many rows stay and are folded.
        plan: row numbers.
        cosine: [B, R, K] of `cosines`, when the plan's hosts are judged too.
        log: differences are those of the scores' logarithms.
    """
    import torch

    score, n = s.score[..., 0], step.n_in
    score = score.clamp(min=1e-30).log() if log else score
    parts = [plan.keep[..., 0]] + ([] if plan.src is None else [plan.src[..., 0]])
    used = torch.zeros_like(score, dtype=torch.bool).scatter_(1, torch.cat(parts, 1), True)
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
    in_place = (parts[0][:, : s.n_prefix] == torch.arange(s.n_prefix, device=score.device)).all(1)
    return torch.where(in_place, worst.clamp(min=0), torch.inf)


def margins(s: Signals, step: Step, *, plan: MergePlan, cosine: Tensor | None = None, log: bool = True) -> RowMargins:
    """How clear each row's part of a ranked plan is; 0 where the plan departs from the scores.

    Args:
        s: with score [B, N, 1].
        step: how many rows stay and are folded.
        plan: row numbers.
        cosine: [B, R, K] of `cosines`, when hosts are decided too.
        log: margins are those of the scores' logarithms.
    """
    import torch

    hosts = nothing_decided(s, step).host
    if step.n_in == 1:
        return RowMargins(hosts, hosts)
    score = s.score[..., 0].clamp(min=1e-30).log() if log else s.score[..., 0]
    keep, kept = plan.keep[..., 0], score.gather(1, plan.keep[..., 0])
    low = kept.amin(1, keepdim=True)
    rest = score.scatter(1, keep, -torch.inf)
    fate = (low - score).scatter(1, keep, kept - rest.amax(1, keepdim=True))
    if plan.src is not None:
        src, folded = plan.src[..., 0], score.gather(1, plan.src[..., 0])
        dropped = rest.scatter(1, src, -torch.inf).amax(1, keepdim=True)
        fate = torch.minimum(fate, folded.amin(1, keepdim=True) - score)  # of rows that are dropped
        fate = fate.scatter(1, keep, kept - rest.amax(1, keepdim=True))
        fate = fate.scatter(1, src, torch.minimum(low - folded, folded - dropped))
        if cosine is not None:
            hosts = hosts.scatter(1, src, lead(cosine, plan.dst[..., 0].clamp(max=step.n_kept - 1)))
    return RowMargins(fate.clamp(min=0), hosts)
