"""A file's decisions as fates of rows, and whether two runtimes decided alike. NumPy alone.

Rows are numbered anew by every step, so the fates are followed by the tokens' identities: a token keeps the number that
it had in block 0, a fused one gets the next free number. The order of the rows that stay is then no difference, unless
it is part of the decision (`ordered`: a ToMe without a class token partitions the next block by it).

Example: tokens 0 1 2 3, two steps. One runtime keeps rows 0 3 1 and folds 2 into 3, the other keeps 0 1 3 and folds 2
into 3: alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...export.errors import UsageError
from .manifest import DecisionEntry

DROPPED = -1


class DecisionError(UsageError):
    """What a file gives as a decision is none: a row stays twice, is not there, or has no host."""


class Fates(NamedTuple):
    """What becomes of the rows of one step.

    Args:
        keep: [B, n_kept] rows that stay, in their new order.
        host: [B, n_in] the row itself where it stays, its host where it is folded, n_in where it is fused into the
            extra row, DROPPED.
    """

    keep: np.ndarray
    host: np.ndarray


class Difference(NamedTuple):
    """The first step in which an image is decided otherwise.

    Args:
        block: of the step.
        tokens: how many tokens.
        margin: the largest of their stored margins.
        limit: of a near-tie.
    """

    block: int
    tokens: int
    margin: float
    limit: float

    @property
    def explained(self) -> bool:
        return self.margin <= self.limit  # false for a margin that is no number


class Comparison(NamedTuple):
    """One image.

    Args:
        difference: None when it is decided alike.
        reordered: the rows that stay are the same, in another order.
    """

    difference: Difference | None
    reordered: bool


def read_fates(values: dict[str, np.ndarray], step: DecisionEntry) -> Fates:
    """The fates in what a file gave.

    Args:
        values: name -> [B, .., 1] integers.
        step: with the names.
    Raises:
        DecisionError: they are none.
    """
    parts = {part: np.asarray(values[name])[..., 0].astype(np.int64) for part, name in step.parts.items()}
    order = parts["order"] if "order" in parts else np.concatenate([parts[p] for p in ("keep", "src") if p in parts], 1)
    rows = np.sort(order, 1)
    used = step.n_kept + step.n_folded
    if order.shape[1] != used or (rows < 0).any() or (rows >= step.n_in).any() or (np.diff(rows, axis=1) <= 0).any():
        raise DecisionError(
            f"block {step.block}: the decisions of the file are none (a row stays twice, or is not there)"
        )
    keep, src = order[:, : step.n_kept], order[:, step.n_kept :]
    host = np.full((len(order), step.n_in), DROPPED)
    np.put_along_axis(host, keep, keep, 1)
    if step.n_folded:
        np.put_along_axis(host, src, _hosts(parts, keep, src, step), 1)
    return Fates(keep, host)


def _hosts(parts: dict, keep: np.ndarray, src: np.ndarray, step: DecisionEntry) -> np.ndarray:
    """Rows that the folded rows go to, [B, R]."""
    if step.n_out > step.n_kept:
        return np.full_like(src, step.n_in)
    label = parts["dst"] if "dst" in parts else np.take_along_axis(parts["target"], src, 1)
    hit = label[:, :, None] == np.asarray(step.row_labels)
    if not hit.any(2).all():
        raise DecisionError(
            f"block {step.block}: the decisions of the file are none (a row is folded into one that does not stay)"
        )
    return np.take_along_axis(keep, hit.argmax(2), 1)


def compare(
    stored: list[Fates], margins: list[np.ndarray], *, file: list[Fates], steps, image: int, tokens: int, ordered: bool
) -> Comparison:
    """Whether an image is decided as it was.

    Args:
        stored: of every step, by the file when it was bundled.
        margins: of every step, [2, B, n_in]: of the fate and of the host, in the stored numbering.
        file: of every step, by the file now.
        steps: the manifest's decisions.
        image: which of the batch.
        tokens: that enter block 0.
        ordered: see the module.
    Returns:
        `Comparison`; after the first difference nothing is compared, since other tokens meet each other.
    """
    ids, ids_now, reordered = np.arange(tokens), np.arange(tokens), False
    for k, step in enumerate(steps):
        if len(ids) != step.n_in:  # a step that decides nothing is not in the file
            raise DecisionError(
                f"block {step.block}: {step.n_in} tokens where {len(ids)} are left: the manifest was changed"
            )
        then, now = (Fates(f.keep[image], f.host[image]) for f in (stored[k], file[k]))
        fused = tokens + k
        fates, fates_now = _by_token(then, ids, fused), _by_token(now, ids_now, fused)
        kept, kept_now = ids[then.keep], ids_now[now.keep]
        differ = np.flatnonzero(fates != fates_now)
        if not len(differ) and ordered:
            differ = np.unique(np.concatenate([kept[kept != kept_now], kept_now[kept != kept_now]]))
        if len(differ):
            row = {int(t): r for r, t in enumerate(ids)}
            margin = max(_margin(t, fates, fates_now, margins[k][:, image, row[int(t)]]) for t in differ)
            return Comparison(Difference(step.block, len(differ), float(margin), step.near_tie), reordered)
        reordered |= bool((kept != kept_now).any())
        extra = [fused] if step.n_out > step.n_kept else []
        ids, ids_now = np.append(kept, extra).astype(int), np.append(kept_now, extra).astype(int)
    return Comparison(None, reordered)


def _by_token(fates: Fates, ids: np.ndarray, fused: int) -> np.ndarray:
    """Token -> the token it ends in: itself, its host, `fused`, or DROPPED; -2 of tokens that are gone."""
    where = np.append(ids, [fused, DROPPED])  # rows n_in and -1
    by_token = np.full(fused + 1, -2)
    by_token[ids] = where[fates.host]
    return by_token


def _margin(token: int, fates: np.ndarray, now: np.ndarray, margins: np.ndarray) -> float:
    """What speaks against the other fate of a token; 0 where it only follows from that of its host."""
    kind = lambda fate: 0 if fate == token else 1 if fate >= 0 else fate
    if kind(fates[token]) != kind(now[token]) or kind(now[token]) == 0:
        return margins[0]
    hosts = fates[token], now[token]
    both_stay = all(side[h] == h for side in (fates, now) for h in hosts)
    return margins[1] if both_stay else 0.0
