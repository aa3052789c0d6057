"""The one table of tiny models and of what every method is asked for in tests. A method without a row here fails `test_add_reducer`."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest

KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
# The golden models: 65 tokens with a class token, 64 without, 66 with a distillation token; 6 blocks.
TINY = {
    "tiny_vit": ("vit_tiny_patch16_224", {}),
    "tiny_vit_nocls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "tiny_vit_distilled": ("deit_tiny_distilled_patch16_224", {}),
}
AT = {"at": (1, 3, 4)}


def mostly_slow(rows: Iterable, *fast) -> list:
    """Rows of a parametrisation, of which only some run in `make test`: the large models, where one row shows what all do.

    Args:
        rows: values, or tuples of values.
        fast: the rows that are not marked slow.
    """
    rows = list(rows)
    assert set(fast) <= set(rows), fast
    tuples = lambda row: row if isinstance(row, tuple) else (row,)
    return [row if row in fast else pytest.param(*tuples(row), marks=pytest.mark.slow) for row in rows]


class MethodCase(NamedTuple):
    """What one method is asked for in tests.

    tiny: on the tiny models (65 tokens, 6 blocks).
    deit: its paper's main setting, on DeiT-S.
    short: on any model of three blocks, from its number of tokens.
    any_size: on a model of `depth` blocks with any image.
    cli: `tiny` or something like it, as typed.
    budgets: batch -> most nodes in the file of DeiT-S, most layers in the network that TensorRT-RTX parses from it.
    variants: further options on the tiny models, by what is special about them.
    """

    tiny: dict
    deit: dict
    short: Callable[[int], dict]
    any_size: dict
    cli: tuple
    budgets: dict
    variants: dict = {}
    depth: int = 4


def _rates(prune: list[int], merge: list[int]) -> dict:
    return {"rates": {"prune_kept": prune, "merge_kept": merge}}


def _stages(**further) -> dict:
    """The fields that are alike in the methods that reduce in a few blocks."""
    return {
        "tiny": AT,
        "deit": {},
        "short": lambda n: {"keep_rate": 0.6, "at": (0, 2)},
        "any_size": {"at": (1, 2)},
        **further,
    }


METHODS = {
    "none": MethodCase({}, {}, lambda n: {}, {}, (), {1: (230, 390)}),
    "tome": MethodCase(
        tiny={"r": 8},
        deit={"r": 13},
        short=lambda n: {"r": [5, 0, 3]},
        any_size={"r": 5},
        cli=("--r", "8:-1", "--no-prop-attn"),
        budgets={1: (474, 800), None: (562, 1000)},
    ),
    "evit": MethodCase(
        **_stages(cli=("--at", "1,3,4"), budgets={1: (260, 440)}, variants={"no-fuse": {**AT, "fuse": False}})
    ),
    "etps": MethodCase(**_stages(cli=("--at", "1,3", "--keep-rate", "0.8,0.6"), budgets={1: (300, 600)})),
    "diffrate": MethodCase(
        tiny=_rates([65, 60, 50, 42, 34, 20], [65, 55, 46, 38, 30, 12]),
        deit={"rates": "deit_small@2.9"},
        short=lambda n: _rates([n - 2, n - 4, n - 6], [n - 3, n - 4, n - 9]),
        any_size={"rates": "deit_small@2.9"},
        depth=12,
        cli=("--rates", "rates.json"),
        budgets={1: (500, 1000)},
        variants={
            "prune": _rates([65, 60, 50, 42, 34, 20], [65, 60, 50, 42, 34, 20]),
            "merge": _rates([65, 65, 60, 50, 40, 30], [65, 60, 50, 40, 30, 30]),
            "up and down": _rates([60, 64, 50, 58, 40, 65], [55, 60, 45, 52, 38, 60]),
        },
    ),
    "dtps": MethodCase(**_stages(cli=("--at", "1,3,4"), budgets={1: (300, 600)})),
    "dynamicvit": MethodCase(**_stages(cli=("--at", "1,3,4"), budgets={1: (300, 600)})),
    "pitome": MethodCase(
        tiny={"keep_rate": 0.9},
        deit={},
        short=lambda n: {"keep_rate": 0.8},
        any_size={"keep_rate": 0.85, "forms": "last"},
        cli=("--keep-rate", "0.9", "--forms", "none", "--margin", "0.75:0.4"),
        budgets={1: (580, 1000)},
        variants={"list": {"keep_rate": [1.0, 0.8, 1.0, 0.75, 0.9, 0.95], "forms": "last"}},
    ),
    "tofu": MethodCase(
        tiny={"r": 8},
        deit={"r": 13},
        short=lambda n: {"r": [5, 0, 3], "prune_until": 0},
        any_size={"r": 5},
        cli=("--r", "8", "--norm", "code", "--prune-until", "2"),
        budgets={1: (460, 760)},
        variants={"code": {"r": 8, "norm": "code", "prune_until": -1}},
    ),
    "dtem": MethodCase(
        tiny={"r": 8},
        deit={"r": 13},
        short=lambda n: {"r": [5, 0, 3]},
        any_size={"r": 5},
        cli=("--r", "8", "--at", "even", "--align", "8"),
        budgets={1: (474, 800)},
    ),
}
# Every row on the tiny models; after the method's name, what is special.
METHOD_CASES = {
    name if not special else f"{name} {special}": options
    for name, case in METHODS.items()
    for special, options in {"": case.tiny, **case.variants}.items()
}
DEIT = {name: case.deit for name, case in METHODS.items()}
