"""DiffRate's keep counts: the authors' published lists, lists from a file, and both fitted to another token count. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .counts import check_counts
from .errors import UsageError

DATA = Path(__file__).with_name(
    "diffrate_rates.json"
)  # facts published with DiffRate (Chen et al. 2023), as they are there
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


def published() -> dict[str, dict[str, tuple[list[int], list[int]]]]:
    """The lists for plain ViTs: model -> GFLOPs as published -> (prune_kept, merge_kept), e.g. ["deit_small"]["2.9"].

    Counts are tokens after each block, the class token included; the GFLOPs are the authors' own count of multiply-accumulates.
    """
    data = json.loads(DATA.read_text(encoding="utf-8"))
    return {
        name: {g: (lists["prune_kept_num"], lists["merge_kept_num"]) for g, lists in data[theirs].items()}
        for name, theirs in MODELS.items()
    }


def find(said: str) -> tuple[list[int], list[int], int]:
    """A published list: (prune_kept, merge_kept, tokens of the model it was learned for, class token included).

    said: "deit_small@2.9"; 2.9 and 2.90 are the same.
    Raises: UsageError with the names there are.
    """
    name, _, cost = said.partition("@")
    lists = published()
    if name not in lists:
        raise UsageError(
            f"--rates {said[:60]!r}: there is no published list for {name[:40]!r}; wanted MODEL@GFLOPS with one of "
            f"{', '.join(lists)} (see `tokexport rates`), or a file"
        )
    same = [g for g in lists[name] if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", cost) and float(g) == float(cost)]
    if not same:
        raise UsageError(
            f"--rates {said[:60]!r}: no list for {name} at {cost[:20] or 'no'} GFLOPs; wanted one of "
            f"{', '.join(f'{name}@{g}' for g in lists[name])}"
        )
    prune, merge = lists[name][same[0]]
    return prune, merge, prune[0]  # nothing is pruned in the first block of any published list


def read(path: str | Path) -> tuple[list[int], list[int], int | None]:
    """Lists from a JSON file: (prune_kept, merge_kept, n_tokens or None).

    path: of {"prune_kept": [...], "merge_kept": [...], "n_tokens": 197}: token counts after each block, prefix tokens included, and,
    optional, the tokens they were made for. The published keys prune_kept_num and merge_kept_num are taken too.
    Raises: UsageError when there is no such file, or it holds anything else.
    """
    found, said = {}, f"--rates {str(path)[:200]}"
    for key, value in _pairs(path, said):
        if key not in KEYS or KEYS[key] in found:
            raise UsageError(f"{said}: {'unknown key' if key not in KEYS else 'a second'} {key[:40]!r}; {FORM}")
        found[KEYS[key]] = value
    missing = [k for k in ("prune_kept", "merge_kept") if k not in found]
    if missing:
        raise UsageError(f"{said}: has no {' and no '.join(missing)}; {FORM}")
    check_counts(found["prune_kept"], found["merge_kept"], said)
    n = found.get("n_tokens", 2)
    if not isinstance(n, int) or isinstance(n, bool) or not 2 <= n <= 10**6:
        raise UsageError(
            f"{said}: n_tokens is no number of tokens, 2 to {10**6}: give what the counts were made for, or leave it out"
        )
    most = max(*found["prune_kept"], *found["merge_kept"])
    if "n_tokens" in found and most > n:
        raise UsageError(f"{said}: keeps {most} of n_tokens {n} tokens; wanted counts of at most n_tokens")
    return found["prune_kept"], found["merge_kept"], found.get("n_tokens")


def _pairs(path, said: str) -> list[tuple]:
    """Keys and values of the file's JSON object; a key that is there twice is twice among them."""
    if os.path.isdir(path):
        raise UsageError(f"{said}: is a directory; wanted a JSON file")
    if not os.path.isfile(path):
        raise UsageError(
            f"{said}: no such file; wanted one, or a published list such as deit_small@2.9 (see `tokexport rates`)"
        )
    try:
        if os.path.getsize(path) > LARGEST:
            raise UsageError(f"{said}: larger than {LARGEST // 1000} kB; {FORM}")
        pairs = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except OSError as e:
        raise UsageError(f"{said}: cannot be read ({e.strerror})") from None
    except UsageError:
        raise
    except (ValueError, RecursionError):
        raise UsageError(f"{said}: is not JSON (or is damaged); {FORM}") from None
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        raise UsageError(f"{said}: is no JSON object; {FORM}")
    return pairs


def resolve(said: str | Path) -> tuple[list[int], list[int], int | None]:
    """A published list when said has an "@" and is no file, otherwise a file; see `find` and `read`."""
    if not isinstance(said, (str, Path)) or not str(said).strip():
        raise UsageError(
            f"--rates {str(said)[:60]!r}: wanted a published list such as deit_small@2.9 (see `tokexport rates`), or a file"
        )
    return find(str(said)) if "@" in str(said) and not os.path.exists(said) else read(said)


def scale(counts: list[int], n_from: int, n_to: int, n_prefix: int) -> list[int]:
    """Counts for another number of tokens: patches in proportion, rounded to the nearest (halves up), and the prefix tokens added.

    counts: made for n_from tokens, one of them a class token. n_to, n_prefix: tokens and prefix tokens of the model at hand.
    A count with a patch keeps at least one.
    Raises: UsageError when either has no patches.
    """
    patches_from, patches_to = n_from - 1, n_to - n_prefix
    if min(patches_from, patches_to) < 1:
        raise UsageError(
            f"--rates: counts for {n_from} tokens cannot be scaled to {n_to} tokens, {n_prefix} of them prefix tokens: "
            "wanted at least one patch in both"
        )
    nearest = lambda patches: (2 * patches * patches_to + patches_from) // (2 * patches_from)
    return [n_prefix + max(nearest(c - 1), min(c - 1, 1)) for c in counts]


def fit(said, n_tokens: int, n_prefix: int) -> tuple[list[int], list[int], list[str]]:
    """Lists for a model at hand: (prune_kept, merge_kept, notes), scaled when they were made for another number of tokens.

    said: a published name or a file (see `resolve`), or a dictionary with prune_kept, merge_kept and, optional, n_tokens.
    """
    if isinstance(said, dict):
        if not {"prune_kept", "merge_kept"} <= set(said) <= {"prune_kept", "merge_kept", "n_tokens"}:
            raise UsageError(
                f"--rates: a dictionary with {', '.join(map(str, said))[:80]}; wanted prune_kept, merge_kept and, if need be, "
                f"n_tokens"
            )
        prune, merge, n = said["prune_kept"], said["merge_kept"], said.get("n_tokens")
        check_counts(prune, merge)
        check_counts([n_tokens if n is None else n], [1], "--rates, n_tokens")
    else:
        prune, merge, n = resolve(said)
    if n in (None, n_tokens):
        return list(prune), list(merge), []
    scaled = [scale(list(counts), n, n_tokens, n_prefix) for counts in (prune, merge)]
    factor = (n_tokens - n_prefix) / (n - 1)
    return *scaled, [
        f"the counts are for {n} tokens, this model has {n_tokens}: counts of patches were scaled by {factor:.3f}"
    ]
