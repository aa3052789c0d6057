"""Multiply-accumulates of a model whose token counts are being learned, differentiable in the counts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .selectors import smallest


@dataclass(frozen=True)
class BlockCost:
    """What one token, and one pair of tokens, costs in a block, and what there is beside the blocks, in multiply-accumulates.

    Attributes:
        attention: of a token in the attention's linear layers (4 C^2 in a plain ViT).
        pair: of a pair of tokens in the attention (2 C).
        mlp: of a token in the MLP (8 C^2 at a ratio of 4).
        rest: patch embedding and classifier, whatever the counts.
    """

    attention: int
    pair: int
    mlp: int
    rest: int

    @classmethod
    def of_dims(cls, dims: dict) -> BlockCost:
        """The costs that `macs.count` adds up, from a file's or a model's `dims`."""
        c, a = dims["width"], dims["attn_width"]
        return cls(
            attention=c * (3 + dims.get("gate", 0)) * a + a * c,
            pair=2 * a,
            mlp=sum(i * o for i, o in dims["mlp"]),
            rest=dims["patches"] * dims["patch_values"] * c + dims["heads"] * c * dims["classes"],
        )

    @classmethod
    def as_published(cls, width: int, *, patch_values: int, classes: int, n_tokens: int) -> BlockCost:
        """The published count: an MLP ratio of 4, and a patch embedding that counts the class token too.

        Args:
            width: C, channels of a token.
            patch_values: numbers in one patch, channels times its area.
            classes: of the classifier.
            n_tokens: tokens into the first block.
        """
        return cls(4 * width**2, 2 * width, 8 * width**2, n_tokens * width * patch_values + width * classes)


def expected_macs(kept: list[tuple[Tensor, Tensor]], n_tokens: int, *, cost: BlockCost) -> Tensor:
    """Multiply-accumulates under the selectors' counts.

    Args:
        kept: (after pruning, after merging) of every block, tokens with prefix, see `Selector.kept`.
        n_tokens: tokens into the first block.
        cost: of the model.
    Returns:
        A scalar with a gradient to every count.
    """
    total, n = kept[0][0].new_tensor(float(cost.rest)), kept[0][0].new_tensor(float(n_tokens))
    for prune, merge in kept:
        total = total + n * cost.attention + n * n * cost.pair
        n = smallest(int(n.detach()), prune, merge)
        total = total + n * cost.mlp
    return total
