"""Multiply-accumulates of a ViT under a schedule. Plain arithmetic; imports no torch."""

from .schedule import Schedule
from .step import Step
from .tail import left_out


def count(dims: dict, schedule: Schedule) -> int:
    """MACs for one image: linear layers, score heads, attention and patch embedding; the matching is left out, as the papers do.

    A token merged after the attention of a block is still in that block's attention, not in its MLP.

    Args:
        dims: of `PlainViT`: width, attn_width, mlp [(inputs, outputs), ...], gate, classes, heads (classifiers), patches,
            patch_values (inputs of a patch's embedding), pool, metric_width (features of a metric layer), blocks (those that are
            computed, where not all are).
        schedule: of the same model.
    """
    c, a = dims["width"], dims["attn_width"]
    total = dims["patches"] * dims["patch_values"] * c
    for n, m in schedule.tokens_per_block()[: dims.get("blocks")]:
        total += (
            n * c * (3 + dims.get("gate", 0)) * a + 2 * n * n * a + n * a * c + m * sum(i * o for i, o in dims["mlp"])
        )
    total += sum(signal(dims, step, n_prefix=schedule.n_prefix) for step in schedule.steps)
    if dims["pool"] == "map":
        total += schedule.n_final * 2 * c * c
    return total + dims["heads"] * c * dims["classes"]


def executed(dims: dict, schedule: Schedule, tail: str) -> int:
    """MACs for one image that a file computes: `count`, less what the class tail leaves out of the last block.

    Example: DeiT-S counts 4.58 G. Of the 197 rows in its last block 196 need no query, projection, attention row and MLP:
    0.32 G less, 4.26 G are executed.

    Args:
        dims, schedule: see `count`.
        tail: of the file, see `tail`.
    """
    total = count(dims, schedule)
    if tail == "full":
        return total
    p = schedule.n_prefix
    n, m = schedule.tokens_per_block()[-1]
    total -= (n - p) * tail_row(dims, n) + (m - p) * sum(i * o for i, o in dims["mlp"])
    step = left_out(schedule, tail)
    return total if step is None else total - signal(dims, step, n_prefix=p)


def tail_row(dims: dict, n_tokens: int) -> int:
    """MACs in the attention half of a block that are of one row alone: its query, gate, attention and projection.

    Args:
        dims: see `count`.
        n_tokens: in the attention.
    """
    c, a = dims["width"], dims["attn_width"]
    return c * (1 + dims.get("gate", 0)) * a + 2 * n_tokens * a + a * c


def tail_share(dims: dict, n_tokens: int, *, n_prefix: int) -> float:
    """Share of the MACs in the attention half of a block that the class tail leaves out: all but keys and values, and a few rows.

    Args:
        dims: see `count`.
        n_tokens: in the attention.
        n_prefix: prefix tokens among them.
    """
    row = tail_row(dims, n_tokens)
    return (n_tokens - n_prefix) * row / (n_tokens * (row + 2 * dims["width"] * dims["attn_width"]))


def signal(dims: dict, step: Step, *, n_prefix: int) -> int:
    """MACs for one image of what a step looks at, beyond what its block computes anyway.

    Args:
        dims: see `count`.
        step: whose signal it is.
        n_prefix: prefix tokens, which score heads do not see.
    """
    c, a, n = dims["width"], dims["attn_width"], step.n_in
    if step.signal == "score_head":  # Linear C C, C C/2, C/2 C/4, C/4 2
        return (n - n_prefix) * (c * c + c * (c // 2) + (c // 2) * (c // 4) + c // 4 * 2)
    if step.signal == "metric_layer":
        return n * c * dims.get("metric_width", 0)
    if step.site == "post_attn":  # the block's own keys and attention
        return 0
    rows = {"class_attention": 1, "mean_attention": n}.get(step.signal, 0)  # queries
    return n * c * a * (step.signal is not None) + rows * (c * a + n * a)


def dense(schedule: Schedule) -> Schedule:
    """The same model without a reduction."""
    return Schedule("none", schedule.n_tokens, schedule.n_prefix, schedule.depth)
