"""DiffRate's keep counts: the authors' published lists, lists from a file, and both fitted to another token count. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.learned_rates import list_in, names_in
from ..errors import UsageError
from .options import is_whole, short

# Facts published with DiffRate (Chen et al. 2023), as they are there.
DATA = Path(__file__).with_name("diffrate_rates.json")
MODELS = {  # our name: theirs; their CAFormer is no plain ViT
    "deit_tiny": "ViT-T-DeiT",
    "deit_small": "ViT-S-DeiT",
    "deit_base": "ViT-B-DeiT",
    "mae_base": "ViT-B-MAE",
    "mae_large": "ViT-L-MAE",
    "mae_huge": "ViT-H-MAE",
}
KEYS = {
    "prune_kept": "prune_kept",
    "prune_kept_num": "prune_kept",
    "merge_kept": "merge_kept",
    "merge_kept_num": "merge_kept",
    "n_tokens": "n_tokens",
}
FORM = 'wanted JSON like {"prune_kept": [197, ...], "merge_kept": [197, ...]}, one count a block'
LARGEST = 10**6  # bytes of a file with lists


class KeepCounts(NamedTuple):
    """Tokens that are left in every block, prefix tokens included.

    Args:
        prune_kept: one count a block, after pruning.
        merge_kept: one count a block, after merging.
        n_tokens: tokens entering block 0 of the model they were made for; None when that is not known.
    """

    prune_kept: list[int]
    merge_kept: list[int]
    n_tokens: int | None = None


def published() -> dict[str, dict[str, KeepCounts]]:
    """The lists for plain ViTs: model -> GFLOPs as published -> counts, e.g. ["deit_small"]["2.9"].

    The GFLOPs are the authors' own count of multiply-accumulates.
    """
    data = json.loads(DATA.read_text(encoding="utf-8"))
    # nothing is pruned in the first block of any published list: its count is that of the model's tokens
    counts = lambda lists: KeepCounts(lists["prune_kept_num"], lists["merge_kept_num"], lists["prune_kept_num"][0])
    return {name: {g: counts(lists) for g, lists in data[theirs].items()} for name, theirs in MODELS.items()}


def find(name: str) -> KeepCounts:
    """A published list, "MODEL@GFLOPS" such as "deit_small@2.9"; 2.9 and 2.90 are the same.

    Raises: UsageError with the names there are.
    """
    model, _, cost = name.partition("@")
    lists = published()
    if model not in lists:
        raise UsageError(
            f"rates {name[:60]!r}: there is no published list for {model[:40]!r}; wanted MODEL@GFLOPS with one of "
            f"{', '.join(lists)} (see `tokexport rates`), or a file"
        )
    same = [g for g in lists[model] if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", cost) and float(g) == float(cost)]
    if not same:
        raise UsageError(
            f"rates {name[:60]!r}: no list for {model} at {cost[:20] or 'no'} GFLOPs; wanted one of "
            f"{', '.join(f'{model}@{g}' for g in lists[model])}"
        )
    return lists[model][same[0]]


def read(path: str | Path, name: str | None = None) -> KeepCounts:
    """Counts from a JSON file.

    Args:
        path: of {"prune_kept": [...], "merge_kept": [...], "n_tokens": 197}; n_tokens is optional. The published keys
            prune_kept_num and merge_kept_num are taken too.
        name: of one of several lists in the file, as the authors' files hold them: MODEL@GFLOPS.
    Raises:
        UsageError: there is no such file or list, or it holds anything else.
    """
    lists, where = {}, f"rates {str(path)[:200]}"
    pairs = [(key, value) for key, value in _pairs(path, where) if key != "learned"]  # how `rates learn` came to them
    names = names_in(pairs)
    if name is not None:
        pairs = list_in(pairs, name).items()
    elif names:
        listed = ", ".join(f"{Path(path).name}@{n}" for n in names[:12]) + (", ..." if len(names) > 12 else "")
        raise UsageError(f"{where}: holds several lists by name: name one, {listed}")
    for key, value in pairs:
        if key not in KEYS or KEYS[key] in lists:
            raise UsageError(f"{where}: {'unknown key' if key not in KEYS else 'a second'} {key[:40]!r}; {FORM}")
        lists[KEYS[key]] = value
    missing = [k for k in ("prune_kept", "merge_kept") if k not in lists]
    if missing:
        raise UsageError(f"{where}: has no {' and no '.join(missing)}; {FORM}")
    check_counts(lists["prune_kept"], lists["merge_kept"], where=where)
    n = lists.get("n_tokens", 2)
    if not is_whole(n) or not 2 <= n <= 10**6:
        raise UsageError(
            f"{where}: n_tokens is no number of tokens, 2 to {10**6}: give what the counts were made for, or leave it out"
        )
    most = max(*lists["prune_kept"], *lists["merge_kept"])
    if "n_tokens" in lists and most > n:
        raise UsageError(f"{where}: keeps {most} of n_tokens {n} tokens; wanted counts of at most n_tokens")
    return KeepCounts(lists["prune_kept"], lists["merge_kept"], lists.get("n_tokens"))


def _pairs(path, where: str) -> list[tuple]:
    """Keys and values of the file's JSON object; a key that is there twice is twice among them."""
    if os.path.isdir(path):
        raise UsageError(f"{where}: is a directory; wanted a JSON file")
    if not os.path.isfile(path):
        raise UsageError(
            f"{where}: no such file; wanted one, or a published list such as deit_small@2.9 (see `tokexport rates`)"
        )
    try:
        if os.path.getsize(path) > LARGEST:
            raise UsageError(f"{where}: larger than {LARGEST // 1000} kB; {FORM}")
        pairs = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except OSError as e:
        raise UsageError(f"{where}: cannot be read ({e.strerror})") from None
    except UsageError:
        raise
    except (ValueError, RecursionError):
        raise UsageError(f"{where}: is not JSON (or is damaged); {FORM}") from None
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        raise UsageError(f"{where}: is no JSON object; {FORM}")
    return pairs


def resolve(rates: str | Path) -> KeepCounts:
    """A list of a file (FILE@NAME where it holds several), or a published one (MODEL@GFLOPS); see `find` and `read`."""
    if not isinstance(rates, (str, Path)) or not str(rates).strip():
        raise UsageError(
            f"rates {str(rates)[:60]!r}: wanted a published list such as deit_small@2.9 (see `tokexport rates`), or a file"
        )
    text = str(rates)
    if "@" not in text or os.path.exists(rates):
        return read(rates)
    cuts = [i for i, letter in enumerate(text) if letter == "@" and os.path.isfile(text[:i])]
    return read(text[: cuts[0]], text[cuts[0] + 1 :]) if cuts else find(text)


def check_counts(prune_kept: list[int], merge_kept: list[int], *, where: str = "rates") -> None:
    """Make sure both are lists of as many whole numbers from 1, one a block.

    Args:
        prune_kept, merge_kept: see `KeepCounts`.
        where: how the error begins.
    Raises:
        UsageError: they are not.
    """
    for name, values in (("prune_kept", prune_kept), ("merge_kept", merge_kept)):
        if not isinstance(values, (list, tuple)) or not values:
            raise UsageError(f"{where}: {name} is {short(values)}: wanted a list of token counts, one a block")
        for block, count in enumerate(values):
            if not is_whole(count) or not 1 <= count <= 10**6:
                raise UsageError(
                    f"{where}: {name} has {short(count)} for block {block}: wanted a whole number of tokens, 1 to {10**6}"
                )
    if len(prune_kept) != len(merge_kept):
        raise UsageError(
            f"{where}: {len(prune_kept)} counts in prune_kept, {len(merge_kept)} in merge_kept: wanted one a block in both"
        )


def scale(counts: list[int], n_from: int, *, n_to: int, n_prefix: int) -> list[int]:
    """Counts for another number of tokens: patches in proportion, rounded to the nearest (halves up), and the prefix tokens added.

    Args:
        counts: made for n_from tokens, one of them a class token.
        n_from: see counts.
        n_to: tokens of the model at hand.
        n_prefix: prefix tokens among them.
    Returns:
        As many counts; one with a patch keeps at least one.
    Raises:
        UsageError: either has no patches.
    """
    patches_from, patches_to = n_from - 1, n_to - n_prefix
    if min(patches_from, patches_to) < 1:
        raise UsageError(
            f"rates: counts for {n_from} tokens cannot be scaled to {n_to} tokens, {n_prefix} of them prefix tokens: "
            "wanted at least one patch in both"
        )
    nearest = lambda patches: (2 * patches * patches_to + patches_from) // (2 * patches_from)
    return [n_prefix + max(nearest(c - 1), min(c - 1, 1)) for c in counts]


def fit(rates: str | Path | dict, n_tokens: int, *, n_prefix: int) -> tuple[KeepCounts, list[str]]:
    """Counts for a model at hand, and a note when they were made for another number of tokens and scaled.

    Args:
        rates: a published name or a file (see `resolve`), or a dictionary with prune_kept, merge_kept and, optional, n_tokens.
        n_tokens: of the model, prefix tokens included.
        n_prefix: prefix tokens among them.
    Raises:
        UsageError: rates are none of these.
    """
    counts = _of_dictionary(rates) if isinstance(rates, dict) else resolve(rates)
    n = counts.n_tokens
    if n in (None, n_tokens):
        return KeepCounts(list(counts.prune_kept), list(counts.merge_kept), n_tokens), []
    prune, merge = (scale(list(c), n, n_to=n_tokens, n_prefix=n_prefix) for c in counts[:2])
    factor = (n_tokens - n_prefix) / (n - 1)
    return KeepCounts(prune, merge, n_tokens), [
        f"the counts are for {n} tokens, this model has {n_tokens}: counts of patches were scaled by {factor:.3f}"
    ]


def _of_dictionary(rates: dict) -> KeepCounts:
    if not {"prune_kept", "merge_kept"} <= set(rates) <= {"prune_kept", "merge_kept", "n_tokens"}:
        raise UsageError(
            f"rates: a dictionary with {', '.join(map(str, rates))[:80]}; wanted prune_kept, merge_kept and, if need be, "
            f"n_tokens"
        )
    check_counts(rates["prune_kept"], rates["merge_kept"])
    if rates.get("n_tokens") is not None:
        check_counts([rates["n_tokens"]], [1], where="rates, n_tokens")
    return KeepCounts(**rates)
