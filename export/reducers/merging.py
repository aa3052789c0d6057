"""Counts of the methods that merge a number of tokens in every block (ToMe, ToFu, DTEM): cut to what can merge, rounded on request."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError
from ..step import ModelSize, Step
from . import options


def merge_counts(
    asked: dict, size: ModelSize, *, make: Callable[[int, int, int], Step]
) -> tuple[dict, list[Step], list[str]]:
    """In every block of `at`, min(r, (N - prefix) // 2) tokens merge; with `align`, so many that a multiple of it is left.

    Rounded counts stay near the wish: what is left after each step is the multiple nearest to what would be left without rounding.

    Args:
        asked: r, at, align.
        size: of the model.
        make: (block, tokens in, tokens out) -> the step.
    Returns:
        The options with r as one number for each block of `at`, steps, and notes on what was cut or rounded.
    Raises:
        UsageError: r does not fit the blocks, or is larger than the number of tokens of the model.
    """
    values = options.parse_r(asked["r"], len(asked["at"]))
    for block, r in zip(asked["at"], values):
        if r > size.n_tokens:
            raise UsageError(
                f"r: block {block} is asked to merge {r} tokens, the model has {size.n_tokens}; at most half of the tokens "
                f"can merge in one block ({(size.n_tokens - size.n_prefix) // 2} in block 0)"
            )
    wished, n, steps, cut = size.n_tokens, size.n_tokens, [], []
    for block, r in zip(asked["at"], values):
        most = max(wished - size.n_prefix, 0) // 2
        if most < r:
            cut.append(f"{block} ({r} to {most})")
        if not min(r, most):
            continue
        wished -= min(r, most)
        out = rounded(wished, n, least=n - max(n - size.n_prefix, 0) // 2, multiple=asked["align"])
        if out < n:
            steps.append(make(block, n, out))
            n = out
    notes = [f"r was cut to half of the tokens in block {', '.join(cut)}"] if cut else []
    if asked["align"] > 1:
        merged = ", ".join(f"{s.n_in - s.n_out} in {s.block}" for s in steps)
        notes.append(f"tokens after each step are multiples of {asked['align']}: merged are {merged or 'none'}")
    return {**asked, "r": values}, steps, notes


def rounded(wish: int, n: int, *, least: int, multiple: int) -> int:
    """Tokens that a step leaves: the multiple nearest to a wish (halves up) that it can reach; n when it can reach none.

    Args:
        wish: tokens that would be left without rounding.
        n: tokens that come in.
        least: the fewest that can be left.
        multiple: 1 for no rounding.
    """
    nearest = (wish + multiple // 2) // multiple * multiple
    out = max(nearest, -(-least // multiple) * multiple)
    return out if out < n else n
