"""One block as part of a static graph, and what a reducer may look at in front of one.

The attention scale is folded into the query weights, LayerScale into the projections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...kernels import ops
from ..constants import column, lift
from ..models.plain_vit import BlockParts, linear


class Stage(nn.Module):
    """A function as a module, so that its nodes in the graph are named after it (see `stages.of_scopes`)."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class StaticBlock(nn.Module):
    """One block over rows [B N, C]; weights are the model's, folded where that saves a node.

    Args:
        p: the parts of the block.
        single: one image, whose signals have no batch axis.
        n_prefix: prefix tokens at the head of the sequence.
        rotary: the model has a rotary embedding.
        metric: a trained layer whose output a step behind the attention compares; it is joined with qkv in one Gemm.
    """

    def __init__(self, p: BlockParts, *, single: bool, n_prefix: int, rotary: bool, metric: nn.Linear | None = None):
        super().__init__()
        self.single, self.n_prefix, self.heads, self.scale = single, n_prefix, p.heads, None
        self.norm1, self.norm2, self.attn_norm, self.gate = p.norm1, p.norm2, p.norm, p.gate
        self.qkv, self.q_norm, self.k_norm = _in_halves(p) if rotary and not p.half else (p.qkv, p.q_norm, p.k_norm)
        if isinstance(p.q_norm, nn.Identity):
            rows, weight = p.qkv.out_features // 3, p.qkv.weight
            factor = torch.cat([weight.new_full((rows,), p.scale), weight.new_ones(2 * rows)])
            self.qkv = _scaled_linear(self.qkv, factor.detach())
        else:
            self.scale = p.scale
        self.widths = [p.qkv.out_features, 0 if metric is None else metric.out_features]
        if metric is not None:
            self.qkv = _joined_linear(self.qkv, metric)
        self.proj = _scaled_linear(p.proj, p.gamma1)
        last = p.mlp.get_submodule(p.mlp_last)
        self.mlp = with_parts(p.mlp, **{p.mlp_last: _scaled_linear(last, p.gamma2)})
        self.keys, self.unit, self.score = Stage(self._metric), Stage(unit), Stage(self._score)

    def forward(self, x: Tensor, n: int, bias: Tensor | None, signal: str | None, rope=None) -> tuple[Tensor, dict]:
        """The attention half of the block.

        Args:
            x: tokens [B n, C].
            n: tokens of an image.
            bias: [B, 1, 1, n], what proportional attention adds to the logits (see `size_bias`), or None.
            signal: what a step behind the attention looks at (a key of `plan.SIGNALS`), or None.
            rope: (sines, cosines) [B or 1, heads or 1, n, D], or None.
        Returns:
            Tokens after the attention residual, and the signal as the field of `Signals` it goes into; beside a metric the keys
            that it is made of.
        """
        h, images = self.heads, 1 if self.single else -1
        y = self.norm1(x)
        rows = self.qkv(y)
        rows, metric = rows.split(self.widths, -1) if self.widths[1] else (rows, None)
        qkv = ops.reshape(rows, [images, n, 3 * h, self.widths[0] // (3 * h)]).transpose(1, 2)
        q, k, v, q_turned, k_turned = self._turned(qkv, rope)
        q, k_t = q_turned if self.scale is None else q_turned * self.scale, k_turned.transpose(-1, -2)
        logits = q @ k_t
        attention = (logits if bias is None else logits + bias).softmax(-1)
        out = self.attn_norm(ops.reshape((attention @ v).transpose(1, 2), [-1, self.proj.in_features]))
        out = out if self.gate is None else out * self.gate(y).sigmoid()
        offered = {}
        if signal == "keys":
            offered |= {"metric": self.keys(k), "keys": k}
        elif signal == "metric_layer":
            offered["metric"] = self.unit(metric if self.single else ops.reshape(metric, [-1, n, self.widths[1]]))
        elif signal == "class_attention":  # its row is computed by itself: the attention stays one that engines fuse
            offered["score"] = self.score(ops.fixed_rows(q, [0]) @ k_t, bias, n)
        elif signal == "mean_attention":
            offered["score"] = self.score(attention, None, n)
        return x + self.proj(out), offered

    def _metric(self, k):
        return unit(k.mean((0, 1)) if self.single else k.mean(1))

    def _score(self, rows, bias, n: int):
        return received(rows, bias, n=n, single=self.single, n_prefix=self.n_prefix)

    def _turned(self, qkv, rope):
        """q, k, v [B, heads, n, D], and q and k turned by the rotary embedding; both at once where no norm comes between."""
        h = self.heads
        if rope is None or not isinstance(self.q_norm, nn.Identity):
            q, k, v = qkv.split(h, 1)
            q, k = self.q_norm(q), self.k_norm(k)
            return q, k, v, turn(q, rope), turn(k, rope)
        qk, v = qkv.split([2 * h, h], 1)
        both = turn(qk, rope) if rope[0].shape[1] == 1 else torch.cat([turn(t, rope) for t in qk.split(h, 1)], 1)
        return *qk.split(h, 1), v, *both.split(h, 1)


class StaticTail(StaticBlock):
    """A last block behind which prefix tokens alone are read: keys and values of all tokens, everything else of prefix tokens.

    Args:
        p, single, n_prefix, rotary: see `StaticBlock`.
    """

    def __init__(self, p: BlockParts, *, single: bool, n_prefix: int, rotary: bool):
        super().__init__(p, single=single, n_prefix=n_prefix, rotary=rotary)
        rows, bias = self.widths[0] // 3, self.qkv.bias
        parts = (slice(rows), slice(rows, None))
        self.q, self.kv = (linear(self.qkv.weight[s], None if bias is None else bias[s]) for s in parts)
        del self.qkv

    def forward(self, x: Tensor, n: int, bias: Tensor | None, signal: str | None, rope=None) -> tuple[Tensor, dict]:
        """The attention half of the block.

        Args:
            x, n, bias, rope: see `StaticBlock.forward`.
            signal: None: no step stands behind this attention.
        Returns:
            Prefix tokens after the attention residual [B n_prefix, C], and nothing.
        """
        h, p, images = self.heads, self.n_prefix, 1 if self.single else -1
        y = self.norm1(x)
        k, v = ops.reshape(self.kv(y), [images, n, 2 * h, self.kv.out_features // (2 * h)]).transpose(1, 2).split(h, 1)
        k_t, y = turn(self.k_norm(k), rope).transpose(-1, -2), self._prefix(y, n)
        q = self.q_norm(ops.reshape(self.q(y), [images, p, h, self.q.out_features // h]).transpose(1, 2))
        q = q if self.scale is None else q * self.scale  # not turned: prefix tokens have no place in the image
        logits = q @ k_t
        attention = (logits if bias is None else logits + bias).softmax(-1)
        out = self.attn_norm(ops.reshape((attention @ v).transpose(1, 2), [-1, self.proj.in_features]))
        out = out if self.gate is None else out * self.gate(y).sigmoid()
        return self._prefix(x, n) + self.proj(out), {}

    def _prefix(self, x: Tensor, n: int) -> Tensor:
        """The prefix tokens' rows [B n_prefix, C] of all [B n, C]."""
        rows = list(range(self.n_prefix))
        if self.single:
            return ops.fixed_rows(x, rows)
        return ops.reshape(ops.fixed_rows(ops.reshape(x, [-1, n, x.shape[-1]]), rows), [-1, x.shape[-1]])


class StaticMetric(nn.Module):
    """What a trained layer makes of the tokens in front of a block, for a step that stands there.

    Args:
        p: the parts of the block, of which norm1 is used.
        metric: the trained layer.
        single: one image, whose signals have no batch axis.
    """

    def __init__(self, p: BlockParts, metric: nn.Linear, *, single: bool):
        super().__init__()
        self.norm1, self.linear, self.single = p.norm1, metric, single

    def forward(self, x: Tensor, n: int, bias: Tensor | None, rope=None) -> dict:
        """The signal, as the field of `Signals` it goes into.

        Args:
            x, n, bias, rope: see `StaticBlock.forward`; the last two change nothing.
        """
        rows = self.linear(self.norm1(x))
        return {"metric": unit(rows if self.single else ops.reshape(rows, [-1, n, self.linear.out_features]))}


class StaticSignal(nn.Module):
    """Keys or attention that a block would compute of the tokens in front of it, for a step that stands there.

    Args:
        p: the parts of the block.
        signal: "keys", "class_attention" or "mean_attention".
        single, n_prefix, rotary: see `StaticBlock`.
    """

    def __init__(self, p: BlockParts, signal: str, *, single: bool, n_prefix: int, rotary: bool):
        super().__init__()
        self.signal, self.single, self.n_prefix, self.heads, self.scale = signal, single, n_prefix, p.heads, p.scale
        qkv, self.q_norm, self.k_norm = _in_halves(p) if rotary and not p.half else (p.qkv, p.q_norm, p.k_norm)
        rows = p.qkv.out_features // 3
        rows = slice(rows, 2 * rows) if signal == "keys" else slice(0, 2 * rows)
        self.norm1, self.linear = p.norm1, linear(qkv.weight[rows], None if qkv.bias is None else qkv.bias[rows])

    def forward(self, x: Tensor, n: int, bias: Tensor | None, rope=None) -> dict:
        """The signal, as the field of `Signals` it goes into.

        Args:
            x, n, bias, rope: see `StaticBlock.forward`.
        """
        h, images = self.heads, 1 if self.single else -1
        kinds = 1 if self.signal == "keys" else 2
        rows = self.linear(self.norm1(x))
        rows = ops.reshape(rows, [images, n, kinds * h, self.linear.out_features // (kinds * h)]).transpose(1, 2)
        if self.signal == "keys":
            k = self.k_norm(rows)
            return {"metric": unit(k.mean((0, 1)) if self.single else k.mean(1))}
        q, k = rows.split(h, 1)
        q, k_t = turn(self.q_norm(q), rope) * self.scale, turn(self.k_norm(k), rope).transpose(-1, -2)
        if self.signal == "class_attention":
            rows = ops.fixed_rows(q, [0]) @ k_t
        else:
            logits = q @ k_t
            rows, bias = (logits if bias is None else logits + bias).softmax(-1), None
        return {"score": received(rows, bias, n=n, single=self.single, n_prefix=self.n_prefix)}


def size_bias(size: Tensor, n: int, *, single: bool) -> Tensor:
    """Proportional attention: the logarithm of sizes [.., n, 1] as [B, 1, 1, n].

    Args:
        size: of every token.
        n: tokens of an image.
        single: there is one image.
    """
    return ops.reshape(size, [1 if single else -1, 1, 1, n]).log()


def received(rows: Tensor, bias: Tensor | None, *, n: int, single: bool, n_prefix: int) -> Tensor:
    """Mean attention received, prefix tokens lifted, [.., n, 1].

    Args:
        rows: logits of the class token [B, heads, 1, n], or attention of all tokens [B, heads, n, n].
        bias: added to the logits, or None.
        n: tokens of an image.
        single: there is one image, and the result has no batch axis.
        n_prefix: prefix tokens at the head of the sequence.
    """
    heads, queries = rows.shape[1], rows.shape[-2]
    if queries == 1:
        rows = (rows if bias is None else rows + bias).softmax(-1)
    m = heads * queries
    rows = ops.reshape(rows, [m, n] if single else [-1, m, n])
    return ops.addmm(rows, ops.floats([1 / m] * m, [m, 1]), column(lift(n, n_prefix), rows), True, False)


def unit(x: Tensor) -> Tensor:
    """Rows divided by their L2 norm."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def turn(x: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Channels in halves turned by a rotary embedding: x cos + (second half, first half) sin.

    Args:
        x: [B, heads, n, D].
        rope: (sines, those of the first half negative; cosines), or None: nothing is turned.
    """
    if rope is None:
        return x
    low, high = x.split(x.shape[-1] // 2, -1)
    return x * rope[1] + torch.cat([high, low], -1) * rope[0]


def halves(d: int) -> list[int]:
    """Even channels, then odd ones: the order that turns an interleaved rotary layout into halves."""
    return [*range(0, d, 2), *range(1, d, 2)]


def with_parts(module: nn.Module, **parts) -> nn.Module:
    """A copy of a module with some of its submodules or parameters replaced; all other weights are shared, not copied.

    Args:
        module: left as it is.
        parts: by attribute name.
    """
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
    clone = copy.deepcopy(module, shared)
    for name, part in parts.items():
        setattr(clone, name, part)
    return clone


def _in_halves(p: BlockParts) -> tuple[nn.Linear, nn.Module, nn.Module]:
    """qkv, q_norm and k_norm with the channels of every query and key head in the order of `halves`."""
    d = p.qkv.out_features // (3 * p.heads)
    turned = [base + i for base in range(0, 2 * p.heads * d, d) for i in halves(d)]
    order = torch.tensor(turned + list(range(len(turned), 3 * p.heads * d)), device=p.qkv.weight.device)
    frozen = lambda v: nn.Parameter(v.detach()[halves(d)], requires_grad=False)
    norms = (
        with_parts(norm, **{k: frozen(v) for k, v in norm.named_parameters(recurse=False)})
        for norm in (p.q_norm, p.k_norm)
    )
    return linear(p.qkv.weight[order], None if p.qkv.bias is None else p.qkv.bias[order]), *norms


def _joined_linear(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One layer whose outputs are those of both."""
    biases = [torch.zeros_like(m.weight[:, 0]) if m.bias is None else m.bias for m in (first, second)]
    return linear(torch.cat([first.weight, second.weight]), torch.cat(biases))


def _scaled_linear(layer: nn.Linear, factor: Tensor | None) -> nn.Linear:
    """The layer with output row i multiplied by factor[i]; the layer itself for None."""
    if factor is None:
        return layer
    factor = factor.to(layer.weight.dtype)
    weight = layer.weight.detach() * factor[:, None]
    return linear(weight, None if layer.bias is None else layer.bias.detach() * factor)
