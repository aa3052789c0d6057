"""DiffRate: learned counts of tokens to prune and to merge in every block (Chen et al. 2023, Differentiable Compression Rate).

After the attention, tokens are sorted by class attention, prefix tokens first, and cut to prune_kept; those beyond merge_kept are
merged into the kept token of the most similar x (cosine; prefix tokens are no hosts). A token becomes the plain mean of itself and
what it receives. Its size grows by each source's size times their cosine; attention is proportional to size.

A cosine below zero can bring a size to zero or below, where the authors' code takes the logarithm to NaN; here such a size is 2^-100.
Wherever theirs is finite, sizes are the same. Counts above the present number of tokens do nothing but sort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..margins import RowMargins
from ..plan import MergePlan, Signals, StaticLayout
from ..step import ModelSize, Step
from . import diffrate_rates, options, ranking
from .base import Counts, Option, Reducer
from .diffrate_rates import KeepCounts

if TYPE_CHECKING:
    from torch import Tensor

FOREIGN = (
    "counts of another model say what to prune there: on this one they may prune what had better be merged; prune=false (no-prune) "
    "merges it, at the same counts"
)


def block_counts(
    prune_kept: list[int], merge_kept: list[int], *, size: ModelSize, signal: str = "class_attention"
) -> tuple[list[Step], list[str]]:
    """In block b, prune_kept[b] tokens are left after pruning, then merge_kept[b] after merging.

    A count above what is there does nothing. A block that keeps every token has no step, except the last: sorting there changes the
    order of the model's output tokens.

    Args:
        prune_kept, merge_kept: one count a block, prefix tokens included, each 1 or more.
        size: of the model.
        signal: what the steps sort by.
    Returns:
        Steps and notes.
    Raises:
        UsageError: the lists do not fit each other or the model, leave no room for the prefix tokens, or merge with no patch left
            to merge into.
    """
    diffrate_rates.check_counts(prune_kept, merge_kept)
    if len(prune_kept) != size.depth:
        raise UsageError(f"rates: {len(prune_kept)} counts for a model with {size.depth} blocks: wanted one a block")
    n, steps = size.n_tokens, []
    all_stay, prune_cut, merge_cut = [], [], []
    for block, (prune, merge) in enumerate(zip(prune_kept, merge_kept)):
        left, out = min(prune, n), min(merge, prune, n)
        _check_block(block, min(prune, merge), left, out, size.n_prefix)
        for wanted, real, cut in ((prune, left, prune_cut), (merge, out, merge_cut)):
            if wanted > real:
                cut.append(f"{block} ({wanted} to {real})")
        if out == n:
            all_stay.append(str(block))
        if out < n or block == size.depth - 1:
            steps.append(Step(block, "post_attn", n, out, out, n_folded=left - out, signal=signal))
        n = out
    notes = {
        "every token stays in block ": all_stay,
        "prune_kept was cut to the tokens there are in block ": prune_cut,
        "merge_kept was cut to the tokens left after pruning in block ": merge_cut,
    }
    return steps, [words + ", ".join(blocks) for words, blocks in notes.items() if blocks]


def _check_block(block: int, asked: int, left: int, out: int, n_prefix: int) -> None:
    if asked < max(1, n_prefix):
        raise UsageError(
            f"rates: block {block} keeps {asked} tokens, which leaves no room for the class token "
            f"({n_prefix} prefix tokens): give a larger count"
        )
    if left > out and out <= n_prefix:
        raise UsageError(
            f"rates: block {block} merges {left - out} tokens and keeps {out}, {n_prefix} of them prefix tokens, which "
            f"none merges into: wanted merge_kept {n_prefix + 1} or more there"
        )


def steps(asked: dict, size: ModelSize) -> Counts:
    """DiffRate's counts from its options.

    Args:
        asked: rates (see `diffrate_rates.fit`), prune, prop_attn, score, pool.
        size: of the model.
    """
    rates, notes = diffrate_rates.fit(asked["rates"], size.n_tokens, n_prefix=size.n_prefix)
    if not asked["prune"]:
        rates, more = without_pruning(rates, size)
        notes = [*notes, *more]
    elif notes and any(p < m for p, m in zip(rates.prune_kept, (size.n_tokens, *rates.merge_kept))):
        notes = [*notes, FOREIGN]
    signal = options.SIGNAL_OF[asked["score"]]
    steps, more = block_counts(rates.prune_kept, rates.merge_kept, size=size, signal=signal)
    name = "given" if isinstance(asked["rates"], dict) else str(asked["rates"])
    kept = {**asked, "rates": name, "prune_kept": rates.prune_kept, "merge_kept": rates.merge_kept}
    return Counts(kept, steps, [*notes, *more], prop_attn=asked["prop_attn"], pool=asked["pool"])


def without_pruning(rates: KeepCounts, size: ModelSize) -> tuple[KeepCounts, list[str]]:
    """Counts under which as many tokens are left after each block, and what was to be pruned is merged.

    Args:
        rates: as many counts as blocks, for this model's number of tokens.
        size: of the model.
    Returns:
        The counts, and a note when they pruned anything.
    """
    n, prune, merge, pruned = size.n_tokens, [], [], 0
    for before, after in zip(rates.prune_kept, rates.merge_kept):
        pruned += n - min(before, n)
        prune.append(n)
        n = min(n, before, after)
        merge.append(n)
    notes = (
        [f"nothing is pruned: the {pruned} tokens that were to be pruned are merged, the counts stay"] if pruned else []
    )
    return KeepCounts(prune, merge, rates.n_tokens), notes


def reference(s: Signals, step: Step, given: MergePlan | None = None) -> MergePlan:
    """The paper's decisions and weights.

    Args:
        s: a batch, with score [B, N, 1] and x [B, N, C].
        step: how many stay and merge.
        given: decisions to keep instead; weights are computed.
    """
    order = given or ranking.sort(s, step)
    if order.src is None:
        return MergePlan(order.keep)
    cosine = ranking.cosines(s, order.keep, order.src, eps=0.0)
    dst = given.dst if given else cosine.max(-1, keepdim=True).indices
    return MergePlan(order.keep, order.src, dst, w_size=cosine.gather(2, dst))


def static(s: Signals, step: Step) -> MergePlan:
    """The same decisions with fixed shapes.

    Args:
        s: with score [.., N, 1] and x [.., N, C].
        step: how many stay and merge.
    """
    order = ranking.top(s, step)
    layout = StaticLayout(order.column)
    if order.src is None:
        return MergePlan(order.keep, layout=layout)
    value, host = ranking.hosts(s, step, order=order.column, eps=0.0)
    return MergePlan(order.keep, order.src, host, w_size=value, layout=layout)


def regret(s: Signals, step: Step, plan: MergePlan) -> Tensor:
    """How much a plan gives away, [B]: of the logarithm of the attention received, or of the host's cosine.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay and merge.
        plan: row numbers.
    """
    cosine = None if plan.src is None else ranking.cosines(s, plan.keep, plan.src, eps=0.0)
    return ranking.regret(s, step, plan=plan, cosine=cosine)


def margins(s: Signals, step: Step, plan: MergePlan) -> RowMargins:
    """How clear each row's part of a plan is, in logarithms of the attention received and in cosines.

    Args:
        s: with score [B, N, 1] and x [B, N, C].
        step: how many stay and merge.
        plan: row numbers.
    """
    cosine = None if plan.src is None else ranking.cosines(s, plan.keep, plan.src, eps=0.0)
    return ranking.margins(s, step, plan=plan, cosine=cosine)


RATES = Option(
    "rates", "a published list (tokexport rates), e.g. deit_small@2.9, or a JSON file of counts", metavar="NAME|FILE"
)
PRUNE = Option(
    "prune", "prune as the counts say; off: merge what they would prune, to the same counts", default=True, flag=True
)
REDUCER = Reducer(
    "diffrate",
    "DiffRate",
    "learned counts of tokens to prune and to merge in every block (Chen et al. 2023)",
    steps,
    options=(RATES, PRUNE, options.PROP_ATTN, options.SCORE, options.POOL),
    signals=tuple(options.SIGNAL_OF.values()),
    reference=reference,
    static=static,
    regret=regret,
    margins=margins,
    node={"select": "score", "fold": "mean"},
)
