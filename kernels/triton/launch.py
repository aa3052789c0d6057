"""The node `TokenReduce` from PyTorch, on an NVIDIA GPU (or on the CPU when Triton interprets: TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..token_reduce import Reduction
from . import variants
from .apply import apply_kernel
from .match import match_kernel
from .rank import rank_kernel
from .unit import unit_kernel


class Decision(NamedTuple):
    """What the first three kernels decide: keep [B, K, 1], src and dst [B, R, 1] int64; value [B, ..], by which rows are weighted."""

    keep: Tensor
    src: Tensor
    dst: Tensor
    value: Tensor


def token_reduce(
    op: Reduction, x: Tensor, *, signal: Tensor, size: Tensor | None = None, check: bool = True
) -> dict[str, Tensor]:
    """The node, by the kernels.

    Args:
        op: its attributes.
        x: [B, N, C] or [N, C].
        signal: keys [B, H, N, D] in the type of x, or float32 scores [B, N, 1] or [N, 1].
        size: [B, N, 1] or [N, 1] float32, or None for ones.
        check: refuse what is not finite; it waits for the GPU.
    Returns:
        The outputs by name, in the order of `Reduction.outputs`.
    Raises:
        ValueError: a shape that the kernels do not take (see `variants.limit`), or values that are not finite.
    """
    single = x.ndim == 2
    problem = variants.limit(op, x.shape[-1], signal.shape[-1] if op.select == "pairs" else None)
    if x.shape[-2] != op.n_in or signal.shape[-2] != op.n_in:
        problem = f"{x.shape[-2]} tokens and {signal.shape[-2]} signals came, {op.n_in} were wanted"
    if problem:
        raise ValueError(problem)
    for name, tensor in (("x", x), ("signal", signal), ("size", size)):
        if check and tensor is not None and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} has values that are not finite: {int((~torch.isfinite(tensor)).sum())}")
    x = (x[None] if single else x).contiguous()
    decision = decide(op, x, signal=signal.contiguous())
    given = {**apply(op, x, decision=decision, size=size), **decision._asdict()}
    return {name: given[name][0] if single and name != "log_size" else given[name] for name in op.outputs}


def decide(op: Reduction, x: Tensor, *, signal: Tensor) -> Decision:
    """Kernels `unit`, `match` and `rank`.

    Args:
        op: the node.
        x: [B, N, C], contiguous.
        signal: as for `token_reduce`, contiguous.
    Returns:
        Decision.
    """
    batch, n, p, pairs = x.shape[0], op.n_in, op.pairing, op.select == "pairs"
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=x.device)
    keep, src, dst = (new(batch, k, 1, dtype=torch.int64) for k in (op.n_kept, op.n_folded, op.n_folded))
    v = variants.rank_variant(variants.ranked(op), pairs)

    def order(value, host, n_values, n_b):
        rank_kernel[(batch,)](
            value, host, keep, src, dst, n_values, op.n_kept, op.n_folded, op.n_prefix, p.a_first, p.b_first, n_b,
            op.by_score, **v.constants, num_warps=v.warps,
        )  # fmt: skip

    if pairs:
        host = new(batch, p.n_a, dtype=torch.int64)
        value = _match(
            _unit(signal, 0.0),
            src,
            b=keep,
            host=host,
            counts=(p.n_a, p.n_b, op.n_kept, p.a_first, p.b_first, 0),
            pairs=pairs,
        )
        order(value, host, p.n_a, p.n_b)
        return Decision(keep, src, dst, value)
    order(signal, keep, n, 0)
    value = signal
    if op.fold in ("mean", "squeeze"):
        hosts = (op.n_folded, op.n_kept - op.n_prefix, op.n_kept, 0, op.n_prefix, op.n_prefix)
        value = _match(_unit(x[:, None], op.eps), src, b=keep, host=dst, counts=hosts, pairs=pairs)
    return Decision(keep, src, dst, value)


def apply(op: Reduction, x: Tensor, *, decision: Decision, size: Tensor | None) -> dict[str, Tensor]:
    """Kernel `apply`.

    Args:
        op: the node.
        x: [B, N, C], contiguous.
        decision: from `decide`.
        size: [B, N, 1] or [N, 1] float32, or None for ones.
    Returns:
        "x" [B, K', C], "size" [B, K', 1] and "log_size" [B, 1, 1, K'], the last two filled as far as `op.sizes` asks.
    """
    batch, n, channels = x.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=x.device)
    if size is None:
        size = new(batch, n).fill_(1.0)
    out, sizes, logs = x.new_empty(batch, op.n_out, channels), new(batch, op.n_out, 1), new(batch, 1, 1, op.n_out)
    v = variants.apply_variant()
    apply_kernel[op.n_out, batch, -(-channels // v.constants["BLOCK"])](
        x, decision.keep, decision.src, decision.dst, decision.value, size.contiguous(), out, sizes, logs,
        n, channels, op.n_kept, op.n_folded, op.first_host, variants.FOLD_CODE[op.fold], op.sizes, **v.constants, num_warps=v.warps,
    )  # fmt: skip
    return {"x": out, "size": sizes, "log_size": logs}


def _unit(rows: Tensor, eps: float) -> Tensor:
    """[B, H, N, D] -> [B, N, D]."""
    batch, heads, n, width = rows.shape
    v, out = variants.unit_variant(width), torch.empty(batch, n, width, device=rows.device)
    unit_kernel[-(-n // v.constants["ROWS"]), batch](rows, out, heads, n, width, eps, **v.constants, num_warps=v.warps)
    return out


def _match(unit: Tensor, a: Tensor, b: Tensor, host: Tensor, counts: tuple[int, ...], pairs: bool) -> Tensor:
    """Fill host [B, n_a]; the best cosines [B, n_a]. counts: n_a, n_b, n_order, a_first, b_first, shift."""
    batch, n, width = unit.shape
    v, value = variants.match_variant(pairs), unit.new_empty(batch, counts[0])
    match_kernel[-(-counts[0] // v.constants["BLOCK_A"]), batch](
        unit, a, b, value, host, n, width, *counts, **v.constants, num_warps=v.warps
    )
    return value
