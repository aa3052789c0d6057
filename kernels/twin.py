"""`TokenReduce` in plain PyTorch, each stage with the order of operations that the kernels have: what they are tested against.

Read it beside `token_reduce.py`, which says what the stages mean. Tensors have a batch here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .token_reduce import SMALLEST_SIZE, Reduction


class Order(NamedTuple):
    """Which rows stay and which are folded: keep [B, K], src [B, R] int64; dst [B, R] where the order decides it too."""

    keep: Tensor
    src: Tensor
    dst: Tensor | None = None


class Match(NamedTuple):
    """Best host of every row: value [B, A] its cosine, host [B, A] int64 its place among the hosts."""

    value: Tensor
    host: Tensor


def unit(rows: Tensor, eps: float = 0.0) -> Tensor:
    """Mean over heads, each row divided by its L2 norm.

    Args:
        rows: [B, H, N, D] in any floating type.
        eps: added to the norms.
    Returns:
        [B, N, D] float32; a row of zeros stays zeros.
    """
    mean = sum(head.float() for head in rows.unbind(1)) / rows.shape[1]
    norm = (mean * mean).sum(-1, keepdim=True).sqrt() + eps
    return torch.where(norm > 0, mean / norm, 0.0)


def match(a: Tensor, b: Tensor) -> Match:
    """The best of b for every row of a, the first of equals.

    Args:
        a, b: [B, A, D] and [B, M, D] rows of length one.
    Returns:
        Match.
    """
    scores = a @ b.mT
    value = scores.amax(-1)
    return Match(value, (scores == value[..., None]).to(torch.int8).argmax(-1))


def rank(value: Tensor) -> Tensor:
    """Place of every value in the order "descending, the lower index first": [B, M] -> [B, M] int64."""
    return value.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def order_pairs(op: Reduction, best: Match) -> Order:
    """The order of select = "pairs".

    Args:
        op: the node.
        best: of every A token among the B tokens.
    Returns:
        Order with dst.
    """
    p, batch, r = op.pairing, best.value.shape[0], op.n_in - op.n_kept
    a, b = p.a_first + 2 * torch.arange(p.n_a), p.b_first + 2 * torch.arange(p.n_b)
    places = best.value.sort(dim=-1, descending=True, stable=True).indices
    merged, left = places[:, :r], places[:, r:]
    left = left if op.by_score else left.sort(-1).values
    keep = torch.cat([torch.arange(op.n_prefix).expand(batch, -1), a[left], b.expand(batch, -1)], 1)
    return Order(keep, a[merged], best.host.gather(1, merged))


def order_score(op: Reduction, score: Tensor) -> Order:
    """The order of select = "score"; score [B, N] float32."""
    places = score.sort(dim=-1, descending=True, stable=True).indices
    return Order(places[:, : op.n_kept], places[:, op.n_kept : op.n_kept + op.n_folded])


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for every image: x [B, N, C], rows [B, K] -> [B, K, C]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


def apply(op: Reduction, x: Tensor, order: Order, value: Tensor | None, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows gathered, weighted rows added.

    Args:
        op: the node.
        x: [B, N, C].
        order: keep, src and dst (None with fold = "sum" or "drop").
        value: [B, R] cosines of the folded rows ("mean", "squeeze") or their scores ("sum").
        size: [B, N, 1], or None for ones.
    Returns:
        x [B, K', C] in its own type, size [B, K', 1] float32.
    """
    kept = take(x, order.keep)
    size = torch.ones(*x.shape[:2], 1) if size is None else size.float()
    kept_size = take(size, order.keep)
    if op.fold == "drop":
        return kept, kept_size
    folded, folded_size = take(x, order.src).float(), take(size, order.src)
    if op.fold == "sum":
        fused = sum((folded * value[..., None]).unbind(1))
        return torch.cat([kept, fused[:, None].to(x.dtype)], 1), kept_size
    add = lambda base, rows: base.scatter_add(
        1, (op.first_host + order.dst)[..., None].expand(-1, -1, rows.shape[-1]), rows
    )
    ones, host_ones = torch.ones_like(folded_size), torch.ones_like(kept_size)
    grown = kept_size
    if op.fold == "size_mean":
        weight, host_weight, grown = folded_size, kept_size, add(kept_size, folded_size)
    elif op.fold == "mean":
        weight, host_weight, grown = ones, host_ones, add(kept_size, folded_size * value[..., None])
    else:
        weight, host_weight = (value[..., None] - 1).exp(), host_ones
    mean = add(kept.float() * host_weight, folded * weight) / add(host_weight, weight)
    hit = add(torch.zeros_like(kept_size), ones) > 0
    return torch.where(hit, mean.to(x.dtype), kept), grown.clamp(min=SMALLEST_SIZE)


def token_reduce(op: Reduction, x: Tensor, signal: Tensor, size: Tensor | None = None) -> dict[str, Tensor]:
    """The node.

    Args:
        op: its attributes.
        x, signal, size: its inputs; see `token_reduce.py`.
    Returns:
        Its outputs by name, in the order of `Reduction.outputs`.
    Raises:
        ValueError: an input has values that are not finite.
    """
    for name, tensor in (("x", x), ("signal", signal), ("size", size)):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite: {int((~torch.isfinite(tensor)).sum())}")
    single = x.ndim == 2
    x3 = x[None] if single else x
    size3 = size.reshape(len(x3), op.n_in, 1) if size is not None else None
    value = None
    if op.select == "pairs":
        p, metric = op.pairing, unit(signal)
        order = order_pairs(op, match(metric[:, p.a_first :: 2], metric[:, p.b_first :: 2]))
    else:
        score = signal.reshape(len(x3), op.n_in).float()
        order = order_score(op, score)
        if op.fold == "sum":
            value = score.gather(1, order.src)
        elif op.fold != "drop":
            rows = unit(x3[:, None], op.eps)
            value, host = match(take(rows, order.src), take(rows, order.keep)[:, op.n_prefix :])
            order = order._replace(dst=op.n_prefix + host)
    out, out_size = apply(op, x3, order, value, size3)
    given = {"x": out, "size": out_size, "log_size": out_size.log().reshape(len(x3), 1, 1, -1)}
    given |= {name: None if rows is None else rows[..., None] for name, rows in order._asdict().items()}
    drop_batch = lambda name, t: t[0] if single and name != "log_size" else t
    return {name: drop_batch(name, given[name]) for name in op.outputs}
