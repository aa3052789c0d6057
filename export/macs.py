"""Multiply-accumulates of a ViT under a schedule. Plain arithmetic; imports no torch."""

from .schedule import Schedule


def count(dims: dict, schedule: Schedule) -> int:
    """MACs for one image: linear layers, score heads, attention and patch embedding; the matching is left out, as the papers do.

    dims: from `vit.dims`. A token merged after the attention of a block is still in that block's attention, not in its MLP.
    """
    c, a = dims["width"], dims["attn_width"]
    total = dims["patches"] * dims["patch_values"] * c
    for n, m in schedule.tokens_per_block():
        total += (
            n * c * (3 + dims.get("gate", 0)) * a + 2 * n * n * a + n * a * c + m * sum(i * o for i, o in dims["mlp"])
        )
    for step in schedule.steps:
        if step.site == "pre_block":  # a score head: Linear C C, C C/2, C/2 C/4, C/4 2
            total += (step.n_in - schedule.n_prefix) * (c * c + c * (c // 2) + (c // 2) * (c // 4) + c // 4 * 2)
    if dims["pool"] == "map":
        total += schedule.n_final * 2 * c * c
    return total + dims["heads"] * c * dims["classes"]


def dense(schedule: Schedule) -> Schedule:
    """The same model without a reduction."""
    return Schedule("none", schedule.n_tokens, schedule.n_prefix, schedule.depth)
