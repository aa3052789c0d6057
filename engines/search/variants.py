"""The variants that `tune` compares: every method of the reducer table under a few fixed options, and one number for how strongly it
reduces, which a budget decides. Imports no torch.

What a method gets follows from the options that it has, so a new row of the table is tuned as it stands: one that takes `r` gets
constant and spread lists, one that takes `keep_rate` gets shares, one that takes `rates` scaled lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...export import reducers
from ...export.errors import UsageError
from ...export.reducers import diffrate_rates
from ...export.reducers.diffrate_rates import KeepCounts
from ...export.schedule import Schedule
from ...export.step import ModelSize

LISTS = {
    192: ("deit_tiny",),
    384: ("deit_small",),
    768: ("deit_base", "mae_base"),
    1024: ("mae_large",),
    1280: ("mae_huge",),
}
ALIGN = 8  # rows that runtimes multiply at once


@dataclass(frozen=True)
class Variant:
    """One method under fixed options.

    Attributes:
        name: in words, e.g. "tome, every other block".
        method: of the reducer table.
        options: strength -> the method's options; tokens never grow with the strength.
        most: the largest strength; 0 reduces nothing.
        whole: only whole strengths.
    """

    name: str
    method: str
    options: Callable[[float], dict]
    most: float
    whole: bool = False


@dataclass(frozen=True)
class TunedModel:
    """What decides which variants a model can have.

    Attributes:
        size: of the model.
        width: channels of a token.
        has_class_token: methods may sort by its attention.
        last_is_free: the output reads prefix tokens alone, so merging in the last block costs nothing.
        learned: signals whose trained layers are there ("score_head", "metric_layer").
    """

    size: ModelSize
    width: int
    has_class_token: bool
    last_is_free: bool
    learned: tuple[str, ...] = ()


def variants(
    model: TunedModel, methods: Sequence[str] | None = None, rates: Sequence[str | Path] = ()
) -> tuple[list[Variant], list[str]]:
    """All variants of a model.

    Args:
        model: what it can have.
        methods: names of the reducer table; None for all that fit the model.
        rates: files of counts (`tokexport rates learn`) to be among DiffRate's.
    Returns:
        The variants, and a line for every method of the table that is left out.
    Raises:
        UsageError: a method is unknown or does not fit the model, or a rates file is for another depth.
    """
    for name in methods or ():
        if reducers.get(name).reference is None:
            raise UsageError(f"methods {name}: it reduces nothing; the model without reduction is compared anyway")
    if rates and methods is not None and "diffrate" not in methods:
        raise UsageError("rates are DiffRate's: add diffrate to methods, or leave them out")
    chosen = [name for name, r in reducers.TABLE.items() if r.reference and (methods is None or name in methods)]
    made, left_out = [], []
    for name in chosen:
        problem = _problem(name, model)
        if problem and methods is not None:
            raise UsageError(f"methods {name}: {problem}")
        if problem:
            left_out.append(f"{name} is left out: {problem}")
        else:
            made += _of_method(name, model, rates)
    return made, left_out


def _problem(method: str, model: TunedModel) -> str:
    """Why a model cannot have a method; "" when it can."""
    reducer = reducers.get(method)
    trained = {"score_head", "metric_layer"} & set(reducer.signals)
    if trained and not trained & set(model.learned):
        return "its trained layers are not there (give a predictor, or a checkpoint that has them)"
    if "class_attention" in reducer.signals and not model.has_class_token and "score" not in _names(method):
        return "the model has no class token"
    if {"r", "keep_rate", "rates"}.isdisjoint(_names(method)):
        return "it has no option that says how much"
    return ""


def _names(method: str) -> set[str]:
    return {option.name for option in reducers.get(method).options}


def _of_method(method: str, model: TunedModel, rates: Sequence[str | Path]) -> Iterator[Variant]:
    names = _names(method)
    fixed = {"score": "mean"} if "score" in names and not model.has_class_token else {}
    if "r" in names:
        yield from _by_r(method, model, fixed)
    elif "rates" in names:
        yield from _by_rates(method, model, fixed, rates)
    else:
        yield from _by_keep_rate(method, model, fixed)


def _by_r(method: str, model: TunedModel, fixed: dict) -> Iterator[Variant]:
    """Constant r; r spread over all or every other block, on whole tokens or in eights; proportional attention off."""
    names, (n, p, depth) = _names(method), model.size
    patches, every = n - p, list(range(depth))
    even = sorted({*range(0, depth, 2), depth - 1})
    yield Variant(f"{method}, constant r", method, lambda x: {**fixed, "r": int(x)}, patches // 2, whole=True)

    def spread(blocks: list[int], **more) -> Callable[[float], dict]:
        return lambda x: {
            **fixed,
            "at": blocks,
            "r": spread_r(x, len(blocks), n_patches=patches, last_is_free=model.last_is_free),
            **more,
        }

    if "at" in names:
        free = ", last block free" if model.last_is_free else ""
        yield Variant(f"{method}, r spread{free}", method, spread(every), patches / 2)
        yield Variant(f"{method}, every other block{free}", method, spread(even), patches / 2)
        if "align" in names:
            yield Variant(f"{method}, every other block, in eights", method, spread(even, align=ALIGN), patches / 2)
    if "prop_attn" in names:
        off = spread(every, prop_attn=False) if "at" in names else lambda x: {**fixed, "r": int(x), "prop_attn": False}
        yield Variant(f"{method}, attention not proportional", method, off, patches / 2, whole="at" not in names)


def spread_r(x: float, n_blocks: int, *, n_patches: int, last_is_free: bool) -> list[int]:
    """Tokens to merge in each block, x on average: rounded so that what is merged up to any block is nearest to x a block.

    Args:
        x: tokens a block.
        n_blocks: blocks that reduce.
        n_patches: tokens that may merge.
        last_is_free: the last block merges half of what is left.
    """
    values, left = [], n_patches
    for block in range(n_blocks):
        r = math.floor(x * (block + 1) + 0.5) - math.floor(x * block + 0.5)
        r = min(left // 2 if last_is_free and x > 0 and block == n_blocks - 1 else r, left // 2)
        values.append(r)
        left -= r
    return values


def _by_keep_rate(method: str, model: TunedModel, fixed: dict) -> Iterator[Variant]:
    """A share that stays, in the blocks that the method reduces by default, or those at the same share of the depth."""
    at = next((o for o in reducers.get(method).options if o.name == "at"), None)
    if at is not None and not isinstance(at.default, str):
        fixed = {**fixed, "at": stages_at(model.size.depth, len(at.default))}
    share = lambda x, **more: {**fixed, "keep_rate": round(1 - x, 4), **more}
    most = 1 - 1 / max(model.size.n_tokens - model.size.n_prefix, 2)
    yield Variant(f"{method}, one share for all stages", method, share, most)
    if "prop_attn" in _names(method):
        off = lambda x: share(x, prop_attn=False)
        yield Variant(f"{method}, attention not proportional", method, off, most)


def stages_at(depth: int, n_stages: int) -> list[int]:
    """Blocks that divide a depth in equal parts: 3, 6, 9 of 12.

    Args:
        depth: number of blocks.
        n_stages: how many, where the depth has room.
    """
    return sorted({depth * (i + 1) // (n_stages + 1) for i in range(n_stages)})


def _by_rates(method: str, model: TunedModel, fixed: dict, files: Sequence[str | Path]) -> Iterator[Variant]:
    """Counts of files and published ones for models of this width and depth, stretched to the budget; with pruning and without."""
    lists: dict[str, KeepCounts] = {}
    for file in files:
        counts, _ = diffrate_rates.fit(file, model.size.n_tokens, n_prefix=model.size.n_prefix)
        Schedule.parse(method, **model.size._asdict(), **fixed, rates=counts._asdict())  # of another depth: told now
        lists[Path(file).name] = counts
    published = diffrate_rates.published()
    for name in LISTS.get(model.width, ()):
        fitting = {g: c for g, c in published[name].items() if len(c.merge_kept) == model.size.depth}
        if fitting:
            gflops = sorted(fitting, key=float)[len(fitting) // 2]
            lists[f"{name}@{gflops}"], _ = diffrate_rates.fit(
                f"{name}@{gflops}", model.size.n_tokens, n_prefix=model.size.n_prefix
            )
    for name, counts in lists.items():
        for prune in (True, False) if "prune" in _names(method) else (None,):

            def options(x: float, counts: KeepCounts = counts, prune: bool | None = prune) -> dict:
                return {**fixed, "rates": stretched(counts, x, size=model.size)._asdict(), "prune": prune}

            words = f"{method}, {name}" + ("" if prune is not False else ", nothing pruned")
            yield Variant(words, method, options, 8.0)


def stretched(counts: KeepCounts, factor: float, *, size: ModelSize) -> KeepCounts:
    """Counts that remove `factor` times as many tokens in every block; one patch stays.

    Args:
        counts: for this model's number of tokens.
        factor: 0 keeps every token, 1 is as given.
        size: of the model.
    """
    n, least = size.n_tokens, size.n_prefix + 1
    left = lambda kept: [max(round(n - (n - min(k, n)) * factor), least) for k in kept]
    return KeepCounts(left(counts.prune_kept), left(counts.merge_kept), n)


def strength_for(variant: Variant, size: ModelSize, fits: Callable[[Schedule], bool]) -> tuple[float, Schedule]:
    """The least strength at which a variant's schedule fits a budget, and that schedule.

    Args:
        variant: one of `variants`.
        size: of the model.
        fits: whether a schedule is within the budget.
    Returns:
        The strength and the schedule; where none fits, the largest strength and its schedule.
    """

    def at(x: float) -> Schedule:
        options = {k: v for k, v in variant.options(x).items() if v is not None}
        return Schedule.parse(variant.method, **size._asdict(), **options)

    top = _bisected(lambda x: not _exists(at, x), variant)[0]  # some methods refuse to leave no patch
    high = _bisected(lambda x: x > top or fits(at(x)), variant)[1]
    high = min(high, top)
    return float(high), at(high)


def _bisected(holds: Callable[[float], bool], variant: Variant) -> tuple[float, float]:
    """The largest strength at which something does not hold yet and the least at which it does; the largest twice where it never
    holds."""
    low, high = (-1, int(variant.most)) if variant.whole else (0.0, float(variant.most))
    if not holds(high):
        return high, high
    for _ in range(24):
        if variant.whole and high - low <= 1:
            break
        middle = (low + high) // 2 if variant.whole else (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low, high


def _exists(at: Callable[[float], Schedule], x: float) -> bool:
    try:
        at(x)
    except UsageError:
        return False
    return True
