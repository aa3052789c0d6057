"""What a block offers a reducer (Signals), what a reducer decides (MergePlan), and how a static graph holds that (StaticLayout).

One worked example, ToMe with r = 1 on six tokens, a class token and five patches (`example.py` computes and draws it):

    position      0      1      2      3      4      5
    token        cls     p      q      r      s      t
    set         prefix   B      A      B      A      B          even positions are A, odd ones B; the class token does neither

    q is most similar to r (0.9), s to t (0.8): the best pair is (q, r), so q merges into r and s stays.

    MergePlan    keep = 0 4 1 3 5    rows that stay, in the new order: prefix, what is left of A, B
                 src  = 2            q is folded ...
                 dst  = 3            ... into new row 3, which is r
    StaticLayout labels = -1 -2 0 1 2    names of the new rows: places in B from 0 on, the rows before them count down from -1
                 dst    = 1              in a static plan the host's name: r is number 1 of B, known before the rows are sorted
                 hosts  = . . 1 . 2 .    the best host of every input row, whether or not it merges
                 target = -1 0 1 1 -2 2  where each of the six goes: every row of the plan in one column

New row 3 is the mean of q and r, weighted by how many input tokens each stands for; its size is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Signal:
    """One thing a block can offer a reducer; only what a step names is computed.

    Args:
        help: what it is, in words.
        kind: "metric" [.., N, D], compared between tokens, or "score" [.., N, 1], by which tokens are sorted.
        needs_class: it is read off the class token, so a model without one cannot offer it.
        learned: it comes from layers that were trained for it, one for each step (`Step.layer` numbers them).
    """

    help: str
    kind: str
    needs_class: bool = False
    learned: bool = False


SIGNALS = {
    "keys": Signal("keys of the attention, mean over heads, each divided by its L2 norm", "metric"),
    "class_attention": Signal("attention received from the class token, mean over heads", "score", needs_class=True),
    "mean_attention": Signal("attention received, mean over heads and over all tokens", "score"),
    "score_head": Signal("log-odds to keep the token, of a trained score head", "score", learned=True),
    "metric_layer": Signal(
        "a trained linear layer on norm1's output, each row divided by its L2 norm", "metric", learned=True
    ),
}
# Those of a block's attention, or of the one that it would compute of the tokens in front of it.
ATTENTION_SIGNALS = ("keys", "class_attention", "mean_attention")


@dataclass(frozen=True)
class Signals:
    """What one block offers a reducer. The eager reference has a batch, [B, N, ..]; a static graph for one image has none, [N, ..].

    Before a block (`pre_block`) keys and attention are those the block would compute of these tokens; after the attention
    (`post_attn`) they are the block's own. A score head reads `x` wherever the step stands.

    Args:
        x: tokens [.., N, C]: after the attention residual, or before the block.
        n_prefix: class, distillation and register tokens at the head of the sequence.
        has_class: whether the first of them is a class token.
        size: input tokens that each token stands for [.., N, 1]; None while every size is 1 (or the method has none).
        metric: of a signal of that kind, [.., N, D].
        score: of a signal of that kind, [.., N, 1]; prefix tokens are lifted above all others.
        any_batch: the batch is free in the graph that is traced; constants cannot be repeated over it.
        many: a step of the model keeps more rows than every runtime can sort (`matching.MOST_SORTED`): the few that go are sorted.
    """

    x: Tensor
    n_prefix: int
    has_class: bool
    size: Tensor | None = None
    metric: Tensor | None = None
    score: Tensor | None = None
    any_batch: bool = False
    many: bool = False


COMBINE = {
    "mean": "plain mean of a host and what is folded into it",
    "size": "mean weighted by the tokens' sizes, which add",
    "weighted": "mean weighted by w_keep and w_src",
    "sum": "one row more: the sum of what is folded, weighted by w_src",
    "mlerp": "plain mean, scaled to the largest norm among a host and what is folded into it",
    "mlerp_code": "plain mean times that largest norm over the host's own norm (published code of ToFu)",
}


@dataclass(frozen=True)
class StaticLayout:
    """How a static graph holds a plan. See the worked example on top of this module.

    Args:
        order: [.., K + R, 1] keep and src in one column, when the plan has them so; rows are then gathered once.
        labels: one name per output row (an int; hosts' count up from 0), when dst holds names instead of row numbers.
        hosts: [.., N, 1] the name of the best host of every input row, from which dst (and target) are read.
        target: [.., N, 1] the name of the output row that every input row goes to: the whole plan in one column.
    """

    order: Tensor | None = None
    labels: tuple[int, ...] | None = None
    hosts: Tensor | None = None
    target: Tensor | None = None


@dataclass(frozen=True)
class MergePlan:
    """Which rows stay and which are folded into which: a sparse linear map, K rows kept, R folded, the others dropped.

    New row j < K is the mean, as `combine` says, of x[keep[j]] and of all x[src[i]] with dst[i] = j. Static shapes, int64 columns.
    See the worked example on top of this module.

    Args:
        keep: [.., K, 1] input rows that stay, in output order.
        src: [.., R, 1] input rows that are folded; None when there are none.
        dst: [.., R, 1] the output row that each of them goes to (in a static plan its label); None where that is the extra row.
        combine: a key of COMBINE.
        w_keep: [.., K, 1] weights of hosts ("weighted"); None for 1.
        w_src: [.., R, 1] weights of folded rows ("weighted", "sum").
        w_size: [.., R, 1] sizes add, those of folded rows multiplied by this (DiffRate); None: sizes are not followed, unless
            combine is "size".
        layout: how a static graph holds the plan; None in a reference's.
    """

    keep: Tensor
    src: Tensor | None = None
    dst: Tensor | None = None
    combine: str = "mean"
    w_keep: Tensor | None = None
    w_src: Tensor | None = None
    w_size: Tensor | None = None
    layout: StaticLayout | None = None

    def __post_init__(self):
        if self.combine not in COMBINE:
            raise ValueError(f"combine {self.combine!r}: wanted one of {', '.join(COMBINE)}")

    @property
    def n_extra(self) -> int:
        """1 when what is folded becomes a row of its own, else 0."""
        return int(self.combine == "sum" and self.src is not None)
