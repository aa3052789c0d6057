"""A ViT in which tokens are masked instead of removed, so that the counts of DiffRate's blocks can be learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...export.models import vit
from .selectors import Selector, masked_softmax


@dataclass
class MaskedTokens:
    """The tokens of a batch on their way through the blocks.

    Attributes:
        x: [B, N, C], all tokens, the masked ones last.
        size: [B, N, 1] input tokens that each stands for.
        mask: [B, N] 1 for tokens that are there, with the gradient of their chances.
        n_present: how many are there, in every image.
    """

    x: Tensor
    size: Tensor
    mask: Tensor
    n_present: int


class MaskedViT(nn.Module):
    """A frozen ViT with two selectors a block, in the training form: every token stays and a mask says which ones count.

    Args:
        model: a plain ViT with a class token; its weights are not trained.
        granularity: patches between two candidates of a selector.
        fixed_last: the last block keeps every token as the first one does (models that pool over patches).
    """

    def __init__(self, model: nn.Module, *, granularity: int = 4, fixed_last: bool = False):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        n_patches, depth = model.patch_embed.num_patches, len(model.blocks)
        self.n_prefix = model.num_prefix_tokens

        def selector(block: int) -> Selector:
            still = block == 0 or (fixed_last and block == depth - 1)
            step = n_patches + 1 if still else granularity
            return Selector(n_patches, n_prefix=self.n_prefix, granularity=step)

        self.prune = nn.ModuleList(selector(b) for b in range(depth))
        self.merge = nn.ModuleList(selector(b) for b in range(depth))

    @property
    def n_tokens(self) -> int:
        """Tokens into the first block."""
        return self.n_prefix + self.model.patch_embed.num_patches

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """(after pruning, after merging) of every block, as scalars with a gradient."""
        return [(p.kept(), m.kept()) for p, m in zip(self.prune, self.merge)]

    def counts(self) -> tuple[list[int], list[int]]:
        """The same as whole numbers: prune_kept and merge_kept, one a block."""
        kept = self.kept()
        return [int(p) for p, _ in kept], [int(m) for _, m in kept]

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, H, W] -> logits or features, with a gradient to the selectors."""
        model = self.model
        x, rope = vit.embed(model, model.patch_embed(image))
        if rope is not None:
            raise NotImplementedError
        x = model.norm_pre(x)
        ones = torch.ones_like(x[..., :1])
        tokens = MaskedTokens(x, ones, ones[..., 0], self.n_tokens)
        for i, block in enumerate(model.blocks):
            tokens = self.block(i, vit.parts(block), tokens)
        return self.pool(tokens)

    def block(self, index: int, parts: vit.BlockParts, tokens: MaskedTokens) -> MaskedTokens:
        """One block: masked attention, sorting, pruning and merging by mask, MLP."""
        q, k, v = vit.split_heads(parts, parts.norm1(tokens.x))
        logits = (q * parts.scale) @ k.mT + tokens.size.log()[:, None, None, :, 0]
        attention = masked_softmax(logits, tokens.mask)
        out = parts.proj((attention @ v).transpose(1, 2).flatten(2))
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
        row = lambda t: t.gather(1, order[..., None].expand(-1, -1, t.shape[-1]))  # noqa: E731
        return MaskedTokens(row(x), row(tokens.size), tokens.mask.gather(1, order), tokens.n_present)

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

    def pool(self, tokens: MaskedTokens) -> Tensor:
        """Class token, or the mean over the patches that are there, by size; then the classifier."""
        model, rows = self.model, self.model.norm(tokens.x)
        if getattr(model, "global_pool", "token") != "avg":
            return model.forward_head(rows)
        weight = (tokens.size[..., 0] * tokens.mask)[:, self.n_prefix :, None]
        pooled = (rows[:, self.n_prefix :] * weight).sum(1) / weight.sum(1).detach()
        return model.head(model.fc_norm(pooled))
