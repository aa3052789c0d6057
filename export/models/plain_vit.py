"""PlainViT: all that the reference and the static graph know of a model. A family's adapter makes one, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..plan import SIGNALS
from ..provenance import Preprocess
from ..schedule import Schedule
from ..step import ModelSize


@dataclass(frozen=True)
class BlockParts:
    """The parts of one block, in one form: x + gamma1 * proj(norm(attention)), then x + gamma2 * mlp(norm2(x)).

    Args:
        norm1: before the attention.
        qkv: one Linear, C -> 3 heads D, queries first.
        heads: of the attention.
        scale: of the logits.
        q_norm, k_norm: of each head, or Identity.
        norm: of the attention's output before `proj`, or Identity.
        gate: Linear on norm1's output whose sigmoid multiplies the attention's output, or None.
        proj: after the attention.
        gamma1, gamma2: LayerScale [C], or None.
        norm2: before the MLP.
        mlp: tokens -> what is added.
        mlp_last: name of the last Linear in `mlp`, into which gamma2 may be folded.
        half: rotary halves are [0..D/2), [D/2..D), not even and odd channels.
    """

    norm1: nn.Module
    qkv: nn.Linear
    heads: int
    scale: float
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear
    gamma1: Tensor | None
    norm2: nn.Module
    mlp: nn.Module
    gamma2: Tensor | None
    mlp_last: str = "fc2"
    half: bool = False

    def split_heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (unscaled), keys and values [B, heads, N, D] of norm1's output y [B, N, C], q/k norms applied."""
        b, n, _ = y.shape
        qkv = self.qkv(y).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]


@dataclass(frozen=True)
class AttentionPool:
    """The parts of a pooling by attention of learned queries.

    Args:
        query: [1, heads, L, D], normed and scaled: no image changes it.
        kv: Linear, C -> 2 heads D, keys first.
        k_norm: of each head, or Identity.
        proj, norm, mlp: after the attention; mlp(norm(y)) is added to y, or mlp is None.
        kind: "token" (the first query's row), "avg" (their mean), or "" (all rows).
        skip: leading tokens that are left out.
    """

    query: Tensor
    kv: nn.Linear
    k_norm: nn.Module
    proj: nn.Module
    norm: nn.Module
    mlp: nn.Module | None
    kind: str
    skip: int


@dataclass(frozen=True)
class Pooling:
    """From tokens after the final norm to the output.

    Args:
        forward: the model's own code, tokens [B, N, C] -> logits or features [B, classes or C].
        classifiers: each reads one vector; their outputs are averaged (a distilled model has two).
        norm: of the pooled vector, or Identity.
        rows: the rows that are read, one for each classifier, where nothing else is pooled; else empty.
        pool: tokens [B, N, C] -> [B, C], where `rows` is empty.
        attention: the parts of `pool`, when it is one by attention.
        average: `pool` is the mean over the patches, so it can be weighed by token size.
        by_size: methods that leave it open ("auto") weigh it by size, as both authors' code for MAE does.
    """

    forward: Callable[[Tensor], Tensor]
    classifiers: tuple[nn.Module, ...]
    norm: nn.Module
    rows: tuple[int, ...] = ()
    pool: Callable[[Tensor], Tensor] | None = None
    attention: AttentionPool | None = None
    average: bool = False
    by_size: bool = False


@dataclass(frozen=True)
class PlainViT:
    """A plain Vision Transformer: patches, prefix tokens, blocks, a final norm, a pooling.

    Args:
        module: all weights; nothing here holds any that are not in it, so it may be moved to another device.
        n_tokens: tokens entering block 0, prefix tokens included.
        n_prefix: class, distillation and register tokens at the head of the sequence.
        has_class_token: whether the first of them is a class token.
        patch: the patch embedding's Conv2d.
        patch_norm: of the patches, or Identity.
        norm_pre: of the tokens entering block 0, or Identity.
        norm: the final one, or Identity.
        pooling: from tokens to the output.
        embed: the model's own code, image [B, channels, H, W] -> tokens [B, N, C] entering block 0, norm_pre applied.
        positions: () -> [N, C], what the model adds to patches of zeros behind rows of zeros: prefix tokens and position embedding.
        rotary: () -> rotary embedding of every token [depth or 1, heads or 1, N + 1, 2 D], sines then cosines, the last row for what
            has no place in the image; or None. Prefix tokens are not rotated.
        blocks: () -> the parts of every block.
        n_blocks: how many there are.
        dims: what MACs are counted from (see `macs.count`), plain JSON values.
        preprocess: of images.
        labels: () -> names of the classes that trained weights tell, or empty.
    """

    module: nn.Module
    n_tokens: int
    n_prefix: int
    has_class_token: bool
    patch: nn.Conv2d
    patch_norm: nn.Module
    norm_pre: nn.Module
    norm: nn.Module
    pooling: Pooling
    embed: Callable[[Tensor], Tensor]
    positions: Callable[[], Tensor]
    blocks: Callable[[], list[BlockParts]]
    n_blocks: int
    dims: dict
    preprocess: Preprocess
    rotary: Callable[[], Tensor | None] = field(default=lambda: None)
    labels: Callable[[], tuple[str, ...]] = field(default=tuple)

    @property
    def size(self) -> ModelSize:
        """What schedules are made for."""
        return ModelSize(self.n_tokens, self.n_prefix, self.n_blocks)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.dims["width"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch, size = self.patch, self.preprocess.size
        padding = (0, 0) if isinstance(patch.padding, str) else patch.padding
        rows, columns = ((s + 2 * p - k) // d + 1 for s, k, d, p in zip(size, patch.kernel_size, patch.stride, padding))
        if rows * columns != self.n_tokens - self.n_prefix:
            raise UsageError(
                f"patches: {rows} rows of {columns} at {size[0]} x {size[1]} pixels, the model has "
                f"{self.n_tokens - self.n_prefix}: they are no grid"
            )
        return rows, columns

    @property
    def output_name(self) -> str:
        """ "logits", or "features" when the model has no classes."""
        return "logits" if self.dims["classes"] > 0 else "features"

    def pools_by_size(self, schedule: Schedule) -> bool:
        """Whether a schedule makes the average pool at the end weigh tokens by their size (`Schedule.pool`).

        Raises: UsageError for "size" where there is no average pool.
        """
        if schedule.pool == "size" and not self.pooling.average:
            raise UsageError(
                "pool size weighs the tokens of an average pool, which this model does not have: leave it out"
            )
        weighed = schedule.pool == "size" or (schedule.pool == "auto" and self.pooling.by_size)
        return bool(schedule.steps) and self.pooling.average and weighed

    def check_schedule(self, schedule: Schedule, heads: nn.ModuleList | None = None) -> None:
        """Make sure a schedule is for this model.

        Args:
            schedule: with the model's own counts.
            heads: the trained layers of its signal, as many as the schedule says.
        Raises:
            UsageError: it is for another number of tokens, prefix tokens or blocks, or needs a class token or score heads that are
                not there.
        """
        if self.size != schedule.size:
            words = "{0} tokens ({1} of them prefix tokens) and {2} blocks"
            raise UsageError(
                f"the schedule is for {words.format(*schedule.size)}, the model has {words.format(*self.size)}"
            )
        signals = [SIGNALS[s.signal] for s in schedule.steps if s.signal is not None]
        if any(s.needs_class for s in signals) and not self.has_class_token:
            raise UsageError(
                f"{schedule.method} sorts tokens by the attention of the class token, which this model does not have: give "
                f'score="mean" (the mean attention a token receives, a substitute), or take another method'
            )
        self.pools_by_size(schedule)
        if any(s.learned for s in signals) and schedule.n_layers > len(heads or ()):
            raise UsageError(
                f"{schedule.method} needs {schedule.n_layers} trained layers, {len(heads or ())} were given: see "
                f"learned_layers(loaded, schedule)"
            )


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer of these very tensors, without a gradient.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def rotary_table(rope: Tensor, n_prefix: int) -> Tensor:
    """The rotary embedding of patches as `PlainViT.rotary` gives it.

    Args:
        rope: [.., n_patches, 2 D], sines then cosines, with none, one (heads) or two (depth, heads) axes in front.
        n_prefix: prefix tokens, which are not rotated, nor is what has no place in the image: the last row.
    """
    rope = rope.reshape(*[1] * (4 - rope.ndim), *rope.shape)
    half = torch.zeros_like(rope[:, :, :1, : rope.shape[-1] // 2])
    still = torch.cat([half, torch.ones_like(half)], -1)
    return torch.cat([still.expand(-1, -1, n_prefix, -1), rope, still], 2)
