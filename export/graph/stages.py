"""Names for the parts of a graph: every node is called STAGE/OPERATOR_NUMBER, so that errors, precision and profiles can speak of it.

Stages: embed, blockI.attn, blockI.match (metrics, scores and decisions), blockI.merge (applying them), blockI.mlp, head, and
outputs.merge (tokens and patches that are given beside the pooled output).
"""

from __future__ import annotations

FP32 = ("match", "merge")  # decisions, sizes and weighted sums stay in float32 whatever the file's precision
_IN_BLOCK = {"norm2": "mlp", "mlp": "mlp", "keys": "match", "unit": "match", "score": "match"}


def of_scopes(scopes: list[str], before: str) -> str:
    """The stage of a node, from the names of the `StaticViT` modules that it was traced in.

    Args:
        scopes: those names, outermost first, the node's own name last.
        before: the stage of the node before it, which a node outside any module shares.
    """
    path = scopes[-2].split(".") if len(scopes) > 2 else []
    if not path:
        return before
    if path[0] == "blocks":
        return f"block{path[1]}.{_IN_BLOCK.get(path[2] if len(path) > 2 else '', 'attn')}"
    if path[0] in FP32:
        return f"block{path[1]}.{path[0]}"
    if path[0] == "ones":  # sizes before the first merge
        return "embed.merge"
    if path[0] == "bias":  # the logarithm of the sizes that a merge has made
        return f"block{path[1]}.merge"
    if path[0] in ("signals", "score_heads"):  # keyed by the block that they stand in
        return f"block{path[1]}.match"
    if path[0] == "outputs":
        return "outputs.merge"
    if path[0] == "share":  # of tokens in a pool by size
        return "head.merge"
    return "head" if path[0] in ("head", "norm") else "embed"


def of_node(name: str) -> str:
    """The stage in a node's name; "" for a node that has none."""
    return name.rpartition("/")[0]


def in_fp32(name: str) -> bool:
    """Whether a node of this name stays in float32."""
    return of_node(name).rpartition(".")[2] in FP32
