"""What the reference gives beside its pooled output: tokens, patches and where each patch went, followed token by token.

It knows nothing of merge plans: it looks at the tokens before and behind a step and at who is where.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .outputs import Emission

TINY = 1e-30  # the least length of a token


class Trail:
    """The way of every input token of a batch through a run.

    Args:
        emission: which outputs are asked for.
        grid: rows and columns of patches.
        n_prefix: prefix tokens in front of them.
        norm: the final one.
        x: tokens entering block 0 [B, N0, C].
    """

    def __init__(
        self, emission: Emission, *, grid: tuple[int, int], n_prefix: int, norm: Callable[[Tensor], Tensor], x: Tensor
    ):
        self.emission, self.grid, self.n_prefix, self.norm = emission, grid, n_prefix, norm
        self.honesty, self.last = x.new_zeros(x.shape[:2]), x.clone()

    def step(self, before, after) -> None:
        """Note what a reduction did.

        Args:
            before, after: tokens x [B, N, C] and sources [B, N0], as in the reference's state.
        """
        if "patches" not in self.emission.emit:
            return
        there = before.sources >= 0
        old, new = (_rows(state.x, state.sources.clamp(min=0)) for state in (before, after))
        cosine = (old * new).sum(-1) / (old.norm(dim=-1) * new.norm(dim=-1)).clamp(min=TINY)
        self.honesty += torch.where(there & (after.sources >= 0), (1 - cosine).clamp(min=0), 0.0)
        self.last = torch.where(there[..., None], old, self.last)

    def outputs(self, state, block: int | None) -> dict[str, Tensor]:
        """The outputs of a block, by name.

        Args:
            state: the reference's, behind the block.
            block: its index; None for the last, whose outputs go through the final norm and have no number.
        """
        norm = self.norm if block is None or self.emission.norm_layers else lambda x: x
        values, kinds = {"sources": state.sources}, self.emission.kinds
        if "tokens" in kinds:
            values |= {"tokens": norm(state.x), **self._geometry(state)}
        if "patches" in kinds:
            values |= self._patches(state, norm)
        return {kind if block is None else f"{kind}_{block}": values[kind] for kind in kinds}

    def _geometry(self, state) -> dict[str, Tensor]:
        """How many input tokens every token stands for, and where they are."""
        batch, n, _ = state.x.shape
        rows, columns = self.grid
        place = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
        place = torch.cat([torch.full((self.n_prefix, 2), -1), place]).to(state.x).expand(batch, -1, -1)
        held, index = (state.sources >= 0)[..., None].to(state.x), state.sources.clamp(min=0)[..., None]
        sizes = state.x.new_zeros(batch, n, 1).scatter_add(1, index, held)
        sums = state.x.new_zeros(batch, n, 2).scatter_add(1, index.expand(-1, -1, 2), place * held)
        return {"sizes": sizes[..., 0], "positions": sums / sizes}

    def _patches(self, state, norm) -> dict[str, Tensor]:
        sources = state.sources[:, self.n_prefix :]
        there = sources >= 0
        patches = norm(_rows(state.x, sources.clamp(min=0)))
        if self.emission.dropped == "last":
            patches = torch.where(there[..., None], patches, norm(self.last[:, self.n_prefix :]))
        elif self.emission.dropped == "zero":
            patches = torch.where(there[..., None], patches, 0.0)
        else:
            patches = _rows(patches, self._nearest(there))
        if self.emission.layout == "nchw":
            patches = patches.unflatten(1, self.grid).permute(0, 3, 1, 2)
        return {
            "patches": patches,
            "mask": there.to(state.x.dtype),
            "honesty": self.honesty[:, self.n_prefix :].clone(),
        }

    def _nearest(self, there: Tensor) -> Tensor:
        """The nearest patch that has a token, of equals the first [B, N]; there: [B, N]."""
        rows, columns = self.grid
        at = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()
        distance = torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist").square().round()
        distance = distance.to(there.device).expand(len(there), -1, -1)
        far = torch.where(there[:, None], distance, torch.inf)
        return (far == far.amin(-1, keepdim=True)).to(torch.int8).argmax(-1)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, M, C] of x [B, N, C] at index [B, M]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
