"""From what a method is asked for (keep rates, blocks, counts) to its steps. Plain arithmetic; imports no torch.

N counts all tokens of the sequence; "others" are the N - n_prefix that are no prefix token. Every function that makes steps returns
(steps, notes): the reductions in block order, and in words whatever was cut or not done. Stages are counted from 1 in words.
"""

from __future__ import annotations

import math
import re

from .errors import UsageError
from .schedule import Step

NUMBER = re.compile(
    r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?"
)  # stricter than float(): no "1_0", no other digits


def parse_r(r: str | int | tuple | list, depth: int) -> list[int]:
    """Tokens to merge per block, before the cut to half.

    r: "13", "13:-1", "8,8,4" or 13, (13, -1.0), [8, 8, 4]. A pair (r, inflection) runs linearly from r(1 - inflection) to
    r(1 + inflection), each value truncated; a list is padded with zeros.
    Raises: UsageError when r is no number, negative, has an inflection outside [-1, 1] or more values than there are blocks.
    """
    said = r
    if isinstance(r, str):
        try:
            if not r.isascii() or "_" in r:  # int() would take other digits, and 1_3
                raise ValueError(r)
            if ":" in r:
                head, tail = r.split(":")
                r = (int(head), float(tail))
            else:
                r = [int(v) for v in r.split(",")] if "," in r else int(r)
        except ValueError:
            raise UsageError(
                f"--r {str(said)[:60]!r} is not a token count: wanted 13, 13:-1 (r:inflection) or 8,8,4,... (one a block)"
            ) from None
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool)
    if isinstance(r, list) and r and all(map(whole, r)):
        if len(r) > depth:
            raise UsageError(
                f"--r {said!r} has {len(r)} values, the model has {depth} blocks: give at most one a block"
            )
        values = r + [0] * (depth - len(r))
    else:
        r, inflection = r if isinstance(r, tuple) and len(r) == 2 else (r, 0.0)
        if not whole(r) or not isinstance(inflection, (int, float)):
            raise UsageError(
                f"--r {said!r}: wanted whole numbers of tokens: one, a pair (r, inflection) or a list, one a block"
            )
        if not -1 <= inflection <= 1:
            raise UsageError(f"--r {said!r}: inflection {inflection} is outside [-1, 1]")
        if r > 10**6:
            raise UsageError(f"--r {str(said)[:40]}: more tokens than any model has")
        low = int(r * (1.0 - inflection))
        step = (2 * r - low - low) / (depth - 1) if depth > 1 else 0.0
        values = [r] if r < 0 else [int(low + step * i) for i in range(depth)]
    if min(values) < 0:
        raise UsageError(f"--r {said!r} is negative: wanted 0 (nothing merged) or more tokens per block")
    return values


def tome(values: list[int], n_tokens: int, n_prefix: int) -> tuple[list[Step], list[str]]:
    """ToMe's counts: in every block min(r, (N - prefix) // 2) tokens merge.

    values: r per block. Raises: UsageError when an r is larger than the number of tokens of the model.
    """
    for b, r in enumerate(values):
        if r > n_tokens:
            raise UsageError(
                f"--r: block {b} is asked to merge {r} tokens, the model has {n_tokens}; at most half of the tokens "
                f"can merge in one block ({(n_tokens - n_prefix) // 2} in block 0)"
            )
    n, steps, cut = n_tokens, [], []
    for b, r in enumerate(values):
        real = min(r, max(n - n_prefix, 0) // 2)
        if real < r:
            cut.append(f"{b} ({r} to {real})")
        if real:
            steps.append(Step(b, "post_attn", n, n - real, n - real))
            n -= real
    return steps, [f"r was cut to half of the tokens in block {', '.join(cut)}"] if cut else []


def parse_rates(said: str | float | list | tuple, n_stages: int) -> list[float]:
    """Keep rates, one a stage.

    said: "0.7" or "0.7,0.6,0.5", 0.7 or [0.7, 0.6, 0.5]; each in (0, 1]. One value is repeated for every stage.
    n_stages: as many as there are blocks in `--at`.
    Raises: UsageError when one is no number in (0, 1], or there is neither one nor exactly one a stage.
    """
    if isinstance(said, str):
        parts = [p.strip() for p in said.split(",")]
        values = [float(p) if NUMBER.fullmatch(p) else None for p in parts]
    else:
        values = list(said) if isinstance(said, (list, tuple)) else [said]
    if not values or not all(_is_number(v) and 0 < v <= 1 for v in values):
        raise UsageError(
            f"--keep-rate {_short(said)}: wanted a number above 0 and at most 1, e.g. 0.7, or one for each stage, "
            "e.g. 0.7,0.6,0.5"
        )
    if len(values) not in (1, n_stages):
        raise UsageError(
            f"--keep-rate {_short(said)} has {len(values)} values for {n_stages} stage{'s' * (n_stages != 1)}: "
            "give one, or one for each block of --at"
        )
    return [float(v) for v in values] * (n_stages if len(values) == 1 else 1)


def parse_at(said: str | list | tuple, depth: int) -> list[int]:
    """The blocks that reduce, from 0.

    said: "3,6,9" or [3, 6, 9]: distinct, ascending, each in [0, depth).
    Raises: UsageError for anything else.
    """
    if isinstance(said, str):
        values = [int(p) if re.fullmatch("[0-9]{1,9}", p.strip()) else None for p in said.split(",")]
    else:
        values = list(said) if isinstance(said, (list, tuple)) else []
    if not values or not all(map(_is_whole, values)):
        raise UsageError(f"--at {_short(said)}: wanted block numbers from 0, e.g. 3,6,9")
    outside = [v for v in values if not 0 <= v < depth]
    if outside:
        default = ", which is the default," if tuple(values) == (3, 6, 9) else ""
        said = said if isinstance(said, str) else values
        raise UsageError(
            f"--at {_short(said)}{default}: there is no block {_short(outside[0])}, the model has {depth} (0 to {depth - 1})"
        )
    if any(a >= b for a, b in zip(values, values[1:])):
        raise UsageError(f"--at {_short(said)}: wanted each block once, in ascending order")
    return values


def evit(
    rates: list[float], at: list[int], n_tokens: int, n_prefix: int, fuse: bool
) -> tuple[tuple[Step, ...], list[str]]:
    """EViT: after the attention of block at[s], ceil(rates[s] * others) of the others stay; the rest is fused or dropped.

    rates, at: from `parse_rates` and `parse_at`. A fused token is one of the others in later blocks. Where every token stays,
    there is no step and no fused token.
    fuse: what does not stay becomes one token more; otherwise it is dropped.
    Source: EViT (Liang et al. 2022); the product is rounded to float64 before the ceiling, as in the authors' code.
    """
    return _by_class_attention(rates, at, n_tokens, n_prefix, fold=fuse, extra=int(fuse))


def etps(rates: list[float], at: list[int], n_tokens: int, n_prefix: int) -> tuple[tuple[Step, ...], list[str]]:
    """eTPS: EViT's counts; the tokens that do not stay are all squeezed into those that do, so there is never an extra one.

    Source: TPS (Wei et al. 2023).
    """
    return _by_class_attention(rates, at, n_tokens, n_prefix, fold=True, extra=0)


def _by_class_attention(rates, at, n_tokens, n_prefix, fold, extra):
    n, steps, notes = n_tokens, [], []
    for stage, (rate, block) in enumerate(zip(rates, at, strict=True), 1):
        others = n - n_prefix
        kept = math.ceil(rate * others)
        if kept == others:
            notes.append(_keeps_all(stage, block))
            continue
        if extra and kept == others - 1:
            notes.append(f"stage {stage} (block {block}) fuses a single token: there are as many tokens as before")
        step = Step(block, "post_attn", n, n_prefix + kept, n_prefix + kept + extra, others - kept if fold else 0)
        steps.append(step)
        n = step.n_out
    return tuple(steps), notes


def tps(
    rates: list[float], at: list[int], n_tokens: int, n_prefix: int, cumulative: bool, squeeze: bool
) -> tuple[tuple[Step, ...], list[str]]:
    """dTPS (squeeze) and DynamicViT: before block at[s], a share of the original n0 = n_tokens - n_prefix patches stays.

    rates, at: from `parse_rates` and `parse_at`. cumulative: rates are shares of n0, int(n0 * rates[s]) stay; otherwise of what the
    stage before left, int(n0 * rates[s] ** (s + 1)) with s from 0.
    squeeze: the other tokens are folded into those that stay; otherwise dropped.
    Raises: UsageError when a stage keeps no patch, or more than there are.
    Source: DynamicViT (Rao et al. 2021), TPS (Wei et al. 2023); float64, truncated, as in the authors' code.
    """
    n0 = others = n_tokens - n_prefix
    steps, notes = [], []
    for s, (rate, block) in enumerate(zip(rates, at, strict=True)):
        share = rate if cumulative else rate ** (s + 1)
        kept, where = int(n0 * share), f"stage {s + 1} (block {block})"
        if kept < 1:
            raise UsageError(
                f"--keep-rate: {where} keeps no patch, {share:g} of {n0}: give a higher rate or fewer blocks in --at"
            )
        if kept > others:
            raise UsageError(
                f"--keep-rate: {where} keeps {kept} patches, only {others} are left: a list of rates holds shares of "
                f"the {n0} original patches and must not grow"
            )
        if kept == others:
            notes.append(_keeps_all(s + 1, block))
            continue
        steps.append(
            Step(
                block, "pre_block", n_prefix + others, n_prefix + kept, n_prefix + kept, others - kept if squeeze else 0
            )
        )
        others = kept
    return tuple(steps), notes


def diffrate(
    prune_kept: list[int], merge_kept: list[int], n_tokens: int, n_prefix: int, depth: int | None = None
) -> tuple[tuple[Step, ...], list[str]]:
    """DiffRate: in block b, prune_kept[b] tokens are left after pruning, then merge_kept[b] after merging.

    prune_kept, merge_kept: one count a block, prefix tokens included, each 1 or more. A count above what is there does nothing.
    depth: number of blocks, to check the lists against; None takes the lists' length.
    A block that keeps every token has no step, except the last: sorting there changes the order of the model's output tokens.
    Raises: UsageError when the lists do not fit each other or the model, leave no room for the prefix tokens, or merge with no patch
        left to merge into.
    Source: DiffRate (Chen et al. 2023).
    """
    check_counts(prune_kept, merge_kept)
    if depth is not None and len(prune_kept) != depth:
        raise UsageError(f"--rates: {len(prune_kept)} counts for a model with {depth} blocks: wanted one a block")
    n, steps = n_tokens, []
    all_stay, prune_cut, merge_cut = [], [], []
    for b, (prune, merge) in enumerate(zip(prune_kept, merge_kept)):
        if min(prune, merge) < max(1, n_prefix):
            raise UsageError(
                f"--rates: block {b} keeps {min(prune, merge)} tokens, which leaves no room for the class token "
                f"({n_prefix} prefix tokens): give a larger count"
            )
        left, out = min(prune, n), min(merge, prune, n)
        if left > out and out <= n_prefix:
            raise UsageError(
                f"--rates: block {b} merges {left - out} tokens and keeps {out}, {n_prefix} of them prefix tokens, which "
                f"none merges into: wanted merge_kept {n_prefix + 1} or more there"
            )
        for wanted, real, cut in ((prune, left, prune_cut), (merge, out, merge_cut)):
            if wanted > real:
                cut.append(f"{b} ({wanted} to {real})")
        if out == n:
            all_stay.append(str(b))
        if out < n or b == len(prune_kept) - 1:
            steps.append(Step(b, "post_attn", n, out, out, left - out))
        n = out
    notes = [f"every token stays in block {', '.join(all_stay)}"] if all_stay else []
    notes += [f"prune_kept was cut to the tokens there are in block {', '.join(prune_cut)}"] if prune_cut else []
    notes += (
        [f"merge_kept was cut to the tokens left after pruning in block {', '.join(merge_cut)}"] if merge_cut else []
    )
    return tuple(steps), notes


def check_counts(prune_kept: list[int], merge_kept: list[int], source: str = "--rates") -> None:
    """Raises: UsageError, which begins with source, unless both are lists of as many whole numbers from 1, one a block."""
    for name, values in (("prune_kept", prune_kept), ("merge_kept", merge_kept)):
        if not isinstance(values, (list, tuple)) or not values:
            raise UsageError(f"{source}: {name} is {_short(values)}: wanted a list of token counts, one a block")
        for b, v in enumerate(values):
            if not _is_whole(v) or not 1 <= v <= 10**6:
                raise UsageError(
                    f"{source}: {name} has {_short(v)} for block {b}: wanted a whole number of tokens, 1 to {10**6}"
                )
    if len(prune_kept) != len(merge_kept):
        raise UsageError(
            f"{source}: {len(prune_kept)} counts in prune_kept, {len(merge_kept)} in merge_kept: wanted one a block in both"
        )


def _keeps_all(stage: int, block: int) -> str:
    return f"stage {stage} (block {block}) keeps every token"


def _is_whole(v) -> bool:
    return isinstance(v, int) and not isinstance(v, bool)


def _is_number(v) -> bool:
    return isinstance(v, float) or _is_whole(v)


def _short(said) -> str:
    try:
        return repr(said[:40] if isinstance(said, str) else said)[:60]
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"


def cumulative(said: str | float | list | tuple, n_stages: int) -> list[float]:
    """Shares of the original patches for `tps`: rate, rate^2, ... for one value, a list as it is. said, Raises: see `parse_rates`."""
    rates = parse_rates(said, n_stages)
    several = "," in said if isinstance(said, str) else isinstance(said, (list, tuple)) and len(said) > 1
    return rates if several else [r ** (s + 1) for s, r in enumerate(rates)]
