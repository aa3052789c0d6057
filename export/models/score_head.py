"""The score heads of DynamicViT and dTPS: as published, and as part of a static graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..constants import column, lift


class ScoreHead(nn.Module):
    """log-probabilities to keep and to drop every patch token (Rao et al. 2021): x [B, N, C] -> [B, N, 2].

    The second half of the channels is replaced by its mean over the tokens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        first, second, last = nn.Linear(width, width // 2), nn.Linear(width // 2, width // 4), nn.Linear(width // 4, 2)
        self.out_conv = nn.Sequential(*(first, nn.GELU(), second, nn.GELU(), last, nn.LogSoftmax(-1)))

    def forward(self, x: Tensor) -> Tensor:
        local, whole = self.in_conv(x).chunk(2, -1)
        return self.out_conv(torch.cat([local, whole.mean(1, keepdim=True).expand_as(local)], -1))


def make_heads(state: dict[str, Tensor], width: int) -> nn.ModuleList:
    """Score heads, one a stage, ready to be used.

    Args:
        state: {"0.in_conv.0.weight": ...}, checked by `score_heads.check_heads`.
        width: channels of a token.
    """
    heads = nn.ModuleList(ScoreHead(width) for _ in {k.split(".")[0] for k in state})
    heads.load_state_dict(state)
    return heads.eval().requires_grad_(False)


def head_scores(head: ScoreHead, x: Tensor, *, n_prefix: int) -> Tensor:
    """What a score head sorts by: the log-probability to keep less that to drop, prefix tokens lifted, [B, N, 1].

    The authors sort by the first alone: the same order, until it is so near 0 that float32 cannot tell tokens apart.

    Args:
        head: as published.
        x: tokens [B, N, C].
        n_prefix: prefix tokens at the head of the sequence, which the head does not see.
    """
    keep, drop = head(x[:, n_prefix:]).split(1, -1)
    score = torch.cat([keep.new_zeros(len(x), n_prefix, 1), keep - drop], 1)
    return score + score.new_tensor(lift(x.shape[1], n_prefix))[:, None]


class StaticScoreHead(nn.Module):
    """What the head sorts by, for a static graph: the logit to keep less that to drop, of which the log-probability is a monotone
    function. The layer behind the mean is split in two, one for each half of the channels, with zeros for the other half: the mean
    then goes through its part alone, and prefix tokens, which the mean leaves out, may pass through the rest.
    """

    def __init__(self, head: ScoreHead):
        super().__init__()
        first, self.second, last = head.out_conv[0], head.out_conv[2], head.out_conv[4]
        self.into, half, weight = head.in_conv, first.in_features // 2, first.weight.detach()
        keep = lambda t: nn.Parameter(t.contiguous(), requires_grad=False)
        self.local = keep(torch.cat([weight[:, :half], torch.zeros_like(weight[:, half:])], 1).t())
        self.whole = keep(torch.cat([torch.zeros_like(weight[:, :half]), weight[:, half:]], 1).t())
        self.bias = keep(first.bias.detach()[None])
        self.last = keep((last.weight[:1] - last.weight[1:]).detach().t())
        self.shift = float(last.bias[0] - last.bias[1])
        self.act = nn.GELU()

    def forward(self, x: Tensor, n_prefix: int) -> Tensor:
        """Scores of tokens.

        Args:
            x: tokens [.., N, C].
            n_prefix: prefix tokens at the head of the sequence.
        Returns:
            [.., N, 1], prefix tokens lifted.
        """
        n = x.shape[-2]
        h = self.into(x)
        share = ops.floats([0.0] * n_prefix + [1 / (n - n_prefix)] * (n - n_prefix), [*[1] * (x.ndim - 2), 1, n])
        mean = ops.addmm(ops.matmul(share, h, False, False), self.whole, self.bias, False, False)
        h = self.act(self.second(self.act(ops.addmm(h, self.local, mean, False, False))))
        return ops.addmm(h, self.last, column([self.shift + v for v in lift(n, n_prefix)], h), False, False)
