"""The best host of every token that may be folded.

    score[i, j] = unit[a_i, :] . unit[b_j, :]           products and sums in float32, chunks of BLOCK_D in ascending order
    value[i]    = max over j;  host[i] = the lowest such j, plus shift

a_i = a_first + 2 i and b_j = b_first + 2 j (BY_INDEX false), or a_i = a_ptr[i] and b_j = b_ptr[b_first + j], rows of an order that was
decided before, `n_order` of them an image on b's side (BY_INDEX true).
Shapes: unit [B, N, D] float32; a [B, n_a], b [B, n_order] int64; value [B, n_a] float32, host [B, n_a] int64.
Limits: D a multiple of 8; n_b at least 1; N D below 2^31. A score that is not a number counts as the lowest of all.
Bytes moved: 4 B D (n_a + n_b ceil(n_a / BLOCK_A)) + 12 B n_a, most of the second term from the cache; 2 B n_a n_b D operations in
float32 without TF32, so that decisions are those of every other implementation. Grid: (ceil(n_a / BLOCK_A), B).
Twin: `twin.match`.
"""

import triton
import triton.language as tl


@triton.jit
def match_kernel(
    unit_ptr, a_ptr, b_ptr, value_ptr, host_ptr, n_rows, width, n_a, n_b, n_order, a_first, b_first, shift,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BY_INDEX: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    j_of_tile = tl.arange(0, BLOCK_B)
    d_of_chunk = tl.arange(0, BLOCK_D)
    unit_ptr += image * n_rows * width
    if BY_INDEX:  # noqa: SIM108 (a constant of the compilation: one side is not compiled)
        a_row = tl.load(a_ptr + image * n_a + i, mask=i < n_a, other=0).to(tl.int32)
    else:
        a_row = a_first + 2 * i
    best = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    host = tl.zeros((BLOCK_A,), tl.int32)
    for start in range(0, n_b, BLOCK_B):
        j = start + j_of_tile
        if BY_INDEX:
            b_row = tl.load(b_ptr + image * n_order + b_first + j, mask=j < n_b, other=0).to(tl.int32)
        else:
            b_row = b_first + 2 * j
        scores = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for first in range(0, width, BLOCK_D):
            d = first + d_of_chunk
            a = tl.load(
                unit_ptr + a_row[:, None] * width + d[None, :],
                mask=(i < n_a)[:, None] & (d < width)[None, :],
                other=0.0,
            )
            b = tl.load(
                unit_ptr + b_row[None, :] * width + d[:, None],
                mask=(j < n_b)[None, :] & (d < width)[:, None],
                other=0.0,
            )
            scores = tl.dot(a, b, scores, input_precision="ieee")
        scores = tl.where((j < n_b)[None, :] & (scores == scores), scores, float("-inf"))
        top, place = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        higher = top > best
        best = tl.where(higher, top, best)
        host = tl.where(higher, start + place, host)
    tl.store(value_ptr + image * n_a + i, best, mask=i < n_a)
    tl.store(host_ptr + image * n_a + i, (host + shift).to(tl.int64), mask=i < n_a)
