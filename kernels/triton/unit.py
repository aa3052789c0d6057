"""Rows of length one: the metric that tokens are matched by.

    m[b, n, :]    = (rows[b, 0, n, :] + ... + rows[b, H-1, n, :]) / H
    unit[b, n, :] = m / (sqrt(sum m^2) + eps), zeros where that would divide by zero

Shapes: rows [B, H, N, D] in float32, float16 or bfloat16, contiguous; unit [B, N, D] float32. Heads are added in ascending order.
Limits: D a multiple of 8, at most BLOCK; B N D below 2^31 elements a head.
Bytes moved: B N D (H sizeof(T) + 4). Grid: (ceil(N / ROWS), B).
Twin: `twin.unit`.
"""

import triton
import triton.language as tl


@triton.jit
def unit_kernel(rows_ptr, unit_ptr, n_heads, n_rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    inside = (row[:, None] < n_rows) & (column[None, :] < width)
    at = row[:, None] * width + column[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for head in range(n_heads):
        total += tl.load(rows_ptr + (image * n_heads + head) * n_rows * width + at, mask=inside, other=0.0).to(
            tl.float32
        )
    mean = tl.div_rn(total, tl.zeros_like(total) + n_heads)
    norm = tl.sqrt_rn(tl.sum(mean * mean, axis=1)) + eps
    norm = tl.where(norm > 0, norm, 1.0)
    tl.store(unit_ptr + image * n_rows * width + at, tl.div_rn(mean, tl.zeros_like(mean) + norm[:, None]), mask=inside)
