"""DynamicViT: a learned score head ranks the patch tokens before a block, the rest is dropped (Rao et al. 2021).

int(n0 rate^(stage + 1)) of the n0 original patch tokens stay, in descending score order, behind the prefix tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..margins import RowMargins
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import options, ranking
from .base import Counts, Reducer

if TYPE_CHECKING:
    from torch import Tensor


def stage_counts(asked: dict, size: ModelSize, *, squeeze: bool) -> Counts:
    """Counts of DynamicViT and dTPS: before block at[s], a share of the original n0 = n_tokens - n_prefix patches stays.

    One rate is of what the stage before left, int(n0 * rate ** (s + 1)) with s from 0; a list holds shares of n0 itself. float64,
    truncated, as in the authors' code.

    Args:
        asked: at, keep_rate.
        size: of the model.
        squeeze: the other tokens are folded into those that stay; otherwise dropped.
    Raises:
        UsageError: a stage keeps no patch, or more than there are.
    """
    at, shares = asked["at"], options.parse_cumulative(asked["keep_rate"], len(asked["at"]))
    n0 = others = size.n_tokens - size.n_prefix
    steps, notes = [], []
    for stage, (share, block) in enumerate(zip(shares, at, strict=True)):
        kept, where = int(n0 * share), f"stage {stage + 1} (block {block})"
        if kept < 1:
            raise UsageError(
                f"keep_rate: {where} keeps no patch, {share:g} of {n0}: give a higher rate or fewer blocks in at"
            )
        if kept > others:
            raise UsageError(
                f"keep_rate: {where} keeps {kept} patches, only {others} are left: a list of rates holds shares of "
                f"the {n0} original patches and must not grow"
            )
        if kept == others:
            notes.append(options.keeps_all(stage + 1, block))
            continue
        n_kept = size.n_prefix + kept
        n_folded = others - kept if squeeze else 0
        n_in = size.n_prefix + others
        reads = {"signal": "score_head", "layer": stage}
        steps.append(Step(block, "pre_block", n_in, n_kept, n_kept, n_folded=n_folded, **reads))
        others = kept
    return Counts({**asked, "keep_rate": shares}, steps, notes, n_layers=len(at))


def steps(asked: dict, size: ModelSize) -> Counts:
    """DynamicViT's counts from its options.

    Args:
        asked: at, keep_rate.
        size: of the model.
    """
    return stage_counts(asked, size, squeeze=False)


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions with a sort.

    Args:
        s: a batch, with score [B, N, 1].
        step: how many stay.
        given: decisions to keep instead.
    """
    return given or MergePlan(ranking.sort(s, step).keep)


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with one TopK.

    Args:
        s: with score [.., N, 1].
        step: how many stay.
    """
    order = ranking.top(s, step)
    return MergePlan(order.keep, layout=StaticLayout(order.column))


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the log-odds to keep.

    Args:
        s: with score [B, N, 1].
        step: how many stay.
        plan: row numbers.
    """
    return ranking.regret(s, step, plan=plan, log=False)


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is, in log-odds to keep.

    Args:
        s: with score [B, N, 1].
        step: how many stay.
        plan: row numbers.
    """
    return ranking.margins(s, step, plan=plan, log=False)


REDUCER = Reducer(
    "dynamicvit",
    "DynamicViT",
    "a trained score head ranks patches before a block, the rest is dropped (Rao et al. 2021)",
    steps,
    options=(options.KEEP_SHARE, options.AT),
    signals=("score_head",),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
)
