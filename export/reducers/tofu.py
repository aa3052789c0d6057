"""ToFu: ToMe's pairs, dropped in early blocks and fused with their norm kept in later ones (Kim et al. 2024, Token Fusion).

Matching and order are ToMe's. Up to `prune_until` the r tokens that would merge are dropped and their hosts stay as they are. Behind
it they are fused by MLERP: the plain mean, scaled to the largest norm of its members. The only published code (OpenToMe's; the
authors published none) divides by the host's old norm instead; `norm="code"` does as it does. Sizes are not followed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..margins import RowMargins
from ..plan import MergePlan, Signals
from ..step import ModelSize, Step
from . import matching, options, tome
from .base import Counts, Option, Reducer
from .merging import merge_counts

if TYPE_CHECKING:
    from torch import Tensor

NORMS = {"mlerp": "mlerp", "code": "mlerp_code"}  # option -> how a plan combines


def steps(asked: dict, size: ModelSize) -> Counts:
    """ToFu's counts from its options: ToMe's, and which blocks drop instead of fusing.

    Args:
        asked: r, at, align, norm, prune_until (None: half of the blocks).
        size: of the model.
    """
    until = size.depth // 2 if asked["prune_until"] is None else asked["prune_until"]
    fuse = {"settings": {"combine": NORMS[asked["norm"]]}}
    drop = {"n_folded": 0}
    make = lambda block, n, out: Step(
        block, "post_attn", n, out, out, signal="keys", **(drop if block <= until else fuse)
    )
    kept, made, notes = merge_counts({**asked, "prune_until": until}, size, make=make)
    fused = [s.block for s in made if s.n_folded]
    if fused:
        how = "MLERP, the paper's" if asked["norm"] == "mlerp" else "the published code's"
        notes = [*notes, f"tokens are dropped up to block {until} and fused behind it; norm: {how}"]
    return Counts(kept, made, notes)


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """ToMe's decisions; of a step that drops, which rows stay.

    Args:
        s: a batch, with metric [B, N, D].
        step: how many stay, and whether the others are fused.
        given: decisions to keep instead.
    """
    plan = given or tome.reference(s, step)
    return replace(plan, combine=step.settings["combine"]) if step.n_folded else MergePlan(plan.keep)


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with fixed shapes.

    Args:
        s: with metric [.., N, D].
        step: how many stay, and whether the others are fused.
    """
    plan = tome.static(s, step)
    return replace(plan, combine=step.settings["combine"]) if step.n_folded else MergePlan(plan.keep)


def as_pairs(s: Signals, step: Step, plan: MergePlan) -> MergePlan:
    """A plan that only drops as one of pairs: each dropped row with its best host, so that it can be judged as ToMe's.

    Args:
        s: a batch, with metric [B, N, D].
        step: how many stay.
        plan: row numbers.
    """
    import torch

    if plan.src is not None:
        return plan
    a, b, scores = matching.similarities(s, step.n_in)
    stays = torch.zeros(plan.keep.shape[0], step.n_in, dtype=torch.bool, device=plan.keep.device)
    stays = stays.scatter(1, plan.keep[..., 0], True)
    src = stays.to(torch.uint8).sort(dim=1, stable=True).indices[:, : step.n_in - step.n_kept]
    rank = torch.zeros(step.n_in, dtype=torch.int64, device=a.device)
    rank[a] = torch.arange(len(a), device=a.device)  # rows that are none of A get any host: their place is judged apart
    host = scores.argmax(-1).gather(1, rank[src])
    return MergePlan(plan.keep, src[..., None], (step.n_kept - len(b) + host)[..., None])


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much similarity a plan gives away, [B]; see `matching.regret`.

    Args:
        s: a batch, with metric [B, N, D].
        step: how many stay.
        plan: row numbers.
    """
    return matching.regret(s, step, as_pairs(s, step, plan))


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is; see `matching.margins`.

    Args:
        s: a batch, with metric [B, N, D].
        step: how many stay.
        plan: row numbers.
    """
    import torch

    found = matching.margins(s, step, as_pairs(s, step, plan))
    return found if step.n_folded else found._replace(host=torch.full_like(found.host, torch.inf))


NORM = Option(
    "norm",
    "of fused tokens: mlerp, the mean scaled to the largest norm of its members; code, as the published code has it",
    default="mlerp",
    choices=tuple(NORMS),
)
PRUNE_UNTIL = Option(
    "prune_until",
    "the last block that drops tokens instead of fusing them, -1 for none",
    default=None,
    metavar="BLOCK",
    parse=lambda value, size: None if value is None else options.parse_whole("prune_until", value, least=-1),
    default_help="half of the blocks",
)
REDUCER = Reducer(
    "tofu",
    "ToFu",
    "ToMe's pairs, dropped in early blocks, fused with their norm kept in later ones (Kim et al. 2024)",
    steps,
    options=(options.R, options.EVERY, options.ALIGN, NORM, PRUNE_UNTIL),
    signals=("keys",),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
    labels=matching.labels,
)
