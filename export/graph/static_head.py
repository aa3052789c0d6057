"""Final norm, pooling and classifiers as part of a static graph."""

from __future__ import annotations

from torch import Tensor, nn

from ...kernels import ops
from ..models.plain_vit import AttentionPool, Pooling


class StaticHead(nn.Module):
    """Final norm, pooling and classifier(s). Row-wise layers see only the rows that are read."""

    def __init__(self, pooling: Pooling):
        super().__init__()
        self.rows, self.fc_norm = pooling.rows, pooling.norm
        self.head = pooling.classifiers[0]
        self.head_dist = pooling.classifiers[1] if len(pooling.classifiers) > 1 else None
        self.pool = pooling.pool if pooling.attention is None else StaticAttentionPool(pooling.attention)

    def forward(self, norm: nn.Module, x: Tensor, single: bool, share: Tensor | None = None) -> Tensor:
        """Logits or features.

        Args:
            norm: the final one.
            x: tokens [.., n, C]; where the class token alone was computed [B, C].
            single: one image, whose tokens have no batch axis.
            share: of every token in the average pool [.., n, 1]; None for the model's own pooling.
        """
        if share is not None:
            x = ops.matmul(share, norm(x), True, False)
            return self.head(self.fc_norm(x if single else ops.reshape(x, [-1, x.shape[-1]])))
        if self.head_dist is not None:
            x = norm(self._read(x))
            first, second = (x[:1], x[1:]) if single else (x[:, 0], x[:, 1])
            return (self.head(first) + self.head_dist(second)) / 2
        if self.rows:
            x = norm(x[:, self.rows[0]] if x.ndim == 3 else self._read(x) if single else x)
        else:
            x = self.pool(norm(x[None] if single else x))
        return self.head(self.fc_norm(x))

    def _read(self, x: Tensor) -> Tensor:
        """The rows that are read [.., rows, C], of all or of those alone."""
        return x if x.shape[-2] == len(self.rows) else ops.fixed_rows(x, list(self.rows))


class StaticAttentionPool(nn.Module):
    """Pooling by learned queries: tokens [B, N, C] -> [B, C] ([B, L, C] unpooled)."""

    def __init__(self, pool: AttentionPool):
        super().__init__()
        self.skip, self.kind = pool.skip, pool.kind
        self.kv, self.k_norm, self.proj, self.norm, self.mlp = pool.kv, pool.k_norm, pool.proj, pool.norm, pool.mlp
        self.query = nn.Parameter(pool.query, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, self.skip :] if self.skip else x
        n, (_, h, latents, d) = x.shape[1], self.query.shape
        k, v = ops.reshape(self.kv(x), [-1, n, 2 * h, d]).transpose(1, 2).split(h, 1)
        y = (self.query @ self.k_norm(k).transpose(-1, -2)).softmax(-1) @ v
        y = self.proj(ops.reshape(y.transpose(1, 2), [-1, latents, h * d]))
        y = y if self.mlp is None else y + self.mlp(self.norm(y))
        return y[:, 0] if self.kind == "token" else y.mean(1) if self.kind == "avg" else y
