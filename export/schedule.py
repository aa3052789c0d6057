"""How many tokens each block has: plain Python integers, known before any tensor exists. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import UsageError
from .records import decode, encode


@dataclass(frozen=True)
class Step:
    """One reduction inside (or before) one block.

    block: index of the block, from 0.
    site: "post_attn" (after the attention residual, before norm2) or "pre_block" (before norm1).
    n_in: tokens that come in, prefix tokens included.
    n_kept: input rows that survive as rows of their own.
    n_out: tokens that go out: n_kept plus any extra (fused) token.
    n_folded: input rows that are folded into the rows that go out; all that are not kept by default. The rest is dropped.
    """

    block: int
    site: str
    n_in: int
    n_kept: int
    n_out: int
    n_folded: int | None = None

    def __post_init__(self):
        if self.n_folded is None:
            object.__setattr__(self, "n_folded", self.n_in - self.n_kept)
        if self.site not in ("post_attn", "pre_block"):
            raise UsageError(f"step site {self.site!r}: wanted post_attn or pre_block")
        if not 1 <= self.n_kept <= self.n_out <= self.n_in:
            raise UsageError(
                f"block {self.block}: cannot go from {self.n_in} tokens to {self.n_kept} kept, {self.n_out} out"
            )
        if not 0 <= self.n_folded <= self.n_in - self.n_kept or self.n_out - self.n_kept > min(self.n_folded, 1):
            raise UsageError(
                f"block {self.block}: cannot fold {self.n_folded} of {self.n_in} tokens, {self.n_kept} kept, {self.n_out} out"
            )


@dataclass(frozen=True)
class Schedule:
    """Token counts of one reduced model.

    method: a name of the reducer table.
    n_tokens: tokens entering block 0, prefix tokens included.
    n_prefix: class, distillation and register tokens at the head of the sequence.
    depth: number of blocks.
    options: what the method was asked for (JSON values), e.g. {"r": [13, ...], "prop_attn": true}.
    steps: the reductions that change something, in block order.
    notes: what was cut or scaled on the way from the request to the steps, in words.
    """

    method: str
    n_tokens: int
    n_prefix: int
    depth: int
    options: dict = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        n = self.n_tokens
        order = {"pre_block": 0, "post_attn": 1}
        last = (-1, 0)
        for s in self.steps:
            if not 0 <= s.block < self.depth:
                raise UsageError(
                    f"schedule: block {s.block} of a model with {self.depth} blocks (0 to {self.depth - 1})"
                )
            if (s.block, order[s.site]) <= last:
                raise UsageError(f"schedule: steps out of order at block {s.block}")
            if s.n_in != n:
                raise UsageError(f"schedule: block {s.block} expects {s.n_in} tokens and gets {n}")
            last, n = (s.block, order[s.site]), s.n_out

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
        n, out, at = self.n_tokens, [], self.by_site
        for b in range(self.depth):
            n = at[b, "pre_block"].n_out if (b, "pre_block") in at else n
            m = at[b, "post_attn"].n_out if (b, "post_attn") in at else n
            out.append((n, m))
            n = m
        return out

    def to_json(self) -> dict:
        """Plain JSON values; `from_json` takes them back."""
        return encode(self)

    @classmethod
    def from_json(cls, data: dict) -> "Schedule":
        """Raises UsageError when a field is missing or does not fit."""
        return decode(cls, data, name="not a schedule")

    @classmethod
    def parse(
        cls,
        r: str | int | tuple | list | None = None,
        *,
        method: str = "tome",
        depth: int,
        n_tokens: int,
        n_prefix: int = 1,
        **options,
    ) -> "Schedule":
        """Schedule of a method from its options, each as typed at the command line or as a Python value.

        r: ToMe's r as "13", "13:-1" (r and inflection) or "8,8,4" (one value a block), or the Python forms 13, (13, -1.0), [8, 8, 4].
        depth, n_tokens, n_prefix: of the model (DeiT-S: 12, 197, 1).
        options: prop_attn (ToMe, DiffRate: add log(token size) to the attention logits); keep_rate, at (EViT, eTPS, dTPS, DynamicViT:
        "0.7" or one rate a stage; blocks from 0); fuse (EViT); rates (DiffRate: "deit_small@2.9", a file or a dictionary); score
        ("class", or "mean" for models without a class token). What is None takes the method's default.
        Raises: UsageError for an option the method does not have, or a value the model cannot serve.
        Source: the module of the method in `export/reducers`.
        """
        from . import reducers

        given = {k: v for k, v in {"r": r, **options}.items() if v is not None}
        reducers.check_options(method, given)
        reducer = reducers.get(method)
        if reducer is None:
            return cls("none", n_tokens, n_prefix, depth)
        if given.get("score", "class") not in ("class", "mean"):
            raise UsageError(
                f"score {given['score']!r}: wanted class (attention of the class token) or mean (mean attention received)"
            )
        options, steps, notes = reducer.steps({**reducer.OPTIONS, **given}, n_tokens, n_prefix, depth)
        return cls(method, n_tokens, n_prefix, depth, options, tuple(steps), tuple(notes))
