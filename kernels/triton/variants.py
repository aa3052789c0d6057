"""Tiles and limits of the kernels: the one table that the call from PyTorch, the compiler and the plugin's header take them from.

Imports nothing heavy, so that what does not fit can be said without a GPU or Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..token_reduce import FOLDS, Reduction

MATCH = {"BLOCK_A": 32, "BLOCK_B": 32, "BLOCK_D": 32}  # 64 x 64 spills in float32 (ptxas 12.9, sm_80)
APPLY = {"BLOCK": 256, "CHUNK": 16}
UNIT_VALUES = 1024  # rows times columns of a block of `unit`
WIDTHS = (64, 128, 1024, 2048)  # of the rows that `unit` takes
RANKED = {256: (16, 4), 1024: (8, 8), 2048: (4, 16)}  # values that `rank` takes: (compared at once, warps)
MULTIPLE = 8  # channels and head sizes: 16 bytes of half floats
FOLD_CODE = {name: code for code, name in enumerate(FOLDS)}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants.

    Attributes:
        kernel: "unit", "match", "rank" or "apply".
        constants: its compile-time arguments.
        warps: of a block.
    """

    kernel: str
    constants: Mapping[str, int]
    warps: int = 4

    @property
    def name(self) -> str:
        """Of the compiled kernel's files, without type and chip: "unit_64", "match_pairs", ..."""
        kind = {
            "unit": lambda c: c["BLOCK"],
            "match": lambda c: "index" if c["BY_INDEX"] else "pairs",
            "rank": lambda c: f"{'pairs' if c['PAIRS'] else 'score'}_{c['BLOCK']}",
            "apply": lambda c: "rows",
        }[self.kernel](self.constants)
        return f"{self.kernel}_{kind}"


def unit_variant(width: int) -> Variant:
    """The `unit` kernel for rows of a width."""
    block = next(w for w in WIDTHS if width <= w)
    return Variant("unit", {"ROWS": max(1, UNIT_VALUES // block), "BLOCK": block})


def match_variant(pairs: bool) -> Variant:
    """The `match` kernel of a select."""
    return Variant("match", {**MATCH, "BY_INDEX": int(not pairs)})


def rank_variant(n: int, pairs: bool) -> Variant:
    """The `rank` kernel for at most n values, hosts and prefix tokens.

    Args:
        n: the most of the three.
        pairs: of the select.
    """
    block = next(b for b in RANKED if n <= b)
    chunk, warps = RANKED[block]
    return Variant("rank", {"BLOCK": block, "CHUNK": chunk, "PAIRS": int(pairs)}, warps)


def apply_variant() -> Variant:
    """The `apply` kernel."""
    return Variant("apply", APPLY)


def ranked(op: Reduction) -> int:
    """How many values `rank` is asked to take for a node."""
    p = op.pairing
    return max(p.n_a, p.n_b, op.n_prefix) if op.select == "pairs" else op.n_in


def limit(op: Reduction, channels: int, head: int | None = None) -> str | None:
    """What keeps the kernels from a node.

    Args:
        op: the node.
        channels: C of its tokens.
        head: D of its keys, for select = "pairs".
    Returns:
        Words for a person, None when the kernels take it.
    """
    matched = head if op.select == "pairs" else channels if op.fold in ("mean", "squeeze") else None
    if channels % MULTIPLE or matched and matched % MULTIPLE:
        return f"{channels} channels and head size {head}: the kernels take multiples of {MULTIPLE}"
    if matched and matched > WIDTHS[-1]:
        return f"rows of {matched} values are matched: the kernels take at most {WIDTHS[-1]}"
    if ranked(op) > max(RANKED):
        return f"{ranked(op)} tokens are sorted: the kernels take at most {max(RANKED)}"
    return None
