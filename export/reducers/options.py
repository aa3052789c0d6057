"""Options that several methods share, and how their values are read: keep rates, blocks, tokens to merge. Imports no torch.

Every reader takes a value as typed at the command line or as a Python value, and says what was wanted instead when it refuses one.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ..errors import UsageError
from .base import Option

NUMBER = re.compile(
    r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?"
)  # stricter than float(): no "1_0", no other digits
SIGNAL_OF = {"class": "class_attention", "mean": "mean_attention"}


def parse_r(r: str | int | tuple | list, n_blocks: int) -> list[int]:
    """Tokens to merge per block, before the cut to half.

    Args:
        r: "13", "13:-1", "8,8,4" or 13, (13, -1.0), [8, 8, 4]. A pair (r, inflection) runs linearly from r(1 - inflection) to
            r(1 + inflection), each value truncated; a list is padded with zeros.
        n_blocks: number of blocks that reduce.
    Returns:
        One number for each of them.
    Raises:
        UsageError: r is no number, negative, has an inflection outside [-1, 1] or more values than there are blocks.
    Source:
        ToMe (Bolya et al. 2023), `parse_r` of the authors' code.
    """
    typed = short(r)
    r = _split_r(r) if isinstance(r, str) else r
    if isinstance(r, list) and r and all(map(is_whole, r)):
        if len(r) > n_blocks:
            raise UsageError(
                f"r {typed} has {len(r)} values for {n_blocks} blocks that reduce: give at most one a block"
            )
        values = r + [0] * (n_blocks - len(r))
    else:
        r, inflection = r if isinstance(r, tuple) and len(r) == 2 else (r, 0.0)
        if not is_whole(r) or not isinstance(inflection, (int, float)):
            raise UsageError(
                f"r {typed}: wanted whole numbers of tokens: one, a pair (r, inflection) or a list, one a block"
            )
        if not -1 <= inflection <= 1:
            raise UsageError(f"r {typed}: inflection {inflection} is outside [-1, 1]")
        if r > 10**6:
            raise UsageError(f"r {typed}: more tokens than any model has")
        low = int(r * (1.0 - inflection))
        slope = (2 * r - low - low) / (n_blocks - 1) if n_blocks > 1 else 0.0
        values = [r] if r < 0 else [int(low + slope * i) for i in range(n_blocks)]
    if min(values) < 0:
        raise UsageError(f"r {typed} is negative: wanted 0 (nothing merged) or more tokens per block")
    return values


def _split_r(text: str) -> int | tuple | list:
    try:
        if not text.isascii() or "_" in text:  # int() would take other digits, and 1_3
            raise ValueError(text)
        if ":" in text:
            head, tail = text.split(":")
            return int(head), float(tail)
        return [int(v) for v in text.split(",")] if "," in text else int(text)
    except ValueError:
        raise UsageError(
            f"r {text[:60]!r} is not a token count: wanted 13, 13:-1 (r:inflection) or 8,8,4,... (one a block)"
        ) from None


def parse_rates(rates: str | float | list | tuple, n_stages: int) -> list[float]:
    """Keep rates, one a stage.

    Args:
        rates: "0.7" or "0.7,0.6,0.5", 0.7 or [0.7, 0.6, 0.5]; each in (0, 1]. One value is repeated for every stage.
        n_stages: as many as there are blocks in `at`.
    Raises:
        UsageError: one is no number in (0, 1], or there is neither one nor exactly one a stage.
    """
    if isinstance(rates, str):
        values = [float(p) if NUMBER.fullmatch(p) else None for p in map(str.strip, rates.split(","))]
    else:
        values = list(rates) if isinstance(rates, (list, tuple)) else [rates]
    if not values or not all(_is_number(v) and 0 < v <= 1 for v in values):
        raise UsageError(
            f"keep_rate {short(rates)}: wanted a number above 0 and at most 1, e.g. 0.7, or one for each stage, "
            "e.g. 0.7,0.6,0.5"
        )
    if len(values) not in (1, n_stages):
        raise UsageError(
            f"keep_rate {short(rates)} has {len(values)} values for {n_stages} stage{'s' * (n_stages != 1)}: "
            "give one, or one for each block in at"
        )
    return [float(v) for v in values] * (n_stages if len(values) == 1 else 1)


def parse_cumulative(rates: str | float | list | tuple, n_stages: int) -> list[float]:
    """Shares of the original patches that stay after each stage.

    Args:
        rates: one rate, of what the stage before left (rate, rate^2, ...), or a list of shares, taken as it is; see `parse_rates`.
        n_stages: as many as there are blocks in `at`.
    Raises:
        UsageError: see `parse_rates`.
    """
    values = parse_rates(rates, n_stages)
    several = "," in rates if isinstance(rates, str) else isinstance(rates, (list, tuple)) and len(rates) > 1
    return values if several else [v ** (stage + 1) for stage, v in enumerate(values)]


def parse_at(blocks: str | list | tuple, depth: int) -> list[int]:
    """The blocks that reduce, from 0.

    Args:
        blocks: "3,6,9" or [3, 6, 9]: distinct, ascending, each in [0, depth); "all", or "even" for every other from 0.
        depth: number of blocks.
    Raises:
        UsageError: anything else.
    """
    if blocks in ("all", "even"):
        return list(range(0, depth, 1 if blocks == "all" else 2))
    if isinstance(blocks, str):
        values = [int(p) if re.fullmatch("[0-9]{1,9}", p.strip()) else None for p in blocks.split(",")]
    else:
        values = list(blocks) if isinstance(blocks, (list, tuple)) else []
    if not values or not all(map(is_whole, values)):
        raise UsageError(f"at {short(blocks)}: wanted block numbers from 0, e.g. 3,6,9, or all, or even")
    outside = [v for v in values if not 0 <= v < depth]
    if outside:
        default = " (the default)" if tuple(values) == STAGES else ""
        raise UsageError(
            f"at {short(blocks)}{default}: there is no block {short(outside[0])}, the model has {depth} (0 to {depth - 1}): give "
            "others"
        )
    if any(a >= b for a, b in zip(values, values[1:])):
        raise UsageError(f"at {short(blocks)}: wanted each block once, in ascending order")
    return values


def parse_whole(name: str, value: str | int, *, least: int) -> int:
    """A whole number.

    Args:
        name: of the option, for the error.
        value: "8" or 8.
        least: the smallest that is taken.
    Raises:
        UsageError: it is no whole number, or too small.
    """
    number = int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]{1,6}", value.strip()) else value
    if not is_whole(number) or not least <= number <= 10**6:
        raise UsageError(f"{name} {short(value)}: wanted a whole number from {least} on")
    return number


def keeps_all(stage: int, block: int) -> str:
    """The note for a stage that has no step.

    Args:
        stage: counted from 1.
        block: from 0.
    """
    return f"stage {stage} (block {block}) keeps every token"


def is_whole(value: object) -> bool:
    """Whether a value is a whole number (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, float) or is_whole(value)


def short(value: object) -> str:
    """A value as an error shows it, at most 60 characters."""
    try:
        return repr(value[:40] if isinstance(value, str) else value)[:60]
    except ValueError:  # Python does not print integers of thousands of digits
        return "a number of thousands of digits"


STAGES = (3, 6, 9)
R = Option(
    "r",
    "tokens merged per block: 13, 13:-1 (r:inflection) or 8,8,4,... (one a block)",
    metavar="R",
    swept=True,
)
KEEP_RATE = Option("keep_rate", "share of tokens kept, or a list, one a stage", default=0.7, metavar="RATE", swept=True)
KEEP_SHARE = Option(
    "keep_rate",
    "share of patches that each stage keeps of the last, or a list of shares of all patches, one a stage",
    default=0.7,
    metavar="RATE",
    swept=True,
)
AT = Option(
    "at",
    "blocks with a reduction, from 0: a list, all, or even (every other)",
    default=STAGES,
    metavar="BLOCKS",
    parse=lambda value, size: parse_at(value, size.depth),
    default_help="3,6,9",
)
EVERY = replace(AT, default="all", default_help=None)
ALIGN = Option(
    "align",
    "round the tokens after each step, prefix included, to multiples of this",
    default=1,
    metavar="N",
    parse=lambda value, size: parse_whole("align", value, least=1),
)
PROP_ATTN = Option(
    "prop_attn",
    "attention proportional to token size; off for models that were trained with merging, and for ToMe on MAE-trained ones",
    default=True,
    flag=True,
)
POOL = Option(
    "pool",
    "weigh an average pool by token size, or not",
    default="auto",
    choices=("auto", "size", "mean"),
    default_help="auto, by size for models that pool like MAE's, as the authors do",
)
SCORE = Option(
    "score",
    "sort by the attention the class token pays, or by the mean attention received, a substitute for models without one",
    default="class",
    choices=("class", "mean"),
)
