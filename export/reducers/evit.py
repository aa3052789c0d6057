"""EViT: attentive tokens stay, the others become one (Liang et al. 2022, Not All Patches Are What You Need).

After the attention, tokens are sorted by the attention the class token pays them, mean over heads. The first K stay in descending
order; with fusion the rest becomes one token behind them, the sum of x weighted by its raw scores. An earlier fused token competes
with the others. Of equal scores, the lower position comes first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..margins import RowMargins
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import options, ranking
from .base import Counts, Option, Reducer

if TYPE_CHECKING:
    from torch import Tensor


def stage_counts(asked: dict, size: ModelSize, *, fold: bool, extra: bool) -> Counts:
    """Counts of EViT and eTPS: after the attention of block at[s], ceil(rates[s] * others) of the others stay.

    The others are all tokens that are no prefix token; a fused token is one of them in later blocks. Where every token stays,
    there is no step and no fused token. The product is rounded to float64 before the ceiling, as in the authors' code.

    Args:
        asked: at, keep_rate, score.
        size: of the model.
        fold: what does not stay is folded; otherwise it is dropped.
        extra: it is folded into one token more; otherwise into those that stay.
    Raises:
        UsageError: keep rates that are none, or not as many as blocks.
    """
    at, rates = asked["at"], options.parse_rates(asked["keep_rate"], len(asked["at"]))
    n, steps, notes = size.n_tokens, [], []
    for stage, (rate, block) in enumerate(zip(rates, at, strict=True), 1):
        others = n - size.n_prefix
        kept = math.ceil(rate * others)
        if kept == others:
            notes.append(options.keeps_all(stage, block))
            continue
        if extra and kept == others - 1:
            notes.append(f"stage {stage} (block {block}) fuses a single token: there are as many tokens as before")
        n_kept, signal = size.n_prefix + kept, options.SIGNAL_OF[asked["score"]]
        n_folded = others - kept if fold else 0
        steps.append(Step(block, "post_attn", n, n_kept, n_kept + extra, n_folded=n_folded, signal=signal))
        n = n_kept + extra
    return Counts({**asked, "keep_rate": rates}, steps, notes)


def steps(asked: dict, size: ModelSize) -> Counts:
    """EViT's counts from its options.

    Args:
        asked: at, keep_rate, score, fuse.
        size: of the model.
    """
    return stage_counts(asked, size, fold=asked["fuse"], extra=asked["fuse"])


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions with a sort.

    Args:
        s: a batch, with score [B, N, 1].
        step: how many stay and are fused.
        given: decisions to keep instead.
    """
    from torch import full_like

    order = given or ranking.sort(s, step)
    if order.src is None:
        return MergePlan(order.keep)
    dst = full_like(order.src, step.n_kept)
    return MergePlan(order.keep, order.src, dst, combine="sum", w_src=s.score.gather(1, order.src))


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with one TopK.

    Args:
        s: with score [.., N, 1].
        step: how many stay and are fused.
    """
    order = ranking.top(s, step)
    return MergePlan(order.keep, order.src, combine="sum", w_src=order.value, layout=StaticLayout(order.column))


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the logarithm of the attention received.

    Args:
        s: with score [B, N, 1].
        step: how many stay and are fused.
        plan: row numbers.
    """
    return ranking.regret(s, step, plan=plan)


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is, in logarithms of the attention received.

    Args:
        s: with score [B, N, 1].
        step: how many stay and are fused.
        plan: row numbers.
    """
    return ranking.margins(s, step, plan=plan)


FUSE = Option("fuse", "the tokens left out become one", default=True, flag=True)
REDUCER = Reducer(
    "evit",
    "EViT",
    "tokens the class token attends to stay, the others become one (Liang et al. 2022)",
    steps,
    options=(options.KEEP_RATE, options.AT, options.SCORE, FUSE),
    signals=tuple(options.SIGNAL_OF.values()),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
    node={"select": "score", "fold": "sum"},
)
