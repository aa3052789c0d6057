"""Which steps of a schedule are a node `TokenReduce`, and with which attributes (see `kernels/token_reduce.py`). Imports no torch."""

from __future__ import annotations

from ..kernels.token_reduce import FOLLOWS_SIZES, Reduction
from . import reducers
from .schedule import Schedule
from .step import Step


def follows_sizes(method: str) -> bool:
    """Whether the node of a method takes sizes."""
    node = reducers.get(method).node
    return node is not None and node["fold"] in FOLLOWS_SIZES


def has_node(method: str, step: Step) -> bool:
    """Whether a step is a node: one that folds nothing is two operators as it is, and tokens are paired by the keys of the step's own
    block only.

    Args:
        method: of the schedule.
        step: of it.
    """
    node = reducers.get(method).node
    if node is None or not step.n_folded:
        return False
    return node["select"] == "score" or (step.signal, step.site) == ("keys", "post_attn")


def reduction(schedule: Schedule, step: Step, *, by_score: bool) -> Reduction:
    """The attributes of a step's node.

    Args:
        schedule: with the step.
        step: that has a node.
        by_score: tokens left in A are in descending score: the model has no class token. For a method that pairs tokens.
    """
    node = reducers.get(schedule.method).node
    sizes = (2 if schedule.prop_attn else 1) if follows_sizes(schedule.method) else 0
    by_score = by_score and node["select"] == "pairs"
    counts = {"n_in": step.n_in, "n_kept": step.n_kept, "n_folded": step.n_folded, "n_prefix": schedule.n_prefix}
    return Reduction(**node, **counts, by_score=int(by_score), sizes=sizes, decisions=1)
