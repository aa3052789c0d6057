"""The trainable parts of DiffRate's search: how many tokens a block keeps, as a distribution over candidates.

A selector of a block with P patches and granularity g chooses between the counts P, P - g, P - 2g, ... > 0. Its logits z give
probabilities p = softmax(z), and the block keeps ceil(sum_k p_k c_k) patches. The ceiling passes the gradient on unchanged, and each
token's chance to be among the kept ones enters the attention through a mask whose value is 0 or 1 and whose gradient is the chance's.

Worked example. P = 6, g = 2: candidates 6, 4, 2. With p = (0.2, 0.5, 0.3) the expected count is 3.8, so 4 patches and the class token
stay, kept = 5. Sorted by class attention, token t (0 is the class token) is kept by every candidate c with t < c + 1: the chances are
1, 1, 1, 0.7, 0.7, 0.2, 0.2 for t = 0 .. 6, and the mask is 1, 1, 1, 1, 1, 0, 0.

Source: DiffRate (Chen et al. 2023), section 3.3; semantics of the published code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPS = 1e-6  # keeps a row of the masked softmax from dividing by zero


class Selector(nn.Module):
    """How many tokens one block keeps after pruning, or after merging.

    Args:
        n_patches: patch tokens of the model.
        n_prefix: prefix tokens, which always stay.
        granularity: patches between two candidates; more than n_patches leaves one candidate, which keeps every token.
    """

    def __init__(self, n_patches: int, *, n_prefix: int = 1, granularity: int = 4):
        super().__init__()
        self.n_patches, self.n_prefix = n_patches, n_prefix
        self.register_buffer("candidates", torch.arange(n_patches, 0, -granularity, dtype=torch.float32))
        self.logits = nn.Parameter(torch.zeros(len(self.candidates)))

    @property
    def probability(self) -> Tensor:
        """Of every candidate, [K]."""
        return self.logits.softmax(0)

    def kept(self) -> Tensor:
        """Tokens that stay, prefix tokens included: a whole number whose gradient is that of the expected count."""
        expected = (self.probability * self.candidates.to(self.logits.dtype)).sum()
        return expected + (expected.ceil() - expected).detach() + self.n_prefix

    def token_probability(self) -> Tensor:
        """Chance of every place in the sorted sequence to be kept, [n_prefix + n_patches]; 1 for prefix tokens."""
        place = torch.arange(self.n_prefix + self.n_patches, device=self.logits.device)
        keeps = place[:, None] < self.candidates[None] + self.n_prefix
        chance = (keeps.to(self.logits.dtype) * self.probability).sum(1)
        return torch.cat([torch.ones_like(chance[: self.n_prefix]), chance[self.n_prefix :]])

    def mask(self, n_kept: int, n_present: int | None = None) -> Tensor:
        """1 for the tokens that stay and 0 for those that go, with the gradient of their chances, [n_prefix + n_patches].

        Args:
            n_kept: tokens that stay, the first ones in sorted order.
            n_present: tokens that are still there; the rows behind them, masked before, have a 1 here, so that a product of masks
                passes on the gradient of the earlier ones. None: all.
        """
        chance = self.token_probability()
        hard = torch.ones_like(chance)
        hard[n_kept:n_present] = 0
        return hard - chance.detach() + chance


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Attention in which masked tokens are not seen, though each sees itself.

    Args:
        logits: [B, H, N, N] scaled products, the log-sizes of the keys added.
        mask: [B, N] of 0 and 1 by key, with a gradient.
    Returns:
        [B, H, N, N] weights, rows sum to 1.
    """
    n = logits.shape[-1]
    eye = torch.eye(n, dtype=logits.dtype, device=logits.device)
    seen = mask[:, None, None, :] * (1 - eye) + eye
    weight = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    return (weight + EPS / n) / (weight.sum(-1, keepdim=True) + EPS)


def smallest(present: int, *kept: Tensor) -> Tensor:
    """The least of a count and two selectors' counts, with the gradient of the published code: every selector gets the whole of it,
    whichever is least, and the count itself gets none. A true minimum would leave the other selector where it is.

    Args:
        present: tokens that come in.
        kept: of the selectors of the block, scalars.
    """
    value = min([float(present), *(float(k.detach()) for k in kept)])
    return sum((k - k.detach() for k in kept), kept[0].new_tensor(value))
