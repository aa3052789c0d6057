"""Which rows stay and which are folded, in what order: one program an image.

    key[i]  = (bits of value[i] in an order that integers share) << 32 | (2^32 - 1 - i)      all different: a total order
    rank[i] = how many keys are above key[i]                                                  value descending, index ascending

PAIRS: of n_values A tokens the first n_fold merge: src[rank] = a_first + 2 i, dst[rank] = host[i]. keep is the prefix, the A tokens
left (in position: counted by a running sum; by_score: in rank), and the n_b B tokens.
Otherwise: keep[rank] = i for the first n_kept, src[rank - n_kept] = i for the next n_fold.
Shapes: value [B, n_values] float32; host [B, n_values], keep [B, n_kept], src and dst [B, n_fold] int64.
Limits: n_values, n_b and n_prefix at most BLOCK. -0 counts as +0; a value that is not a number counts as the lowest.
Bytes moved: 12 B n_values + 8 B (n_kept + 2 n_fold); B n_values^2 comparisons. Grid: (B,).
Twin: `twin.rank`, `twin.order_pairs`, `twin.order_score`.
"""

import triton
import triton.language as tl


@triton.jit
def packed_key(value, index):
    """Keys whose order is that of values, descending index within equals."""
    value = tl.where(value == value, value + 0.0, float("-inf"))  # -0 + 0 is +0
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def rank_kernel(
    value_ptr, host_ptr, keep_ptr, src_ptr, dst_ptr, n_values, n_kept, n_fold, n_prefix, a_first, b_first, n_b, by_score,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    values = value_ptr + image * n_values
    key = packed_key(tl.load(values + i, mask=i < n_values, other=0.0), i)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n_values, CHUNK):
        j = start + tl.arange(0, CHUNK)
        other = packed_key(tl.load(values + j, mask=j < n_values, other=0.0), j)
        above = (other[None, :] > key[:, None]) & (j < n_values)[None, :]
        rank += tl.sum(above.to(tl.int32), axis=1)
    keep, inside = keep_ptr + image * n_kept, i < n_values
    folded = inside & (rank >= n_kept) & (rank < n_kept + n_fold)
    if PAIRS:
        n_merged = n_values - (n_kept - n_prefix - n_b)  # also those that are dropped, with n_fold = 0
        left = inside & (rank >= n_merged)
        folded = inside & (rank < n_fold)
        place = tl.where(by_score != 0, rank - n_merged, tl.cumsum(left.to(tl.int32), 0) - 1)
        host = tl.load(host_ptr + image * n_values + i, mask=folded, other=0)
        tl.store(src_ptr + image * n_fold + rank, (a_first + 2 * i).to(tl.int64), mask=folded)
        tl.store(dst_ptr + image * n_fold + rank, host, mask=folded)
        tl.store(keep + n_prefix + place, (a_first + 2 * i).to(tl.int64), mask=left)
        tl.store(keep + i, i.to(tl.int64), mask=i < n_prefix)
        tl.store(keep + n_kept - n_b + i, (b_first + 2 * i).to(tl.int64), mask=i < n_b)
    else:
        tl.store(keep + rank, i.to(tl.int64), mask=inside & (rank < n_kept))
        tl.store(src_ptr + image * n_fold + rank - n_kept, i.to(tl.int64), mask=folded)
