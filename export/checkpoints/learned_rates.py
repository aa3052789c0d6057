"""DiffRate's keep counts as its own files hold them: learned candidates in a checkpoint, and named lists nested in a
rates file."""

from __future__ import annotations

import math
import re

from ..errors import UsageError

PARTS = ("kept_token_candidate", "selected_probability")


def rates_of_checkpoint(state: dict) -> dict[str, list[int]] | None:
    """The keep counts that a checkpoint has learned: {"prune_kept": [...], "merge_kept": [...]}, tokens after each
    block.

    Each block holds candidate numbers of patches and how probable each is. As the authors do, the count is the
    expected number of
    patches, rounded up, and the class token: candidates 16, 15, 14 with 0, 0.5, 0.5 keep ceil(14.5) + 1 = 16 tokens.

    Args:
        state: tensors of the checkpoint, `blocks.0.prune_ddp.kept_token_candidate` and so on among them, under any
        prefix.
    Returns:
        None when there are none.
    Raises:
        UsageError: a block lacks a part, or its numbers are no candidates and probabilities.
    """
    parts: dict[tuple[int, str, str], object] = {}
    for key, value in state.items():
        match = re.search(r"(?:^|\.)blocks\.(\d+)\.(prune|merge)_ddp\.(\w+)$", key)
        if match and match[3] in PARTS:
            parts[int(match[1]), match[2], match[3]] = value
    if not parts:
        return None
    depth = 1 + max(block for block, _, _ in parts)
    return {f"{step}_kept": [_count(parts, block, step) for block in range(depth)] for step in ("prune", "merge")}


def _count(parts: dict, block: int, step: str) -> int:
    tensors = [parts.get((block, step, part)) for part in PARTS]
    lost = [part for part, tensor in zip(PARTS, tensors) if tensor is None]
    if lost:
        raise UsageError(
            f"rates in the checkpoint: blocks.{block}.{step}_ddp has no {lost[0]}: wanted both for every block"
        )
    candidates, probability = (t.double().flatten() for t in tensors)
    if len(candidates) != len(probability):
        raise UsageError(
            f"rates in the checkpoint: blocks.{block}.{step}_ddp has {len(candidates)} candidates, {len(probability)} probabilities"
        )
    expected = float((candidates * probability).sum())
    if not math.isfinite(expected) or expected < 0 or abs(float(probability.sum()) - 1) > 1e-3:
        raise UsageError(
            f"rates in the checkpoint: blocks.{block}.{step}_ddp: its probabilities do not sum to 1, or give no count"
        )
    return math.ceil(round(expected, 4)) + 1  # the sum of float32 probabilities is not exact


def names_in(lists) -> list[str]:
    """Names of the lists nested in a rates file, e.g. ["ViT-T-DeiT@0.9"] of {"ViT-T-DeiT": {"0.9": {"prune_kept_num":
    [...], ...}}}.

    Args:
        lists: the file's JSON, objects as dictionaries or as lists of pairs.
    Returns:
        What stands after FILE@ for each, in the file's order; none for a file of one list.
    """
    return list(_nested(lists, ()))


def list_in(lists, name: str) -> dict:
    """One list of a nested rates file.

    Args:
        lists: the file's JSON, objects as dictionaries or as lists of pairs.
        name: as `names_in` gives it; numbers in it compare as numbers (2.9 and 2.90).
    Raises:
        UsageError: there is no such list; names those there are.
    """
    nested = _nested(lists, ())
    same = [key for key in nested if key == name] or [key for key in nested if _key(key) == _key(name)]
    if len(same) != 1:
        names = ", ".join(list(nested)[:12]) or "none, it is one list itself"
        raise UsageError(f"rates: there is no list {name[:60]!r} in the file; wanted one of {names}")
    return nested[same[0]]


def _key(name: str) -> tuple:
    number = lambda word: float(word) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", word) else word.lower()
    return tuple(number(word) for word in name.split("@"))


def _nested(value, path: tuple[str, ...]) -> dict[str, dict]:
    pairs = value.items() if isinstance(value, dict) else value if isinstance(value, list) else ()
    pairs = [p for p in pairs if isinstance(p, tuple) and len(p) == 2]
    out: dict[str, dict] = {}
    keys = {str(k) for k, _ in pairs}
    if path and keys & {"prune_kept", "prune_kept_num", "merge_kept", "merge_kept_num"}:
        return {"@".join(path): dict(pairs)}
    for key, inner in pairs if len(path) < 4 else ():
        out |= _nested(inner, (*path, str(key)))
    return out
