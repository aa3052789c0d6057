"""How many tokens each block has: plain Python integers, known before any tensor exists. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import reducers
from .errors import UsageError
from .records import decode, encode
from .step import ModelSize, Step

POOLS = ("auto", "size", "mean")


@dataclass(frozen=True)
class Schedule:
    """Token counts of one reduced model.

    Args:
        method: a name of the reducer table.
        n_tokens: tokens entering block 0, prefix tokens included.
        n_prefix: class, distillation and register tokens at the head of the sequence.
        depth: number of blocks.
        options: what the method was asked for (JSON values), e.g. {"r": [13, ...], "prop_attn": true}; a record, which no part of
            the model reads.
        steps: the reductions that change something, in block order, at most one a block.
        notes: what was cut or scaled on the way from the request to the steps, in words.
        prop_attn: add log(token size) to the attention logits.
        pool: "size" to weigh an average pool by token size, "mean" for the model's own, "auto" for the one or the other by model.
        n_layers: layers that were trained for the steps' signal (score heads); a stage without a step has one as well.
    Raises:
        UsageError: a field is out of range, or the steps do not follow each other.
    """

    method: str
    n_tokens: int
    n_prefix: int
    depth: int
    options: dict = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()
    prop_attn: bool = False
    pool: str = "mean"
    n_layers: int = 0

    def __post_init__(self):
        reducers.get(self.method)
        for name, least in (("n_tokens", 1), ("n_prefix", 0), ("depth", 1), ("n_layers", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UsageError(f"schedule: {name} is {value!r}, wanted a whole number from {least} on")
        if self.n_prefix > self.n_tokens:
            raise UsageError(f"schedule: {self.n_prefix} prefix tokens of {self.n_tokens} tokens in all")
        if self.pool not in POOLS:
            raise UsageError(f"pool {self.pool!r}: wanted one of {', '.join(POOLS)}")
        self._check_steps()

    def _check_steps(self) -> None:
        n, last = self.n_tokens, -1
        for s in self.steps:
            if not 0 <= s.block < self.depth:
                raise UsageError(
                    f"schedule: block {s.block} of a model with {self.depth} blocks (0 to {self.depth - 1})"
                )
            if s.block == last:
                raise UsageError(
                    f"schedule: block {s.block} has two steps; wanted one a block, since its decisions are named after it"
                )
            if s.block < last:
                raise UsageError(f"schedule: steps out of order at block {s.block}")
            if s.n_in != n:
                raise UsageError(f"schedule: block {s.block} expects {s.n_in} tokens and gets {n}")
            if s.n_kept < self.n_prefix:
                raise UsageError(
                    f"schedule: block {s.block} keeps {s.n_kept} tokens, fewer than the {self.n_prefix} prefix tokens"
                )
            if s.layer is not None and s.layer >= self.n_layers:
                raise UsageError(
                    f"schedule: block {s.block} reads layer {s.layer} of {self.n_layers} (n_layers) trained for its signal"
                )
            last, n = s.block, s.n_out

    @property
    def size(self) -> ModelSize:
        """The model the counts are for."""
        return ModelSize(self.n_tokens, self.n_prefix, self.depth)

    @property
    def n_final(self) -> int:
        """Tokens after the last block."""
        return self.steps[-1].n_out if self.steps else self.n_tokens

    @property
    def by_site(self) -> dict[tuple[int, str], Step]:
        """The steps, keyed by (block, site)."""
        return {(s.block, s.site): s for s in self.steps}

    def tokens_per_block(self) -> list[tuple[int, int]]:
        """(tokens in the attention, tokens in the MLP) of every block."""
        n, tokens, sites = self.n_tokens, [], self.by_site
        for b in range(self.depth):
            n = sites[b, "pre_block"].n_out if (b, "pre_block") in sites else n
            m = sites[b, "post_attn"].n_out if (b, "post_attn") in sites else n
            tokens.append((n, m))
            n = m
        return tokens

    def to_json(self) -> dict:
        """Plain JSON values; `from_json` takes them back."""
        return encode(self)

    @classmethod
    def from_json(cls, data: dict) -> Schedule:
        """Raises UsageError when a field is missing or does not fit."""
        return decode(cls, data, name="not a schedule")

    @classmethod
    def parse(cls, method: str, *, n_tokens: int, depth: int, n_prefix: int = 1, **options: Any) -> Schedule:
        """The schedule of a method from its options, each as typed at the command line or as a Python value.

        `loaded.schedule(method, **options)` fills in the numbers of the model.

        Args:
            method: a name of the reducer table: "tome", "evit", ..., or "none".
            n_tokens: tokens entering block 0, prefix tokens included (DeiT-S at 224 pixels: 197).
            depth: number of blocks.
            n_prefix: class, distillation and register tokens.
            options: the method's own (`reducers.TABLE[method].options` lists them with their help), e.g. r=13, r="13:-1",
                keep_rate=0.7, at=[3, 6, 9]. What is None takes the method's default.
        Returns:
            The schedule; its `notes` say what was cut or scaled.
        Raises:
            UsageError: an option that the method does not have or that is missing, or a value that the model cannot serve.
        """
        reducer, size = reducers.get(method), ModelSize(n_tokens, n_prefix, depth)
        cls(method, *size)  # sizes that cannot be are told before options that do not fit them
        counts = reducer.steps(reducers.check_options(method, options, size), size)
        lists = {"steps": tuple(counts.steps), "notes": tuple(counts.notes)}
        return cls(method, *size, **{**counts._asdict(), **lists})
