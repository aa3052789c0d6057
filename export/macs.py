"""Multiply-accumulates of a ViT under a schedule. Plain arithmetic; imports no torch."""

from .schedule import Schedule
from .step import Step


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
