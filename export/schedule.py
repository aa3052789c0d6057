"""How many tokens each block has: plain Python integers, known before any tensor exists. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .errors import UsageError


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
            raise UsageError(f"block {self.block}: cannot go from {self.n_in} tokens to {self.n_kept} kept, {self.n_out} out")
        if not 0 <= self.n_folded <= self.n_in - self.n_kept or self.n_out - self.n_kept > min(self.n_folded, 1):
            raise UsageError(f"block {self.block}: cannot fold {self.n_folded} of {self.n_in} tokens, {self.n_kept} kept, {self.n_out} out")


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
                raise UsageError(f"schedule: block {s.block} of a model with {self.depth} blocks (0 to {self.depth - 1})")
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
        return {**asdict(self), "steps": [asdict(s) for s in self.steps], "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: dict) -> "Schedule":
        """Raises UsageError when a field is missing or does not fit."""
        try:
            return cls(**{**data, "steps": tuple(Step(**s) for s in data["steps"]), "notes": tuple(data["notes"])})
        except (TypeError, KeyError) as e:
            raise UsageError(f"not a schedule: {e}") from None

    @classmethod
    def parse(cls, text: str | int | tuple | list = 0, *, method: str = "tome", depth: int, n_tokens: int, n_prefix: int = 1,
              prop_attn: bool = True) -> "Schedule":
        """Schedule of a method from its option as typed.

        text: ToMe's r as "13", "13:-1" (r and inflection) or "8,8,4" (one value a block), or the Python forms 13, (13, -1.0), [8, 8, 4].
        depth, n_tokens, n_prefix: of the model (DeiT-S: 12, 197, 1).
        prop_attn: add log(token size) to the attention logits.
        Raises: UsageError for anything that is not a count of tokens the model can lose.
        Source: ToMe (Bolya et al. 2023), `parse_r` for the forms, section 3 for the cut to half.
        """
        if method == "none":
            return cls("none", n_tokens, n_prefix, depth)
        if method != "tome":
            raise UsageError(f"unknown method {method!r}: wanted one of none, tome")
        return tome_schedule(parse_r(text, depth), n_tokens, n_prefix, prop_attn)


def parse_r(r: str | int | tuple | list, depth: int) -> list[int]:
    """Tokens to merge per block, before the cut to half.

    r: "13", "13:-1", "8,8,4" or 13, (13, -1.0), [8, 8, 4]. A pair (r, inflection) runs linearly from r(1 - inflection) to
    r(1 + inflection), each value truncated; a list is padded with zeros.
    Raises: UsageError when r is no number, negative, has an inflection outside [-1, 1] or more values than there are blocks.
    """
    said = r
    if isinstance(r, str):
        try:
            if ":" in r:
                head, tail = r.split(":")
                r = (int(head), float(tail))
            else:
                r = [int(v) for v in r.split(",")] if "," in r else int(r)
        except ValueError:
            raise UsageError(f"--r {said!r} is not a token count: wanted 13, 13:-1 (r:inflection) or 8,8,4,... (one a block)") from None
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool)
    if isinstance(r, list) and r and all(map(whole, r)):
        if len(r) > depth:
            raise UsageError(f"--r {said!r} has {len(r)} values, the model has {depth} blocks: give at most one a block")
        values = r + [0] * (depth - len(r))
    else:
        r, inflection = r if isinstance(r, tuple) and len(r) == 2 else (r, 0.0)
        if not whole(r) or not isinstance(inflection, (int, float)):
            raise UsageError(f"--r {said!r}: wanted whole numbers of tokens: one, a pair (r, inflection) or a list, one a block")
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


def tome_schedule(values: list[int], n_tokens: int, n_prefix: int, prop_attn: bool = True) -> Schedule:
    """ToMe's counts: in every block min(r, (N - prefix) // 2) tokens merge.

    values: r per block. Raises: UsageError when an r is larger than the number of tokens of the model.
    """
    for b, r in enumerate(values):
        if r > n_tokens:
            raise UsageError(f"--r: block {b} is asked to merge {r} tokens, the model has {n_tokens}; at most half of the tokens "
                             f"can merge in one block ({(n_tokens - n_prefix) // 2} in block 0)")
    n, steps, cut = n_tokens, [], []
    for b, r in enumerate(values):
        real = min(r, max(n - n_prefix, 0) // 2)
        if real < r:
            cut.append(f"{b} ({r} to {real})")
        if real:
            steps.append(Step(b, "post_attn", n, n - real, n - real))
            n -= real
    notes = (f"r was cut to half of the tokens in block {', '.join(cut)}",) if cut else ()
    return Schedule("tome", n_tokens, n_prefix, len(values), {"r": list(values), "prop_attn": prop_attn}, tuple(steps), notes)
