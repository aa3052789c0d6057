"""The reduced tokens: rows gathered, weighted rows added, sizes and their logarithm. One program an output row and chunk of channels.

    out[j]  = x[keep[j]], bit for bit, when no source goes there; else, in float32, sources in the order of src,
    out[j]  = (w_j x[keep[j]] + sum of w_i x[src[i]] over first_host + dst[i] = j) / (w_j + sum of w_i)
    fold 0 ("size_mean")  w = sizes;                size[j] = size[keep[j]] + sum size[src[i]]
    fold 1 ("mean")       w = 1;                    size[j] = max(2^-100, size[keep[j]] + sum size[src[i]] value[i])
    fold 2 ("squeeze")    w_j = 1, w_i = exp(value[i] - 1)
    fold 3 ("sum")        out[n_kept] = sum of value[src[i]] x[src[i]] over all i, not divided
    fold 4 ("drop")       n_fold is 0
Shapes: x [B, N, C] in float32, float16 or bfloat16; keep [B, n_kept], src and dst [B, n_fold] int64 (dst unread in fold 3); value
[B, n_fold] float32, in fold 3 [B, N]; size [B, N] float32; out [B, n_out, C]; new_size and log_size [B, n_out] float32.
with_size: 0 no sizes (size is not read but in fold 0), 1 new_size, 2 log_size too. Pointers that are not read may be anything.
Limits: C a multiple of 8; N C below 2^31.
Bytes moved: sizeof(T) B C (n_kept + n_fold + n_out) and 8 B n_fold a row, from the cache. Grid: (n_out, B, ceil(C / BLOCK)).
Twin: `twin.apply`.
"""

import triton
import triton.language as tl


@triton.jit
def apply_kernel(
    x_ptr, keep_ptr, src_ptr, dst_ptr, value_ptr, size_ptr, out_ptr, new_size_ptr, log_size_ptr,
    n_rows, width, n_kept, n_fold, first_host, fold, with_size,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    j, n_out = tl.program_id(0), tl.num_programs(0)
    image = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x_ptr, size_ptr = x_ptr + image * n_rows * width, size_ptr + image * n_rows
    src_ptr, dst_ptr = src_ptr + image * n_fold, dst_ptr + image * n_fold
    sized = (with_size > 0) | (fold == 0)
    is_sum, extra = fold == 3, j >= n_kept
    row = tl.load(keep_ptr + image * n_kept + j, mask=j < n_kept, other=0)
    kept = tl.load(x_ptr + row * width + column, mask=inside, other=0.0)
    size = tl.load(size_ptr + row, mask=sized, other=1.0)
    weight = tl.where(extra, 0.0, tl.where(fold == 0, size, 1.0))
    total = weight
    acc = kept.to(tl.float32) * weight
    hits = 0
    for start in range(0, n_fold, CHUNK):
        i = start + tl.arange(0, CHUNK)
        if is_sum:
            mine = (i < n_fold) & extra
        else:
            mine = (i < n_fold) & (tl.load(dst_ptr + i, mask=i < n_fold, other=0) + first_host == j)
        count = tl.sum(mine.to(tl.int32))
        if count > 0:
            hits += count
            for t in range(start, tl.minimum(start + CHUNK, n_fold)):
                take = is_sum
                if is_sum == 0:
                    take = tl.load(dst_ptr + t) + first_host == j
                if take:
                    source = tl.load(src_ptr + t)
                    source_size = tl.load(size_ptr + source, mask=sized, other=1.0)
                    at = value_ptr + tl.where(is_sum, image * n_rows + source, image * n_fold + t)
                    value = tl.load(at, mask=fold != 0, other=0.0)
                    given = tl.where(fold == 2, tl.exp(value - 1.0), value)
                    w = tl.where(fold == 0, source_size, tl.where(fold == 1, 1.0, given))
                    acc += tl.load(x_ptr + source * width + column, mask=inside, other=0.0).to(tl.float32) * w
                    total += w
                    size += tl.where(fold == 1, source_size * value, source_size)
    mean = tl.where(is_sum, acc, tl.div_rn(acc, tl.zeros_like(acc) + tl.where(hits > 0, total, 1.0)))
    mean = mean.to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + (image * n_out + j) * width + column, tl.where(hits > 0, mean, kept), mask=inside)
    if (with_size > 0) & (tl.program_id(2) == 0):
        size = tl.maximum(size, 7.888609052210118e-31)  # 2^-100
        tl.store(new_size_ptr + image * n_out + j, size)
        tl.store(log_size_ptr + image * n_out + j, tl.log(size), mask=with_size > 1)
