"""Which tensors of a file are the model's: the sets of weights in it, and the one rule for prefixes.

A set of weights is found by its anchors, keys that every file of its layout has: the prefix is what stands before
them, in any stack
of words, and what does not stand under it is another part of the file. Example, with the anchor
`patch_embed.proj.weight`:

    {"epoch": 3, "model": {"module.teacher.backbone.patch_embed.proj.weight": ...,
    "module.student.backbone.patch_embed.proj.weight": ...}}

holds two sets, `model.module.teacher.backbone` and `model.module.student.backbone`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..errors import UsageError
from .layouts import LAYOUTS, Layout
from .stand_ins import Inert
from .torch_file import StoredTensor

# Words of a set's name, the one that is taken first first, and whose loader takes it.
PREFERRED = (
    (r"(^|.*_)ema(_.*|$)", "the averaged weights, as timm's loader takes them"),
    (r"teacher", "the teacher, as DINO's evaluation takes it"),
    (r"target_encoder", "as I-JEPA's evaluation takes it"),
    (r"base_encoder|encoder_q", "as MoCo's evaluation takes it"),
    (r"state_dict", "as timm's loader takes it"),
    (r"model", "as timm's loader takes it"),
)
SCRIPT = ("model", "model_ema")  # DeiT's training script evaluates `model`; what tells its files from timm's:
SCRIPT_KEYS = ("lr_scheduler", "scaler")
DEPTH = 6  # of dictionaries within one another


@dataclass(frozen=True)
class WeightSet:
    """One set of weights in a file.

    name: the words that lead to it, "" for the file itself. prefix: taken off the keys. layout: how its tensors are
    named.
    state: tensors under the prefix, without it. others: keys beside the prefix, with their tensors.
    """

    name: str
    prefix: str
    layout: Layout
    state: dict[str, StoredTensor] = field(repr=False)
    others: dict[str, StoredTensor] = field(repr=False)


@dataclass(frozen=True)
class Choice:
    """The set of weights that is taken, and why, in words; no notes where there was nothing to choose."""

    weights: WeightSet
    notes: tuple[str, ...]


def nested(data, name: str = "", depth: int = 0, seen: frozenset = frozenset()):
    """Every dictionary in nested data, those of foreign classes too: (its name, its entries).

    Args:
        data: out of `read_file`.
        name: of data itself.
        depth: of data in the file.
        seen: ids of the dictionaries around data.
    """
    entries = data.entries if isinstance(data, Inert) else data
    if not isinstance(entries, dict) or depth > DEPTH or id(data) in seen:
        return
    yield name, entries
    for key, value in entries.items():
        if isinstance(key, str):
            yield from nested(value, f"{name}.{key}".strip("."), depth + 1, seen | {id(data)})


def dictionaries(data):
    """Every dictionary of tensors in nested data: (its name, {key: StoredTensor})."""
    for name, entries in nested(data):
        tensors = {k: v for k, v in entries.items() if isinstance(k, str) and isinstance(v, StoredTensor)}
        if tensors:
            yield name, tensors


def weight_sets(data) -> list[WeightSet]:
    """All sets of weights of known layouts in a file's data."""
    found, ids = [], set()
    for name, tensors in dictionaries(data):
        same = tuple(map(id, tensors.values()))
        if same in ids:  # one dictionary by two names
            continue
        ids.add(same)
        taken = set()
        for layout in LAYOUTS:
            for prefix in _prefixes(tensors, layout):
                if prefix + layout.anchors[0] not in taken:
                    taken.add(prefix + layout.anchors[0])
                    found.append(_set(name, prefix, layout, tensors))
    return found


def _prefixes(tensors: dict, layout: Layout) -> list[str]:
    first = layout.anchors[0]
    starts = [k[: len(k) - len(first)] for k in tensors if k == first or k.endswith(f".{first}")]
    return [p for p in starts if all(p + anchor in tensors for anchor in layout.anchors)]


def _set(name: str, prefix: str, layout: Layout, tensors: dict) -> WeightSet:
    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    others = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    parents = prefix.split(".")[:-1]
    for i in range(len(parents) - 1, -1, -1):  # a classifier beside the backbone, nearest first
        parent = "".join(f"{p}." for p in parents[:i])
        for theirs, ours in layout.beside:
            if parent + theirs in others and ours not in inside and theirs not in inside:
                inside[ours] = others.pop(parent + theirs)
    return WeightSet(f"{name}.{prefix}".strip("."), prefix, layout, inside, others)


def choose(data, width: int, weights: str | None = None) -> Choice | None:
    """The set of weights to load.

    Args:
        data: out of `read_file`.
        width: of the model's tokens; sets of another width are no choice where one fits.
        weights: the name of a set, or a word of it that no other has; None for what the framework that wrote the file
        takes.
    Returns:
        None when the file holds no set of a known layout.
    Raises:
        UsageError: no set of this name, or several that fit and none that a loader is known to take.
    """
    sets = weight_sets(data)
    if weights is not None:
        return Choice(_named(sets, weights), (f"weights: {weights}, as asked",))
    fitting = [s for s in sets if s.state[s.layout.anchors[0]].shape[:1] == (width,)] or sets
    sizes = {id(s): _own_size(s, fitting) for s in fitting}
    fitting = [s for s in fitting if sizes[id(s)] >= 0.8 * max(sizes.values())]
    if len(fitting) < 2:
        return Choice(fitting[0], ()) if fitting else None
    if isinstance(data, dict) and SCRIPT[0] in data and SCRIPT[1] in data and any(k in data for k in SCRIPT_KEYS):
        ranks = [(0 if s.name == SCRIPT[0] else 1, "as DeiT's training script evaluates it") for s in fitting]
    else:
        ranks = [_rank(s.name) for s in fitting]
    best = min(rank for rank, _ in ranks)
    names = ", ".join(s.name or "root" for s in fitting)
    if [rank for rank, _ in ranks].count(best) > 1:
        raise UsageError(f"the file holds several sets of weights that fit ({names}): name one with weights")
    i = [rank for rank, _ in ranks].index(best)
    rest = ", ".join(s.name or "root" for s in fitting if s is not fitting[i])
    return Choice(
        fitting[i],
        (f"weights: {fitting[i].name or 'root'}, {ranks[i][1]}; there is {rest} too: choose with weights",),
    )


def _own_size(one: WeightSet, sets: list[WeightSet]) -> int:
    """Tensors of a set that are in no other set within it."""
    inner = [s.prefix for s in sets if s is not one and s.prefix.startswith(one.prefix) and s.prefix != one.prefix]
    inner = tuple(p.removeprefix(one.prefix) for p in inner)
    return sum(not k.startswith(inner) for k in one.state) if inner else len(one.state)


def _rank(name: str) -> tuple[int, str]:
    words = name.split(".")
    for i, (pattern, reason) in enumerate(PREFERRED):
        if any(re.fullmatch(pattern, w) for w in words):
            return i, reason
    return len(PREFERRED), "the other has a name that says more"


def _named(sets: list[WeightSet], weights: str) -> WeightSet:
    exact = [s for s in sets if weights in (s.name, s.name or "root")]
    match = (
        exact
        or [s for s in sets if s.name.startswith(f"{weights}.")]
        or [s for s in sets if weights in s.name.split(".") or f".{weights}." in f".{s.name}."]
    )
    if len(match) != 1:
        names = ", ".join(s.name or "root" for s in match or sets) or "none"
        raise UsageError(
            f"weights {weights[:60]!r}: {'names several sets' if match else 'is no set of weights in the file'}; "
            f"wanted one of: {names}"
        )
    return match[0]
