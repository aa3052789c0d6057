"""One reduction of a schedule, in plain Python integers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .errors import UsageError
from .plan import SIGNALS

SITES = ("pre_block", "post_attn")  # in the order they stand in a block


class ModelSize(NamedTuple):
    """What counts are made from.

    Args:
        n_tokens: tokens entering block 0, prefix tokens included.
        n_prefix: class, distillation and register tokens at the head of the sequence.
        depth: number of blocks.
    """

    n_tokens: int
    n_prefix: int
    depth: int


@dataclass(frozen=True)
class Step:
    """One reduction inside (or before) one block.

    Args:
        block: index of the block, from 0.
        site: where it stands: "post_attn" (after the attention residual, before norm2) or "pre_block" (before norm1).
        n_in: tokens that come in, prefix tokens included.
        n_kept: input rows that survive as rows of their own.
        n_out: tokens that go out: n_kept plus any extra (fused) token.
        n_folded: input rows that are folded into the rows that go out; all that are not kept by default. The rest is dropped.
        signal: what it looks at, a key of `plan.SIGNALS`; None for the tokens alone.
        layer: which of the layers that were trained for its signal it reads (score head 0, 1, ...); None for other signals.
        settings: what else its method decided for this step, JSON values that only the method reads.
    Raises:
        UsageError: the numbers do not fit each other, or site or signal is unknown.
    """

    block: int
    site: str
    n_in: int
    n_kept: int
    n_out: int
    n_folded: int | None = None
    signal: str | None = None
    layer: int | None = None
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.n_folded is None:
            object.__setattr__(self, "n_folded", self.n_in - self.n_kept)
        where = f"block {self.block}"
        if self.site not in SITES:
            raise UsageError(f"step site {self.site!r}: wanted post_attn or pre_block")
        if self.signal is not None and self.signal not in SIGNALS:
            raise UsageError(f"step signal {self.signal!r}: wanted one of {', '.join(SIGNALS)}, or None")
        learned = self.signal is not None and SIGNALS[self.signal].learned
        if learned != (self.layer is not None) or (learned and self.layer < 0):
            raise UsageError(
                f"{where}: layer {self.layer} with signal {self.signal}: wanted the number of a trained layer, from 0, "
                f"for {', '.join(n for n, s in SIGNALS.items() if s.learned)}, and None for other signals"
            )
        if not 1 <= self.n_kept <= self.n_out <= self.n_in:
            raise UsageError(f"{where}: cannot go from {self.n_in} tokens to {self.n_kept} kept, {self.n_out} out")
        if not 0 <= self.n_folded <= self.n_in - self.n_kept or self.n_out - self.n_kept > min(self.n_folded, 1):
            raise UsageError(
                f"{where}: cannot fold {self.n_folded} of {self.n_in} tokens, {self.n_kept} kept, {self.n_out} out"
            )
