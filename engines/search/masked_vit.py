"""A ViT in which tokens are masked instead of removed, so that the counts of DiffRate's blocks can be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...export.models import as_plain
from ...export.models.plain_vit import BlockParts
from ...export.reference import rotated
from .selectors import Selector, masked_softmax


@dataclass
class MaskedTokens:
    """The tokens of a batch on their way through the blocks.

    Attributes:
        x: [B, N, C], all tokens, the masked ones last.
        size: [B, N, 1] input tokens that each stands for.
        mask: [B, N] 1 for tokens that are there, with the gradient of their chances.
        n_present: how many are there, in every image.
        place: [B, N] where each stands in the image, a row of the rotary table.
    """

    x: Tensor
    size: Tensor
    mask: Tensor
    n_present: int
    place: Tensor


class MaskedViT(nn.Module):
    """A frozen ViT with two selectors a block, in the training form: every token stays and a mask says which ones count.

    Args:
        model: a plain ViT (see `models.FAMILIES`) with a class token; its weights are not trained.
        granularity: patches between two candidates of a selector.
        fixed_last: the last block keeps every token as the first one does (models that pool over patches).
    """

    def __init__(self, model: nn.Module, *, granularity: int = 4, fixed_last: bool = False):
        super().__init__()
        self.plain = as_plain(model)
        self.module = self.plain.module.eval().requires_grad_(False)
        self.n_tokens, self.n_prefix, depth = self.plain.size
        n_patches = self.n_tokens - self.n_prefix

        def selector(block: int) -> Selector:
            still = block == 0 or (fixed_last and block == depth - 1)
            step = n_patches + 1 if still else granularity
            return Selector(n_patches, n_prefix=self.n_prefix, granularity=step)

        self.prune = nn.ModuleList(selector(b) for b in range(depth))
        self.merge = nn.ModuleList(selector(b) for b in range(depth))

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """(after pruning, after merging) of every block, as scalars with a gradient."""
        return [(p.kept(), m.kept()) for p, m in zip(self.prune, self.merge)]

    def counts(self) -> tuple[list[int], list[int]]:
        """The same as whole numbers: prune_kept and merge_kept, one a block."""
        kept = self.kept()
        return [int(p) for p, _ in kept], [int(m) for _, m in kept]

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> logits or features, with a gradient to the selectors."""
        x, table = self.plain.embed(image), self.plain.rotary()
        ones = torch.ones_like(x[..., :1])
        place = torch.arange(self.n_tokens, device=x.device).expand(len(x), -1)
        tokens = MaskedTokens(x, ones, ones[..., 0], self.n_tokens, place)
        for i, parts in enumerate(self.plain.blocks()):
            rope = None if table is None else table[i % len(table)][:, tokens.place].transpose(0, 1)
            tokens = self._block(i, parts, tokens, rope=rope)
        return self._pool(tokens)

    def _block(self, index: int, parts: BlockParts, tokens: MaskedTokens, *, rope: Tensor | None) -> MaskedTokens:
        """One block: masked attention, sorting, pruning and merging by mask, MLP."""
        y = parts.norm1(tokens.x)
        q, k, v = parts.split_heads(y)
        if rope is not None:
            q, k = (rotated(t, rope, half=parts.half) for t in (q, k))
        logits = (q * parts.scale) @ k.mT + tokens.size.log()[:, None, None, :, 0]
        attention = masked_softmax(logits, tokens.mask)
        out = parts.norm((attention @ v).transpose(1, 2).flatten(2))
        out = parts.proj(out if parts.gate is None else out * parts.gate(y).sigmoid())
        x = tokens.x + (out if parts.gamma1 is None else out * parts.gamma1)
        tokens = self._sorted(x, attention, tokens)
        tokens = self._pruned(self.prune[index], tokens)
        tokens = self._merged(self.merge[index], tokens)
        out = parts.mlp(parts.norm2(tokens.x))
        tokens.x = tokens.x + (out if parts.gamma2 is None else out * parts.gamma2)
        return tokens

    def _sorted(self, x: Tensor, attention: Tensor, tokens: MaskedTokens) -> MaskedTokens:
        """All rows by falling class attention, prefix tokens first; masked rows have next to none and come last."""
        score = attention[:, :, 0].mean(1).detach()[:, self.n_prefix :]
        order = score.sort(dim=1, descending=True, stable=True).indices + self.n_prefix
        prefix = torch.arange(self.n_prefix, device=x.device).expand(len(x), -1)
        order = torch.cat([prefix, order], 1)
        x = x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        size, mask, place = (
            tokens.size.gather(1, order[..., None]),
            tokens.mask.gather(1, order),
            tokens.place.gather(1, order),
        )
        return MaskedTokens(x, size, mask, tokens.n_present, place)

    def _pruned(self, selector: Selector, tokens: MaskedTokens) -> MaskedTokens:
        n_kept = int(selector.kept())
        if n_kept < tokens.n_present:
            tokens.mask = tokens.mask * selector.mask(n_kept, tokens.n_present)
            tokens.n_present = n_kept
        return tokens

    def _merged(self, selector: Selector, tokens: MaskedTokens) -> MaskedTokens:
        """The rows behind the kept ones go into the kept row of the most similar x, which becomes their plain mean.

        Sizes: a source's is multiplied by its cosine, then all are raised to at least 1, then a source's is added to its host's.
        """
        n, n_kept = tokens.n_present, int(selector.kept())
        if n_kept >= n:
            return tokens
        x, size = tokens.x, tokens.size
        unit = x.detach()[:, :n] / x.detach()[:, :n].norm(dim=-1, keepdim=True)
        cosine = unit[:, n_kept:] @ unit[:, :n_kept].mT
        cosine[..., : self.n_prefix] = -torch.inf
        value, host = cosine.max(-1, keepdim=True)
        size = torch.cat([size[:, :n_kept], size[:, n_kept:n] * value, size[:, n:]], 1).clamp(min=1)
        wide = host.expand(-1, -1, x.shape[-1])
        members = torch.ones_like(size[:, :n_kept]).scatter_add(1, host, torch.ones_like(value))
        hosts = x[:, :n_kept].scatter_add(1, wide, x[:, n_kept:n]) / members
        hosts_size = size[:, :n_kept].scatter_add(1, host, size[:, n_kept:n])
        tokens.x = torch.cat([hosts, x[:, n_kept:]], 1)
        tokens.size = torch.cat([hosts_size, size[:, n_kept:]], 1)
        tokens.mask = tokens.mask * selector.mask(n_kept, n)
        tokens.n_present = n_kept
        return tokens

    def _pool(self, tokens: MaskedTokens) -> Tensor:
        """Prefix rows, or the mean over the patches that are there, by size; then the classifier."""
        pooling, rows = self.plain.pooling, self.plain.norm(tokens.x)
        if not pooling.average:
            return pooling.forward(rows)
        weight = (tokens.size[..., 0] * tokens.mask)[:, self.n_prefix :, None]
        pooled = (rows[:, self.n_prefix :] * weight).sum(1) / weight.sum(1).detach()
        return pooling.classifiers[0](pooling.norm(pooled))
