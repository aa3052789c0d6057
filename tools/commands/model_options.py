"""The options that say which model: its name, weights and preprocessing. One decorator and one function for every
command that loads one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click

from ...export.errors import UsageError

NAMES = [
    "model",
    "model_kwargs",
    "checkpoint",
    "weights",
    "pretrained",
    "seed",
    "predictor",
    "pos_grid",
    "mean",
    "std",
    "interpolation",
    "crop_pct",
    "size",
    "activation",
]
OPTIONS = (
    click.option("--model", metavar="NAME", help="Any plain ViT of timm, hf-hub:ORG/NAME or local-dir:DIR. Default: what the "
                 "checkpoint's folder says, else deit_small_patch16_224."),
    click.option("--model-kwargs", multiple=True, metavar="KEY=VALUE", help="For timm's create_model, e.g. img_size=384; "
                 "norm_eps=1e-12 sets the layer norms' epsilon. Repeatable."),
    click.option("--checkpoint", metavar="FILE|DIR", help="Weights, whatever the suffix, or a folder of transformers or timm, which "
                 "names the model too; loaded strictly; no code in it is run."),
    click.option("--weights", metavar="NAME", help="Which set of weights in the checkpoint, e.g. state_dict_ema or teacher. Default: what "
                 "the framework that wrote it takes; the summary says it."),
    click.option("--pretrained", is_flag=True, help="Weights from the model's hub."),
    click.option("--seed", default=0, show_default=True, help="Of random weights, when there is neither of the two."),
    click.option("--predictor", "--metric", "predictor", metavar="FILE", help="Layers trained for a method, when the checkpoint has none: "
                 "score heads (dTPS, DynamicViT) or metric layers (DTEM)."),
    click.option("--pos-grid", metavar="ROWSxCOLUMNS", help="Grid of the checkpoint's position embedding, e.g. 8x2; guessed otherwise."),
    click.option("--mean", metavar="M[,M,M]", help="Of photos, for values in [0, 1]: one number, or one a channel."),
    click.option("--std", metavar="S[,S,S]", help="Of photos, the same."),
    click.option("--interpolation", metavar="NAME", help="To resize photos: nearest, bilinear, bicubic, lanczos, box or hamming."),
    click.option("--crop-pct", type=float, metavar="SHARE", help="Of the resized photo that is kept, e.g. 0.9."),
    click.option("--size", metavar="HEIGHTxWIDTH", help="Of the model's images, the same as img_size."),
    click.option("--activation", type=click.Choice(["softmax", "sigmoid", "none"]), help="What makes probabilities of the logits. "
                 "Default: softmax, sigmoid for one class."),
)  # fmt: skip


def model_options(command: Callable) -> Callable:
    """A command with all options that say which model."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def split(options: dict) -> tuple[dict, dict]:
    """A command's options apart: those of the model, and the rest."""
    return {k: v for k, v in options.items() if k in NAMES}, {k: v for k, v in options.items() if k not in NAMES}


def file_stem(options: dict) -> str:
    """What a file made of the model is called by default: the model's name, or the folder's, as a plain file name."""
    checkpoint = options.get("checkpoint")
    named = options.get("model") or (
        Path(checkpoint).resolve().name if checkpoint and Path(checkpoint).is_dir() else None
    )
    stem = re.sub(r"^(hf-hub|local-dir):(.*/)?", "", (named or "deit_small_patch16_224").rstrip("/"))
    return re.sub(r"[^\w.-]", "_", stem) or "model"


def load(options: dict):
    """The LoadedModel that the options name.

    Raises: UsageError for options that cannot be read, and as `load_model`.
    """
    from ...export.models.load import load_model, parse_kwargs

    given = {k: options.get(k) for k in ("mean", "std", "interpolation", "crop_pct", "size")}
    for key in ("mean", "std"):
        given[key] = _numbers(key, given[key])
    given["size"] = _grid("size", given["size"], "HEIGHTxWIDTH, e.g. 224x224")
    return load_model(
        options.get("model"),
        parse_kwargs(options.get("model_kwargs") or ()),
        checkpoint=options.get("checkpoint"),
        pretrained=bool(options.get("pretrained")),
        seed=options.get("seed") or 0,
        predictor=options.get("predictor"),
        weights=options.get("weights"),
        pos_grid=_grid("pos-grid", options.get("pos_grid"), "ROWSxCOLUMNS, e.g. 8x2"),
        preprocess={k: v for k, v in given.items() if v is not None},
        activation=options.get("activation"),
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--{option} {text[:60]!r}: wanted one number or one a channel, e.g. 0.485,0.456,0.406"
        ) from None


def _grid(option: str, text: str | None, wanted: str) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise UsageError(f"--{option} {text[:40]!r}: wanted {wanted}")
    return int(match[1]), int(match[2])
