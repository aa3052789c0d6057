"""The ViT as a static graph: the model's own numbers, in the fewest nodes, with a schedule's steps in place.

Tokens are kept as rows [B N, C] so that a linear layer is one Gemm; class, distillation and register tokens are folded into the
position embedding. Blocks and the head have files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from .. import reducers
from ..apply import Form, apply_static, choose_form, lay_out
from ..constants import column, constant
from ..models import as_plain
from ..models.plain_vit import PlainViT
from ..models.score_head import StaticScoreHead
from ..nodes import follows_sizes
from ..outputs import POOLED, Emission
from ..pixels import Pixels
from ..plan import ATTENTION_SIGNALS, MergePlan, Signals, StaticLayout
from ..reducers import matching
from ..schedule import Schedule
from ..step import Step
from ..tail import Tail, in_file
from .calls import boundaries
from .static_block import Stage, StaticBlock, StaticMetric, StaticSignal, StaticTail, halves, size_bias
from .static_head import StaticHead
from .static_outputs import StaticOutputs, StaticTrail


class StaticViT(nn.Module):
    """A ViT under a schedule, ready to be traced.

    Args:
        model: a plain ViT, or a PlainViT; its weights are shared where they are not folded.
        schedule: of the same model.
        batch: images per run, None for any number (one image needs no batch axis).
        heads: layers that were trained for the schedule's signal, see `learned_layers`.
        emission: which outputs are given.
        pixels: what images are made of, None for normalised ones.
        calls: name the values that go into and come out of every reduction, so that it can become one node (see `calls`).
        tail: what is computed of the last block, see `tail.choose_tail`.
    """

    def __init__(
        self,
        model: nn.Module | PlainViT,
        schedule: Schedule,
        batch: int | None = None,
        heads: nn.ModuleList | None = None,
        *,
        emission: Emission = POOLED,
        pixels: Pixels | None = None,
        calls: bool = False,
        tail: Tail = "full",
    ):
        super().__init__()
        plain = as_plain(model)
        plain.check_schedule(schedule, heads)
        schedule, self.tail = in_file(schedule, tail), tail
        self.schedule, self.single, self.any_batch, self.pixels = schedule, batch == 1, batch is None, pixels
        self.emission = emission.resolved(schedule.depth)
        self.n_blocks = self.emission.last_block(schedule.depth) + 1
        self.batch_kind = "dynamic" if batch is None else "single" if batch == 1 else "fixed"
        self.n_prefix, self.has_class, self.output_name = plain.n_prefix, plain.has_class_token, plain.output_name
        self.patch = plain.patch if pixels is None else pixels.folded(plain.patch)
        self.patch_norm, self.norm_pre, self.norm = plain.patch_norm, plain.norm_pre, plain.norm
        self.pos = nn.Parameter(plain.positions(), requires_grad=False)
        parts, table = plain.blocks(), plain.rotary()
        shape = {"single": self.single, "n_prefix": self.n_prefix, "rotary": table is not None}
        metric = {(s.block, s.site): heads[s.layer] for s in schedule.steps if s.signal == "metric_layer"}
        self.blocks = nn.ModuleList(
            StaticBlock(p, **shape, metric=metric.get((i, "post_attn"))) for i, p in enumerate(parts)
        )
        if tail == "class":
            self.blocks[-1] = StaticTail(parts[-1], **shape)
        self.rotary = None if table is None else Rotary(table, half=parts[0].half, single=self.single)
        in_front = [s for s in schedule.steps if s.site == "pre_block" and s.signal in ATTENTION_SIGNALS]
        self.signals = nn.ModuleDict({str(s.block): StaticSignal(parts[s.block], s.signal, **shape) for s in in_front})
        for block in (block for block, site in metric if site == "pre_block"):
            self.signals[str(block)] = StaticMetric(parts[block], metric[block, "pre_block"], single=self.single)
        learned = [s for s in schedule.steps if s.signal == "score_head"]
        self.score_heads = nn.ModuleDict({str(s.block): StaticScoreHead(heads[s.layer]) for s in learned})
        self.head, self.by_size = StaticHead(plain.pooling), plain.pools_by_size(schedule)
        self.share = Stage(self._share)
        self.reducer = reducers.get(schedule.method)
        staged = lambda of: nn.ModuleDict({str(s.block): Stage(of) for s in schedule.steps})
        self.match, self.merge = staged(self._decide), staged(apply_static)
        self.bias, self.ones = staged(self._bias), staged(self._ones)
        self.boundaries = boundaries(schedule) if calls else {}
        self.many = any(s.n_kept > matching.MOST_SORTED for s in schedule.steps)
        options = {"single": self.single, "any_batch": self.any_batch, "squeezes": self.reducer.squeezes}
        grid = plain.grid if self.emission.needs_grid else (0, 0)
        self.outputs = StaticOutputs(self.emission, schedule, grid=grid, **options)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Everything the graph gives, by name: the outputs that are asked for, the decisions, block3.keep, ..., and with `calls` the
        boundaries of the reductions.

        Args:
            image: [B, channels, H, W], or pixels.
        """
        n, c = self.schedule.n_tokens, self.pos.shape[-1]
        x = self.patch(image if self.pixels is None else self.pixels.planes(image).to(self.pos.dtype))
        x = ops.reshape(x, [c, -1]).t() if self.single else ops.reshape(x, [-1, c, n - self.n_prefix]).transpose(1, 2)
        x = self.patch_norm(x)
        x = F.pad(x, (0, 0, self.n_prefix, 0)) + self.pos if self.n_prefix else x + self.pos
        x = self.norm_pre(ops.reshape(x, [-1, c]))
        steps, state, results = self.schedule.by_site, TokenState(), {}
        for i, block in enumerate(islice(self.blocks, self.n_blocks)):
            before, behind = steps.get((i, "pre_block")), steps.get((i, "post_attn"))
            if before is not None:
                x, n = self._reduce(before, x, n, self._in_front(before, x, n, state), state)
            signal = None if behind is None else behind.signal
            x, offered = block(x, n, state.bias, signal, self._rope(i, state))
            if behind is not None:
                x, n = self._reduce(behind, x, n, offered, state)
            if self.tail == "class" and i == len(self.blocks) - 1:
                n = self.n_prefix
            x = x + block.mlp(block.norm2(x))
            if i in self.emission.layers:
                results |= self._outputs(x, n, state, i)
        if not self.emission.layers:
            results |= self._outputs(x, n, state, None)
        if "pooled" in self.emission.emit:
            share = None if not self.by_size or state.size is None else self.share(state.size)
            rows = x if self.tail == "class" and n == 1 else self._rows(x, n)
            results = {self.output_name: self.head(self.norm, rows, self.single, share), **results}
        return {**results, **state.decisions, **state.boundaries}

    def _outputs(self, x, n: int, state, block: int | None) -> dict:
        if not self.outputs.follows:
            return {}
        return self.outputs(self._rows(x, n), state.sources, state.trail, self.norm, block)

    @property
    def edges(self) -> set[str]:
        """Names of all values that go into or come out of a reduction that becomes a node."""
        return {name for place in self.boundaries.values() for name in place}

    def _rope(self, block: int, state):
        return None if self.rotary is None else self.rotary(block, state.place)

    def _in_front(self, step: Step, x, n: int, state) -> dict:
        """Keys, attention or a metric in front of a block, as the field of `Signals` they go into."""
        if str(step.block) not in self.signals:
            return {}
        rope = self._rope(step.block, state) if step.signal in ("class_attention", "mean_attention") else None
        return self.signals[str(step.block)](x, n, state.bias, rope)

    def _share(self, size):
        """Share of every patch token in a pool by size [.., n, 1], prefix tokens 0."""
        n = size.shape[-2]
        size = size * column([0.0] * self.n_prefix + [1.0] * (n - self.n_prefix), size)
        return size / ops.matmul(size, ops.floats([1.0] * n, [n, 1]), True, False)

    def _bias(self, size, n):
        return size_bias(size, n, single=self.single)

    def _ones(self, rows):
        if self.any_batch:
            return rows[..., :1] * 0 + 1
        return ops.floats([1.0] * rows[..., 0].numel(), [*rows.shape[:-1], 1])

    def _rows(self, x, n):
        """[B n, C] with its batch axis, or as it is for one image."""
        return x if self.single else ops.reshape(x, [-1, n, x.shape[-1]])

    def _decide(self, signals: Signals, step: Step, form: Form) -> MergePlan:
        return lay_out(self.reducer.static(signals, step), form, any_batch=self.any_batch)

    def _reduce(self, step, x, n, offered, state):
        rows, key, place = self._rows(x, n), str(step.block), self.boundaries.get(step.block)
        if step.signal == "score_head":
            offered = {"score": self.score_heads[key](rows, self.n_prefix)}
        x_in, keys = rows, offered.pop("keys", None)
        if self.boundaries and state.size is None and follows_sizes(self.schedule.method):
            state.size = self.ones[key](rows)  # one body for all blocks: the first has sizes too
        signals = Signals(
            rows, self.n_prefix, self.has_class, state.size, any_batch=self.any_batch, many=self.many, **offered
        )
        plan = self.match[key](signals, step, Form.GATHER if self.boundaries else choose_form(n, self.batch_kind))
        behind_last = step.site == "post_attn" and step.block == len(self.blocks) - 1
        to_attention = self.schedule.prop_attn and (place is not None or not behind_last)
        rows, state.size = self.merge[key](plan, rows, state.size, to_attention)
        state.bias = self.bias[key](state.size, step.n_out) if to_attention and state.size is not None else None
        if self.boundaries and plan.layout is not None:  # an order is inside the node, which gives its two parts
            plan = replace(plan, layout=replace(plan.layout, order=None))
        if self.rotary is not None:
            state.place = self._places(plan, state.place)
        state.decisions |= {f"block{step.block}.{name}": value for name, value in decisions_of(plan).items()}
        if place is not None:
            values = (x_in, signals.score if keys is None else keys, rows, state.size, state.bias)
            state.boundaries |= {name: value for name, value in zip(place, values) if value is not None}
        flat = rows if self.single else ops.reshape(rows, [-1, x.shape[-1]])
        if self.outputs.follows:
            self.outputs.note(state.trail, plan, step, x=x_in, x_out=rows, before=state.sources)
            state.sources = self._follow(plan, state.sources, step)
        return flat, step.n_out

    def _follow(self, plan: MergePlan, sources, step):
        """The source map [.., N0, 1] after one more plan (None: every token at its own place). Row n_out stands for gone."""
        layout = plan.layout or StaticLayout()
        shift = layout.labels.index(0) if layout.labels else 0  # labels of hosts count up from 0 at this row
        fill = lambda values: constant(values, plan.keep, any_batch=self.any_batch)
        order, row_of = layout.order, fill(range(step.n_kept))
        if plan.src is not None and self.reducer.squeezes:
            row_of = torch.cat([row_of, fill([step.n_out] * step.n_folded)], -2)
        elif plan.src is not None:
            host = fill([step.n_kept] * step.n_folded) if plan.n_extra else plan.dst + shift if shift else plan.dst
            row_of = torch.cat([row_of, host], -2)
        if order is None:
            order = plan.keep if plan.src is None else torch.cat([plan.keep, plan.src], -2)
        table = ops.put_rows(fill([step.n_out] * (step.n_in + 1)) if self.outputs.drops else order, order, row_of)
        if sources is not None:
            return ops.take_rows(table, sources)
        return ops.fixed_rows(table, list(range(step.n_in))) if self.outputs.drops else table

    def _places(self, plan, place):
        """Where tokens stand in the image [.., n, 1] after one more plan; one made of others stands nowhere."""
        place = plan.keep if place is None else ops.take_rows(place, plan.keep)
        if not plan.n_extra:
            return place
        return torch.cat([place, constant([self.schedule.n_tokens], plan.keep, any_batch=self.any_batch)], -2)


@dataclass
class TokenState:
    """What goes from one reduction to the next.

    Args:
        size: input tokens that each token stands for [.., n, 1]; None while all are 1.
        sources: rows at which the input tokens are [.., N0, 1]; None while each is at its own.
        place: where tokens stand in the image [.., n, 1]; None while each is at its own place.
        bias: what proportional attention adds to the logits [B, 1, 1, n]; None while every size is 1, or where nothing reads it.
        decisions: what was decided, by name.
        boundaries: what goes into and comes out of the reductions that become nodes, by name.
        trail: what the outputs need to know of the steps.
    """

    size: Tensor | None = None
    sources: Tensor | None = None
    place: Tensor | None = None
    bias: Tensor | None = None
    decisions: dict[str, Tensor] = field(default_factory=dict)
    boundaries: dict[str, Tensor] = field(default_factory=dict)
    trail: StaticTrail = field(default_factory=StaticTrail)


def decisions_of(plan: MergePlan) -> dict[str, Tensor]:
    """The columns from which a plan can be read back: rows as "order", or "keep" and "src"; hosts as "dst" and "target"."""
    layout = plan.layout or StaticLayout()
    order = plan.keep if layout.order is None and plan.src is None else layout.order
    columns = {"keep": plan.keep, "src": plan.src} if order is None else {"order": order}
    if plan.src is not None and not plan.n_extra:
        columns |= {"dst": plan.dst, "target": layout.target}
    return {name: value for name, value in columns.items() if value is not None}


class Rotary(nn.Module):
    """Sines and cosines of the tokens there are, out of the table of all (see `PlainViT.rotary`), laid out in halves.

    Args:
        table: [depth or 1, heads or 1, N + 1, 2 D].
        half: its channels are in halves already, not even and odd.
        single: there is one image.
    """

    def __init__(self, table: Tensor, *, half: bool, single: bool):
        super().__init__()
        self.images, self.heads, d = 1 if single else -1, table.shape[1], table.shape[-1] // 2
        sin, cos = table.split(d, -1)
        if not half:
            sin, cos = sin[..., halves(d)], cos[..., halves(d)]
        sin = torch.cat([-sin[..., : d // 2], sin[..., d // 2 :]], -1)
        rows = torch.cat([sin, cos], -1).transpose(1, 2).flatten(2).contiguous()
        self.tables = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in rows)  # [N + 1, heads 2 D] each

    def forward(self, block: int, place: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sines, cosines) [B or 1, heads or 1, n, D].

        Args:
            block: its index.
            place: [.., n, 1] rows of the table, None for all tokens in order.
        """
        table = self.tables[block % len(self.tables)]
        rows, images = (table[:-1].clone(), 1) if place is None else (ops.look_up(table, place), self.images)
        d, n = table.shape[1] // self.heads, rows.shape[-2]
        if self.heads > 1:
            rows = ops.reshape(rows, [images, n, self.heads, d]).transpose(1, 2)
        else:
            rows = ops.reshape(rows, [images, 1, n, d])
        return rows.split(d // 2, -1)
