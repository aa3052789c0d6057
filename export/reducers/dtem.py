"""DTEM: ToMe by a learned metric (Lee & Hong 2024, Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers).

One more linear layer a block, trained for this, on norm1's output: what it gives is compared in place of the keys. Everything else
is ToMe: sets by position, the r most similar pairs, means by size, proportional attention.
"""

from __future__ import annotations

from ..step import ModelSize, Step
from . import matching, options, tome
from .base import Counts, Reducer
from .merging import merge_counts


def steps(asked: dict, size: ModelSize) -> Counts:
    """DTEM's counts from its options: ToMe's.

    Args:
        asked: r, at, align, prop_attn, pool.
        size: of the model.
    """
    reads = lambda block: {"signal": "metric_layer", "layer": block}  # one layer for every block of the model
    make = lambda block, n, out: Step(block, "post_attn", n, out, out, **reads(block))
    counts = merge_counts(asked, size, make=make)
    return Counts(*counts, prop_attn=asked["prop_attn"], pool=asked["pool"], n_layers=size.depth)


REDUCER = Reducer(
    "dtem",
    "DTEM",
    "ToMe by a trained linear layer in place of the keys (Lee & Hong 2024)",
    steps,
    options=(options.R, options.EVERY, options.ALIGN, options.PROP_ATTN, options.POOL),
    signals=("metric_layer",),
    reference=tome.reference,
    static=tome.static,
    regret=matching.regret,
    margins=matching.margins,
    labels=matching.labels,
)
