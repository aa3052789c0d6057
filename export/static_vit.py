"""The ViT as a static graph: the same numbers as timm's, in the fewest nodes, with a schedule's steps in place.

Tokens are kept as rows [B N, C] so that a linear layer is one Gemm; the attention scale is folded into the query weights, LayerScale
into the projections, class, distillation and register tokens into the position embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import ops
from . import reducers, vit
from .apply import apply_static, use_target
from .plan import MergePlan, Signals, column, fixed_shape
from .schedule import Schedule


class StaticBlock(nn.Module):
    """One block over rows [B N, C]; weights are the timm block's, folded where that saves a node."""

    def __init__(self, block: nn.Module):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.heads, self.scale = attn.num_heads, None
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.attn_norm = getattr(attn, "norm", nn.Identity())
        self.qkv = attn.qkv
        if isinstance(attn.q_norm, nn.Identity):
            rows = attn.qkv.out_features // 3
            factor = torch.ones(attn.qkv.out_features, 1)
            factor[:rows] = attn.scale
            self.qkv = _scaled_linear(attn.qkv, factor)
        else:
            self.scale = attn.scale
        self.proj = _scaled_linear(attn.proj, _gamma(block.ls1))
        foldable = hasattr(mlp, "fc2") and isinstance(mlp.fc2, nn.Linear) and type(mlp).__name__ == "Mlp"
        parts = (mlp.fc1, mlp.act, mlp.norm, _scaled_linear(mlp.fc2, _gamma(block.ls2))) if foldable else (mlp, block.ls2)
        self.mlp = nn.Sequential(*parts)

    def attend(self, x, n: int, bias, images: int):
        """x [B n, C] -> x after the attention residual, and keys [B, heads, n, D]. bias: log sizes [B, 1, 1, n] or None."""
        h = self.heads
        qkv = self.qkv(self.norm1(x)).reshape(images, n, 3 * h, self.qkv.out_features // (3 * h)).transpose(1, 2)
        q, k, v = qkv.split(h, 1)
        q, k = self.q_norm(q), self.k_norm(k)
        logits = (q if self.scale is None else q * self.scale) @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, self.proj.in_features)
        return x + self.proj(self.attn_norm(y)), k


class StaticViT(nn.Module):
    """A timm ViT under a schedule, ready to be traced.

    model: a plain timm ViT; its weights are shared where they are not folded. batch: images per run, None for any number (one image
    needs no batch axis). sources: also give the map of input tokens.
    `forward(image [B, 3, H, W])` -> (logits or features, [sources,] *decisions); `decision_names` names the last.
    """

    def __init__(self, model: nn.Module, schedule: Schedule, batch: int | None = None, sources: bool = False):
        super().__init__()
        vit.check_plain_vit(model)
        vit.check_schedule(model, schedule)
        self.schedule, self.single, self.sources = schedule, batch == 1, sources
        self.batch_kind = "dynamic" if batch is None else "single" if batch == 1 else "fixed"
        self.n_prefix, self.has_class = model.num_prefix_tokens, vit.has_class_token(model)
        self.patch = model.patch_embed.proj
        self.patch_norm, self.norm_pre, self.norm = model.patch_embed.norm, model.norm_pre, model.norm
        self.pos = nn.Parameter(_positions(model), requires_grad=False)
        self.blocks = nn.ModuleList(StaticBlock(b) for b in model.blocks)
        self.head = Head(model)

    def _parts(self, step) -> tuple[str, ...]:
        return ("keep", "src", "dst", "target") if use_target(step.n_in, self.batch_kind) else ("keep", "src", "dst")

    @property
    def decision_names(self) -> list[str]:
        """Names of the plans' columns, in the order `forward` gives them: block3.keep, block3.src, ..."""
        return [f"block{s.block}.{part}" for s in self.schedule.steps for part in self._parts(s)]

    def forward(self, image):
        images, n = (1 if self.single else -1), self.schedule.n_tokens
        c = self.pos.shape[-1]
        x = self.patch(image)
        x = x.reshape(c, -1).t() if self.single else x.flatten(2).transpose(1, 2)
        x = self.patch_norm(x)
        x = F.pad(x, (0, 0, self.n_prefix, 0)) + self.pos if self.n_prefix else x + self.pos
        x = self.norm_pre(x.reshape(-1, c))
        size, sources, decisions = None, None, []
        steps, reducer = self.schedule.by_site, reducers.get(self.schedule.method)
        prop = self.schedule.options.get("prop_attn")
        for i, block in enumerate(self.blocks):
            bias = size.log().reshape(images, 1, 1, n) if prop and size is not None else None
            x, k = block.attend(x, n, bias, images)
            step = steps.get((i, "post_attn"))
            if step is not None:
                rows = x if self.single else x.reshape(-1, n, c)
                metric = k.mean((0, 1)) if self.single else k.mean(1)
                metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True)
                plan = reducer.static(Signals(rows, size, metric, self.n_prefix, self.has_class), step, use_target(n, self.batch_kind))
                rows, size = apply_static(plan, rows, size)
                if self.sources:
                    sources = _follow(plan, sources, step)
                decisions += [getattr(plan, part) for part in self._parts(step)]
                x, n = rows if self.single else rows.reshape(-1, c), step.n_out
            x = x + block.mlp(block.norm2(x))
        out = [self.head(self.norm, x if self.single else x.reshape(-1, n, c), self.single)]
        if self.sources:
            out.append(self._source_rows(sources, image))
        return (*out, *decisions)

    def _source_rows(self, sources, image):
        n0 = self.schedule.n_tokens
        if sources is None:  # nothing merges: every token stays where it is
            return torch.arange(n0).expand(image.shape[0], n0).clone()
        return sources.reshape(1 if self.single else -1, n0)


class Head(nn.Module):
    """Final norm, pooling and classifier(s). Row-wise layers see only the rows that are read."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.distilled = hasattr(model, "head_dist")
        self.by_row = self.distilled or (model.attn_pool is None and model.global_pool == "token")
        if self.distilled:  # the mean of two heads
            self.head, self.head_dist = model.head, model.head_dist
        else:
            self.pool, self.fc_norm, self.head = model.pool, model.fc_norm, model.head
            self.attn_pool = model.attn_pool

    def forward(self, norm, x, single: bool):
        if self.distilled:
            x = norm(ops.fixed_rows(x, [0, 1]))
            first, second = (x[:1], x[1:]) if single else (x[:, 0], x[:, 1])
            return (self.head(first) + self.head_dist(second)) / 2
        if self.by_row:
            x = norm(ops.fixed_rows(x, [0]) if single else x[:, 0])
        else:
            x = self.pool(norm(x[None] if single else x))
        return self.head(self.fc_norm(x))


def _gamma(scale: nn.Module) -> torch.Tensor | None:
    return None if isinstance(scale, nn.Identity) else scale.gamma.detach()[:, None]


def _scaled_linear(linear: nn.Linear, factor: torch.Tensor | None) -> nn.Linear:
    """The layer with output row i multiplied by factor[i, 0]; the layer itself for None."""
    if factor is None:
        return linear
    out = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    out.weight = nn.Parameter(linear.weight.detach() * factor, requires_grad=False)
    if linear.bias is not None:
        out.bias = nn.Parameter(linear.bias.detach() * factor[:, 0], requires_grad=False)
    return out


@torch.no_grad()
def _positions(model: nn.Module) -> torch.Tensor:
    """Prefix tokens and position embedding as one [N, C]: what the model adds to patches of zeros behind rows of zeros."""
    grid, c = model.patch_embed.grid_size, model.embed_dim
    empty = torch.zeros(1, *grid, c) if model.dynamic_img_size else torch.zeros(1, grid[0] * grid[1], c)
    return model._pos_embed(empty)[0].clone()


def _follow(plan: MergePlan, sources, step):
    """The source map [.., N0, 1] after one more plan (None: every token at its own place)."""
    shift = plan.labels.index(0)  # labels of hosts count up from 0 at this row
    rows = range(step.n_kept)
    kept = column(rows, plan.keep, full=True) if fixed_shape(plan.keep) else plan.keep * 0 + column(rows, plan.keep)
    order = torch.cat([plan.keep, plan.src], -2)
    table = ops.put_rows(order, order, torch.cat([kept, plan.dst + shift], -2))
    return table if sources is None else ops.take_rows(table, sources)
