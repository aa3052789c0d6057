"""The one table of tiny models and of what every method is asked for in tests. A method without a row here fails `test_add_reducer`."""

from typing import NamedTuple

KWARGS = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4, "num_classes": 10}
# The golden models: 65 tokens with a class token, 64 without, 66 with a distillation token; 6 blocks.
TINY = {
    "tiny_vit": ("vit_tiny_patch16_224", {}),
    "tiny_vit_nocls": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "tiny_vit_distilled": ("deit_tiny_distilled_patch16_224", {}),
}
AT = {"at": (1, 3, 4)}


class MethodCase(NamedTuple):
    """What one method is asked for.

    tiny: on the tiny models (65 tokens, 6 blocks). deit: its paper's main setting, on DeiT-S. any_size: on a model of 4 blocks (12 for
    DiffRate) and any image size. cli: of `tiny`, as typed. variants: further rows of METHOD_CASES, by what is special.
    """

    tiny: dict
    deit: dict
    any_size: dict
    cli: tuple
    variants: dict = {}


def _rates(prune: list[int], merge: list[int]) -> dict:
    return {"rates": {"prune_kept": prune, "merge_kept": merge}}


RATES = _rates([65, 60, 50, 42, 34, 20], [65, 55, 46, 38, 30, 12])
METHODS = {
    "none": MethodCase({}, {}, {}, ()),
    "tome": MethodCase({"r": 8}, {"r": 13}, {"r": 5}, ("--r", "8:-1", "--no-prop-attn")),
    "evit": MethodCase(AT, {}, {"at": (1, 2)}, ("--at", "1,3,4"), {"no-fuse": {**AT, "fuse": False}}),
    "etps": MethodCase(AT, {}, {"at": (1, 2)}, ("--at", "1,3", "--keep-rate", "0.8,0.6")),
    "dtps": MethodCase(AT, {}, {"at": (1, 2)}, ("--at", "1,3,4")),
    "dynamicvit": MethodCase(AT, {}, {"at": (1, 2)}, ("--at", "1,3,4")),
    "diffrate": MethodCase(
        RATES,
        {"rates": "deit_small@2.9"},
        {"rates": "deit_small@2.9"},
        ("--rates", "rates.json"),
        {
            "prune": _rates([65, 60, 50, 42, 34, 20], [65, 60, 50, 42, 34, 20]),
            "merge": _rates([65, 65, 60, 50, 40, 30], [65, 60, 50, 40, 30, 30]),
            "up and down": _rates([60, 64, 50, 58, 40, 65], [55, 60, 45, 52, 38, 60]),
        },
    ),
}
# Every row on the tiny models; after the method's name, what is special.
METHOD_CASES = {
    name if not special else f"{name} {special}": options
    for name, case in METHODS.items()
    for special, options in {"": case.tiny, **case.variants}.items()
}
DEIT = {name: case.deit for name, case in METHODS.items()}
