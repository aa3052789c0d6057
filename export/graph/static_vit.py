"""The ViT as a static graph: the same numbers as timm's, in the fewest nodes, with a schedule's steps in place.

Tokens are kept as rows [B N, C] so that a linear layer is one Gemm; the attention scale is folded into the query weights, LayerScale
into the projections, class, distillation and register tokens into the position embedding.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import ops
from .. import reducers
from ..models import vit
from ..apply import apply_static, use_target
from ..plan import MergePlan, Signals, column, constant, lift
from ..schedule import Schedule
from ..models.score_head import StaticScoreHead


class Stage(nn.Module):
    """A function as a module, so that its nodes in the graph are named after it (see `stages.of_scopes`)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class StaticBlock(nn.Module):
    """One block over rows [B N, C]; weights are the timm block's, folded where that saves a node."""

    def __init__(self, p: vit.BlockParts, single: bool, n_prefix: int, rotary: bool):
        super().__init__()
        self.single, self.n_prefix, self.heads, self.scale = single, n_prefix, p.heads, None
        self.norm1, self.norm2, self.attn_norm, self.gate = p.norm1, p.norm2, p.norm, p.gate
        self.q_norm, self.k_norm, self.qkv = p.q_norm, p.k_norm, p.qkv
        if rotary and not p.half:
            self.qkv, self.q_norm, self.k_norm = _halved(p)
        if isinstance(p.q_norm, nn.Identity):
            rows = p.qkv.out_features // 3
            self.qkv = _scaled_linear(self.qkv, torch.cat([torch.full((rows,), p.scale), torch.ones(2 * rows)]))
        else:
            self.scale = p.scale
        self.proj = _scaled_linear(p.proj, p.gamma1)
        self.mlp = copy.copy(p.mlp)  # the block's own, but for its last layer
        self.mlp._modules = {**p.mlp._modules, "fc2": _scaled_linear(p.mlp.fc2, p.gamma2)}
        self.unit, self.bias, self.score = Stage(_unit), Stage(self._bias), Stage(self._score)

    def forward(self, x, n: int, size, needs: tuple[str, ...], of: str = "class", rope=None):
        """x [B n, C] -> x after the attention residual, and what is needed of "metric" and "attention" (see `Signals`).

        size: [.., n, 1] for proportional attention, or None. rope: (sines, cosines) [B or 1, heads or 1, n, D], or None.
        Signals have a batch axis when B is not 1.
        """
        h, single, images = self.heads, self.single, 1 if self.single else -1
        y = self.norm1(x)
        qkv = ops.reshape(self.qkv(y), [images, n, 3 * h, self.qkv.out_features // (3 * h)]).transpose(1, 2)
        q, k, v, q_turned, k_turned = self._turned(qkv, rope)
        q, k_t = q_turned if self.scale is None else q_turned * self.scale, k_turned.transpose(-1, -2)
        bias = None if size is None else self.bias(size, n)
        logits = q @ k_t
        attention = (logits if bias is None else logits + bias).softmax(-1)
        out = self.attn_norm(ops.reshape((attention @ v).transpose(1, 2), [-1, self.proj.in_features]))
        out = out if self.gate is None else out * self.gate(y).sigmoid()
        found = {}
        if "metric" in needs:
            found["metric"] = self.unit(k.mean((0, 1)) if single else k.mean(1))
        if (
            "attention" in needs
        ):  # the class token's row is computed by itself: the attention stays one that engines fuse
            found["score"] = (
                self.score(ops.fixed_rows(q, [0]) @ k_t, bias, n) if of == "class" else self.score(attention, None, n)
            )
        return x + self.proj(out), found

    def _bias(self, size, n: int):
        """Proportional attention: the logarithm of sizes [.., n, 1] as [B, 1, 1, n]."""
        return ops.reshape(size, [1 if self.single else -1, 1, 1, n]).log()

    def _score(self, rows, bias, n: int):
        """Mean attention received [.., n, 1], prefix tokens lifted: of logits [B, heads, 1, n], or of attention [B, heads, n, n]."""
        one = rows.shape[-2] == 1
        rows = (rows if bias is None else rows + bias).softmax(-1) if one else rows
        m = self.heads if one else self.heads * n
        rows = ops.reshape(rows, [m, n] if self.single else [-1, m, n])
        return ops.addmm(rows, ops.floats([1 / m] * m, [m, 1]), column(lift(n, self.n_prefix), rows), True, False)

    def _turned(self, qkv, rope):
        """q, k, v [B, heads, n, D], and q and k turned by the rotary embedding; both at once where no norm comes between."""
        h = self.heads
        if rope is None or not isinstance(self.q_norm, nn.Identity):
            q, k, v = qkv.split(h, 1)
            q, k = self.q_norm(q), self.k_norm(k)
            return q, k, v, _turn(q, rope), _turn(k, rope)
        qk, v = qkv.split([2 * h, h], 1)
        both = _turn(qk, rope) if rope[0].shape[1] == 1 else torch.cat([_turn(t, rope) for t in qk.split(h, 1)], 1)
        return *qk.split(h, 1), v, *both.split(h, 1)


def _unit(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _turn(x, rope):
    """x cos + (second half, first half) sin; the sines of the first half are negative."""
    if rope is None:
        return x
    low, high = x.split(x.shape[-1] // 2, -1)
    return x * rope[1] + torch.cat([high, low], -1) * rope[0]


def _halves(d: int) -> list[int]:
    """Even channels, then odd ones: the order that turns timm's interleaved rotary layout into halves."""
    return [*range(0, d, 2), *range(1, d, 2)]


def _halved(p: vit.BlockParts):
    """qkv, q_norm and k_norm with the channels of every query and key head in the order of `_halves`."""
    d = p.qkv.out_features // (3 * p.heads)
    turned = [base + i for base in range(0, 2 * p.heads * d, d) for i in _halves(d)]
    order = torch.tensor(turned + list(range(len(turned), 3 * p.heads * d)))
    norms = []
    for norm in (p.q_norm, p.k_norm):
        norm = copy.copy(norm)
        halved = lambda v: None if v is None else nn.Parameter(v.detach()[_halves(d)], requires_grad=False)
        norm._parameters = {k: halved(v) for k, v in norm._parameters.items()}
        norms.append(norm)
    return vit.linear(p.qkv.weight[order], None if p.qkv.bias is None else p.qkv.bias[order]), *norms


class StaticViT(nn.Module):
    """A timm ViT under a schedule, ready to be traced.

    model: a plain timm ViT; its weights are shared where they are not folded. batch: images per run, None for any number (one image
    needs no batch axis). sources: also give the map of input tokens. heads: score heads of the methods that have them.
    `forward(image [B, C, H, W])` -> (logits or features, [sources,] *decisions); `decisions` then names the last ones: block3.keep, ...
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        batch: int | None = None,
        sources: bool = False,
        heads: nn.ModuleList | None = None,
    ):
        super().__init__()
        vit.check_plain_vit(model)
        vit.check_schedule(model, schedule, heads)
        self.schedule, self.single, self.sources, self.any_batch = schedule, batch == 1, sources, batch is None
        self.batch_kind = "dynamic" if batch is None else "single" if batch == 1 else "fixed"
        self.n_prefix, self.has_class = model.num_prefix_tokens, vit.has_class_token(model)
        self.patch = model.patch_embed.proj
        self.patch_norm, self.norm_pre, self.norm = model.patch_embed.norm, model.norm_pre, model.norm
        self.pos = nn.Parameter(_positions(model), requires_grad=False)
        parts = [vit.parts(b) for b in model.blocks]
        table = vit.rotary_table(model)
        self.blocks = nn.ModuleList(StaticBlock(p, self.single, self.n_prefix, table is not None) for p in parts)
        self.rotary = None if table is None else Rotary(table, parts[0].half, self.single)
        self.score_heads = nn.ModuleList(StaticScoreHead(h) for h in heads or ())
        self.head, self.by_size = Head(model), vit.pools_by_size(model, schedule)
        self.share = Stage(self._share)
        reducer = reducers.get(schedule.method)
        self.match = nn.ModuleDict({str(s.block): Stage(reducer.static) for s in schedule.steps})
        self.merge = nn.ModuleDict({str(s.block): Stage(apply_static) for s in schedule.steps})
        self.drops = schedule.method in reducers.SQUEEZE or any(s.n_kept + s.n_folded < s.n_in for s in schedule.steps)
        self.last = SimpleNamespace(
            decisions=[]
        )  # what torch.export does not put back as it was, as it does attributes

    def forward(self, image):
        n, c, options = self.schedule.n_tokens, self.pos.shape[-1], self.schedule.options
        x = self.patch(image)
        x = ops.reshape(x, [c, -1]).t() if self.single else ops.reshape(x, [-1, c, n - self.n_prefix]).transpose(1, 2)
        x = self.patch_norm(x)
        x = F.pad(x, (0, 0, self.n_prefix, 0)) + self.pos if self.n_prefix else x + self.pos
        x = self.norm_pre(ops.reshape(x, [-1, c]))
        steps, reducer = self.schedule.by_site, reducers.get(self.schedule.method)
        state = _State()
        for i, block in enumerate(self.blocks):
            if (i, "pre_block") in steps:
                score = self.score_heads[options["at"].index(i)](self._rows(x, n), self.n_prefix)
                x, n = self._reduce(steps[i, "pre_block"], x, n, {"score": score}, state)
            needs = reducer.NEEDS if (i, "post_attn") in steps else ()
            rope = None if self.rotary is None else self.rotary(i, state.place)
            x, found = block(
                x, n, state.size if options.get("prop_attn") else None, needs, options.get("score", "class"), rope
            )
            if (i, "post_attn") in steps:
                x, n = self._reduce(steps[i, "post_attn"], x, n, found, state)
            x = x + block.mlp(block.norm2(x))
        rows = self._rows(x, n)
        share = None if not self.by_size or state.size is None else self.share(state.size)
        out = [self.head(self.norm, rows, self.single, share)]
        if self.sources:
            out.append(self._source_rows(state.sources, rows))
        self.last.decisions = list(state.decisions)
        return (*out, *state.decisions.values())

    @property
    def decisions(self) -> list[str]:
        """Names of what the last `forward` gave behind its outputs."""
        return self.last.decisions

    def _share(self, size):
        """Share of every patch token in a pool by size [.., n, 1], prefix tokens 0."""
        n = size.shape[-2]
        size = size * column([0.0] * self.n_prefix + [1.0] * (n - self.n_prefix), size)
        return size / ops.matmul(size, ops.floats([1.0] * n, [n, 1]), True, False)

    def _rows(self, x, n):
        """[B n, C] with its batch axis, or as it is for one image."""
        return x if self.single else ops.reshape(x, [-1, n, x.shape[-1]])

    def _reduce(self, step, x, n, found, state):
        rows = self._rows(x, n)
        signals = Signals(rows, self.n_prefix, self.has_class, state.size, any_batch=self.any_batch, **found)
        plan = self.match[str(step.block)](signals, step, use_target(n, self.batch_kind))
        to_attention = bool(self.schedule.options.get("prop_attn")) and step.block < len(self.blocks) - 1
        rows, state.size = self.merge[str(step.block)](plan, rows, state.size, to_attention)
        if self.sources:
            state.sources = self._follow(plan, state.sources, step)
        if self.rotary is not None:
            state.place = self._places(plan, state.place, step)
        parts = ("keep", "src") if plan.order is None else ("order",)
        for part in (*parts, *(("dst", "target") if plan.src is not None and not plan.n_extra else ())):
            if getattr(plan, part) is not None:
                state.decisions[f"block{step.block}.{part}"] = getattr(plan, part)
        return rows if self.single else ops.reshape(rows, [-1, x.shape[-1]]), step.n_out

    def _follow(self, plan: MergePlan, sources, step):
        """The source map [.., N0, 1] after one more plan (None: every token at its own place). Row n_out stands for gone."""
        shift = plan.labels.index(0) if plan.labels else 0  # labels of hosts count up from 0 at this row
        fill = lambda values: constant(values, plan.keep, self.any_batch)
        order, row_of = plan.order, fill(range(step.n_kept))
        if plan.squeezed:
            row_of = torch.cat([row_of, fill([step.n_out] * step.n_folded)], -2)
        elif plan.src is not None:
            host = fill([step.n_kept] * step.n_folded) if plan.n_extra else plan.dst + shift if shift else plan.dst
            row_of = torch.cat([row_of, host], -2)
            order = torch.cat([plan.keep, plan.src], -2) if order is None else order
        table = ops.put_rows(fill([step.n_out] * (step.n_in + 1)) if self.drops else order, order, row_of)
        if sources is not None:
            return ops.take_rows(table, sources)
        return ops.fixed_rows(table, list(range(step.n_in))) if self.drops else table

    def _places(self, plan, place, step):
        """Where tokens stand in the image [.., n, 1] after one more plan; one made of others stands nowhere."""
        place = plan.keep if place is None else ops.take_rows(place, plan.keep)
        return (
            torch.cat([place, constant([self.schedule.n_tokens], plan.keep, self.any_batch)], -2)
            if plan.n_extra
            else place
        )

    def _source_rows(self, sources, rows):
        """[B, N0], -1 for what is gone."""
        n0 = self.schedule.n_tokens
        if sources is None:  # nothing is reduced: every token stays where it is
            sources = constant(range(n0), (rows[..., :1] * 0).to(torch.int64), self.any_batch)
        sources = ops.reshape(sources, [1 if self.single else -1, n0])
        return torch.where(sources == self.schedule.n_final, -1, sources) if self.drops else sources


@dataclass
class _State:
    """What goes from one reduction to the next."""

    size: object = None
    sources: object = None
    place: object = None
    decisions: dict = field(default_factory=dict)


class Rotary(nn.Module):
    """Sines and cosines of the tokens there are, out of the table of all (see `vit.rotary_table`), laid out in halves."""

    def __init__(self, table: torch.Tensor, half: bool, single: bool):
        super().__init__()
        self.images, self.heads, d = 1 if single else -1, table.shape[1], table.shape[-1] // 2
        sin, cos = table.split(d, -1)
        if not half:
            sin, cos = sin[..., _halves(d)], cos[..., _halves(d)]
        sin = torch.cat([-sin[..., : d // 2], sin[..., d // 2 :]], -1)
        rows = torch.cat([sin, cos], -1).transpose(1, 2).flatten(2).contiguous()
        self.tables = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in rows)  # [N + 1, heads 2 D] each

    def forward(self, block: int, place):
        """place: [.., n, 1] rows of the table, None for all tokens in order."""
        table = self.tables[block % len(self.tables)]
        rows, images = (table[:-1].clone(), 1) if place is None else (ops.look_up(table, place), self.images)
        d, n = table.shape[1] // self.heads, rows.shape[-2]
        if self.heads > 1:
            rows = ops.reshape(rows, [images, n, self.heads, d]).transpose(1, 2)
        else:
            rows = ops.reshape(rows, [images, 1, n, d])
        return rows.split(d // 2, -1)


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
            if model.attn_pool is not None:
                whole = getattr(model, "pool_include_prefix", True)  # EVA pools all tokens
                self.pool = StaticAttentionPool(model.attn_pool, 0 if whole else model.num_prefix_tokens)

    def forward(self, norm, x, single: bool, share=None):
        """x: tokens [.., n, C]. share: of every token in the average pool [.., n, 1], None for timm's own pooling."""
        if share is not None:
            x = ops.matmul(share, norm(x), True, False)
            return self.head(self.fc_norm(x if single else ops.reshape(x, [-1, x.shape[-1]])))
        if self.distilled:
            x = norm(ops.fixed_rows(x, [0, 1]))
            first, second = (x[:1], x[1:]) if single else (x[:, 0], x[:, 1])
            return (self.head(first) + self.head_dist(second)) / 2
        if self.by_row:
            x = norm(ops.fixed_rows(x, [0]) if single else x[:, 0])
        else:
            x = self.pool(norm(x[None] if single else x))
        return self.head(self.fc_norm(x))


class StaticAttentionPool(nn.Module):
    """timm's AttentionPoolLatent over tokens [B, N, C] -> [B, C] ([B, L, C] unpooled), its queries, which no image changes, ready."""

    def __init__(self, pool: nn.Module, n_prefix: int):
        super().__init__()
        self.n_prefix, self.heads, self.kind = n_prefix, pool.num_heads, pool.pool
        self.kv, self.k_norm, self.proj, self.norm, self.mlp = pool.kv, pool.k_norm, pool.proj, pool.norm, pool.mlp
        with torch.no_grad():
            q = pool.q(pool.latent).reshape(1, pool.latent_len, pool.num_heads, -1).transpose(1, 2)
            self.query = nn.Parameter((pool.q_norm(q) * pool.scale).contiguous(), requires_grad=False)

    def forward(self, x):
        x = x[:, self.n_prefix :] if self.n_prefix else x
        n, (_, h, latents, d) = x.shape[1], self.query.shape
        k, v = ops.reshape(self.kv(x), [-1, n, 2 * h, d]).transpose(1, 2).split(h, 1)
        y = (self.query @ self.k_norm(k).transpose(-1, -2)).softmax(-1) @ v
        y = self.proj(ops.reshape(y.transpose(1, 2), [-1, latents, h * d]))
        y = y if self.mlp is None else y + self.mlp(self.norm(y))
        return y[:, 0] if self.kind == "token" else y.mean(1) if self.kind == "avg" else y


def _scaled_linear(layer: nn.Linear, factor: torch.Tensor | None) -> nn.Linear:
    """The layer with output row i multiplied by factor[i]; the layer itself for None."""
    if factor is None:
        return layer
    factor = factor.to(layer.weight.dtype)
    return vit.linear(
        layer.weight.detach() * factor[:, None], None if layer.bias is None else layer.bias.detach() * factor
    )


@torch.no_grad()
def _positions(model: nn.Module) -> torch.Tensor:
    """Prefix tokens and position embedding as one [N, C]: what the model adds to patches of zeros behind rows of zeros."""
    return vit.embed(model, vit.empty_patches(model))[0][0].clone()
